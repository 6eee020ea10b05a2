"""The probe can be stopped at any moment: what was finished counts, the same command goes on, and
nobody sees it in the result."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import ended, launch
from seats_analysis.cli.main import main
from seats_analysis.probing import run as probe
from seats_analysis.models.families import limit_pixels
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.storage.files import Checkpoint
from seats_analysis.probing.run import ProbeRun, probe_dependency, probe_to_file
from seats_analysis.probing.selectors import random_fraction

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("one_thread")
CLIPS, WORDS = 6, ("red", "green circle", "blue")


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
    from seats_analysis.testbed.load import build_config

    torch.manual_seed(0)
    thinker = Thinker(build_config(layers=3, tower=32)).eval()
    for p in thinker.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return thinker


@pytest.fixture(scope="module")
def processor():
    from seats_analysis.testbed.load import build_processor

    return build_processor()


@pytest.fixture(scope="module")
def samples():
    "Two questions on each of six clips."

    def clip(seed):
        rng = np.random.default_rng(seed)
        return Clip(
            f"clip{seed}",
            rng.integers(0, 255, (4, 56, 56, 3), dtype="uint8"),
            2.0,
            rng.standard_normal(32000, "float32") * 0.1,
            16000,
        )

    return [
        Sample(f"{c.id}-{q}", c, text, WORDS, q, "a", "derive")
        for c in map(clip, range(CLIPS))
        for q, text in enumerate(("what colour is the circle ?", "what is it ?"))
    ]


@pytest.fixture(scope="module")
def whole(model, processor, samples, tmp_path_factory):
    "The file of an uninterrupted run."
    path = tmp_path_factory.mktemp("whole") / "p.nc"
    probe_to_file(model, processor, samples, path, progress=False)
    return path


def rows_of(path):
    return sorted(p.name for p in Checkpoint.folder_of(path).glob("[0-9]*.json"))


def killed(run, path, rows, seconds):
    "Kill a forked process some time after so many samples are done; True if it still ran."
    child = FORK.Process(target=run)
    child.start()
    while child.is_alive() and len(rows_of(path)) < rows:
        time.sleep(0.001)
    child.join(seconds)
    alive = child.is_alive()
    if alive:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return alive


def kill_and_resume(model, processor, samples, path, kills, seed):
    "Kill one run again and again; nothing finished is lost. Finished samples at each hit."
    draw, counts = random.Random(seed), []
    run = lambda: probe_to_file(model, processor, samples, path, progress=False)
    began = time.perf_counter()
    alone = (
        probe_dependency(model, processor, samples[:2], progress=False) is not None
        and time.perf_counter() - began
    )
    while len(counts) < kills:
        if path.exists():
            path.unlink()  # it came through: begin again
        before = rows_of(path)
        rows = draw.randint(len(before), len(samples))  # all: while the file is written
        wait = draw.uniform(0, alone) if len(before) < len(samples) or draw.random() < 0.5 else 600
        if killed(run, path, rows, wait):
            counts.append(len(rows_of(path)))
        if not path.exists():
            assert set(before) <= set(rows_of(path)), "a finished sample is gone"
    probe_to_file(model, processor, samples, path, progress=False)
    return counts


def test_killed_and_resumed_is_the_uninterrupted_file(model, processor, samples, whole, tmp_path):
    counts = kill_and_resume(model, processor, samples, tmp_path / "p.nc", kills=2, seed=1)
    assert (tmp_path / "p.nc").read_bytes() == whole.read_bytes()
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["p.nc"] and len(counts) == 2 and any(counts)
    )


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_many_random_kills(model, processor, samples, whole, tmp_path, seed):
    counts = kill_and_resume(model, processor, samples, tmp_path / "p.nc", kills=20, seed=seed)
    assert (tmp_path / "p.nc").read_bytes() == whole.read_bytes() and len(set(counts)) > 2, counts


def test_only_what_was_in_flight_is_run_again(model, processor, samples, tmp_path, monkeypatch):
    "Stopped while the fourth clip is being written: its two questions are run again, nothing else."
    ran, unit, write = [], ProbeRun.rows_of, Checkpoint.write

    def watch(self, part, *args):
        ran.append([s.id for s in part])
        return unit(self, part, *args)

    def stop(self, i, row):
        if i == 7:
            raise KeyboardInterrupt
        write(self, i, row)

    monkeypatch.setattr(ProbeRun, "rows_of", watch)
    monkeypatch.setattr(Checkpoint, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        probe_to_file(model, processor, samples, tmp_path / "p.nc", progress=False)
    assert len(rows_of(tmp_path / "p.nc")) == 7 and len(ran) == 4
    ran.clear()
    monkeypatch.setattr(Checkpoint, "write", write)
    probe_to_file(model, processor, samples, tmp_path / "p.nc", progress=False)
    assert ran == [[s.id for s in samples[i : i + 2]] for i in (6, 8, 10)]


@pytest.mark.parametrize("method", ["branch", "plain"])
def test_resumed_equals_whole_for_both_methods(model, processor, samples, tmp_path, method):
    options = dict(method=method, layers=[0, 2], batch_size=3, progress=False)
    expected = probe_dependency(model, processor, samples[:6], **options)
    checkpoint = tmp_path / "j"
    probe_dependency(model, processor, samples[:6], checkpoint=checkpoint, **options)
    for name in ("000001.json", "000004.json"):
        (checkpoint / name).unlink()
    (checkpoint / "000003.json").write_text('{"id": "half a fi')
    assert probe_dependency(
        model, processor, samples[:6], checkpoint=checkpoint, **options
    ).identical(expected)


def test_killed_in_the_middle_of_the_file(model, processor, samples, whole, tmp_path, monkeypatch):
    "What was written of it does not stay beside the result."
    write = Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    run = lambda: probe_to_file(model, processor, samples, tmp_path / "p.nc", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        assert not killed(run, tmp_path / "p.nc", len(samples), 600)
    assert (
        len(rows_of(tmp_path / "p.nc")) == len(samples) and len(list(tmp_path.iterdir())) == 2
    )  # the checkpoint and the half file
    (tmp_path / ".p.q.nc").touch()  # somebody else's
    run()
    assert (tmp_path / "p.nc").read_bytes() == whole.read_bytes() and sorted(
        p.name for p in tmp_path.iterdir()
    ) == [".p.q.nc", "p.nc"]


def test_killed_while_the_file_is_written(model, processor, samples, whole, tmp_path, monkeypatch):
    "Stopped before, in between or after, the same call ends in the same file."
    path, save = tmp_path / "p.nc", probe.save_profile

    def late(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "save_profile", late)
    with pytest.raises(KeyboardInterrupt):
        probe_to_file(model, processor, samples, path, progress=False)
    assert len(rows_of(path)) == len(samples)
    monkeypatch.setattr(probe, "save_profile", save)
    monkeypatch.setattr(ProbeRun, "rows_of", lambda *args: pytest.fail("nothing is left to run"))
    probe_to_file(model, processor, samples, path, progress=False)
    assert path.read_bytes() == whole.read_bytes() and not Checkpoint.folder_of(path).exists()


# onto something else


def other_weights(model, processor, samples):
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return model, processor, samples


def other_limits(model, processor, samples):
    processor = deepcopy(processor)
    limit_pixels(processor, 1, 2)
    return model, processor, samples


@pytest.mark.parametrize(
    "change, says",
    [
        (other_weights, "other weights"),
        (
            lambda m, p, s: (m, p, [replace(s[0], question="what colour ?"), *s[1:]]),
            "other data .2 samples there, 2 now; the first that differs is 'clip0-0'",
        ),
        (lambda m, p, s: (m, p, [replace(s[0], answer=1), *s[1:]]), "'clip0-0'"),
        (
            lambda m, p, s: (m, p, s[:1]),
            "other data .2 samples there, 1 now; the first that differs is 'clip0-1'",
        ),
        (dict(layers=[0, 1]), r"other layers .\[1, 3\] there, \[0, 1, 3\] now"),
        (dict(removed="audio"), "other removed"),
        (dict(seed=3), "other seed .0 there, 3 now"),
        (
            dict(method="plain"),
            'other batch_size .*other max_branch_tokens .*other method ."branch" there',
        ),
        (dict(fps=1.0), "other fps"),
        (dict(max_branch_tokens=77), "other max_branch_tokens .4096 there, 77 now"),
        (dict(layers="auto"), r'other layers .\[1, 3\] there, "auto" now'),
        (other_limits, "other processor settings .pixel limits"),
    ],
)
def test_refuses_a_checkpoint_of_another_run(model, processor, samples, tmp_path, change, says):
    "Named, and nothing of the old run is lost."
    base = dict(layers=[1], checkpoint=tmp_path / "j", progress=False)
    probe_dependency(model, processor, samples[:2], **base)
    before = {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()}
    saved = model.lm_head.weight.detach().clone()
    try:
        with pytest.raises(ValueError, match=f"cannot be continued: .*{says}"):
            if callable(change):
                probe_dependency(*change(model, processor, samples[:2]), **base)
            else:
                probe_dependency(model, processor, samples[:2], **base | change)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()}
    probe_dependency(model, processor, samples[:2], **base)


@dataclass(frozen=True)
class Window:
    "A selector of one's own."

    i: int

    def __call__(self, view):
        return view.among(("both",)) & (view.window == self.i)


@pytest.mark.parametrize(
    "one, other", [(random_fraction(0.5), random_fraction(0.25)), (Window(0), Window(3))]
)
def test_selectors_tell_runs_apart(model, processor, samples, tmp_path, one, other):
    ask = lambda s: probe_dependency(
        model,
        processor,
        samples[:2],
        {"part": s},
        layers=[1],
        checkpoint=tmp_path / "j",
        progress=False,
    )
    first = ask(one)
    assert ask(replace(one)).identical(first)
    with pytest.raises(ValueError, match="other selectors"):
        ask(other)


class Held:
    def __call__(self, view):
        return view.media


@pytest.mark.parametrize("selector", [lambda view: view.media, Held(), partial(max, 1)])
def test_no_checkpoint_for_a_selector_without_a_name(model, processor, samples, tmp_path, selector):
    "Without one it may be used."
    ask = lambda **more: probe_dependency(
        model, processor, samples[:2], {"part": selector}, layers=[1], progress=False, **more
    )
    with pytest.raises(ValueError, match="give a frozen dataclass"):
        ask(checkpoint=tmp_path / "j")
    assert not (tmp_path / "j").exists()
    if not isinstance(selector, partial):
        assert ask().sizes["sample"] == 2


@pytest.mark.parametrize("first, second", [([0, 1], "auto"), ("auto", [0, 1])])
def test_a_run_with_other_layers_is_not_swept_away(
    model, processor, samples, tmp_path, monkeypatch, first, second
):
    "Whether layers are given or found, the finished samples of an unfinished run stay."
    write = Checkpoint.write

    def stop(self, i, row):
        if i == 2:
            raise KeyboardInterrupt
        write(self, i, row)

    ask = lambda layers: probe_to_file(
        model, processor, samples, tmp_path / "p.nc", layers=layers, progress=False
    )
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            ask(first)
    before = sorted(Checkpoint.folder_of(tmp_path / "p.nc").rglob("*"))
    with pytest.raises(
        ValueError, match="holds an unfinished run that cannot be continued: other layers"
    ):
        ask(second)
    assert sorted(Checkpoint.folder_of(tmp_path / "p.nc").rglob("*")) == before
    ask(first)
    assert [p.name for p in tmp_path.iterdir()] == ["p.nc"]


# several processes


def test_processes_share_the_work(model, processor, samples, whole, tmp_path, monkeypatch):
    "Two forked processes write one checkpoint; the first one merges what both have measured."
    path, done = tmp_path / "p.nc", FORK.Queue()

    def work(rank):
        ran, unit = [], ProbeRun.rows_of
        ProbeRun.rows_of = lambda self, part, *args: (
            ran.extend(s.id for s in part) or unit(self, part, *args)
        )
        done.put(
            (rank, probe_to_file(model, processor, samples, path, progress=False) is None, ran)
        )

    children = launch(work)
    answers = sorted(done.get(timeout=300) for _ in children)
    assert ended(children) == [0, 0]
    assert [(rank, nothing) for rank, nothing, _ in answers] == [(0, False), (1, True)]
    assert [len(ran) for *_, ran in answers] == [6, 6] and sorted(
        sum((ran for *_, ran in answers), [])
    ) == sorted(s.id for s in samples)
    assert path.read_bytes() == whole.read_bytes() and not Checkpoint.folder_of(path).exists()


def test_auto_is_shared_too(model, processor, samples, tmp_path):
    "Every process needs the curves to know where to look next, the first one alone writes."
    done = FORK.Queue()

    def work(rank):
        done.put(
            (
                rank,
                probe_to_file(
                    model, processor, samples, tmp_path / "two.nc", layers="auto", progress=False
                )
                is None,
            )
        )

    children = launch(work)
    assert sorted(done.get(timeout=300) for _ in children) == [(0, False), (1, True)]
    assert ended(children) == [0, 0]
    probe_to_file(model, processor, samples, tmp_path / "one.nc", layers="auto", progress=False)
    assert (tmp_path / "two.nc").read_bytes() == (tmp_path / "one.nc").read_bytes()


@pytest.mark.parametrize("layers", [[1], "auto"])
def test_a_process_without_work_leaves_nothing(model, processor, samples, tmp_path, layers):
    def work(rank):
        path = tmp_path / "p.nc"
        probe_to_file(model, processor, samples[:2], path, layers=layers, progress=False)

    assert ended(launch(work)) == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["p.nc"]


# the command


def environment():
    return dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )


WORDS_OF_COMMAND = "probe --limit 6 --layers 0:16:4".split()
COMMAND = ["-c", "from seats_analysis.cli.main import main; main()", *WORDS_OF_COMMAND]


def forked(folder, path, processes=1):
    "The command in so many forked processes: (exit codes, standard output, standard error)."

    def run(rank):
        for number, name in ((1, f"out{rank}"), (2, f"err{rank}")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.stdout, sys.stderr = (
            ["seats", *WORDS_OF_COMMAND, "--out", str(path)],
            os.fdopen(1, "w"),
            os.fdopen(2, "w"),
        )
        main()

    codes = ended(launch(run, processes))
    said = ("".join(p.read_text() for p in sorted(folder.glob(f"{n}?"))) for n in ("out", "err"))
    return codes, *said


def launched(folder, path):
    "`accelerate launch`; `--multi_gpu` is its launcher of processes, with or without GPUs."
    words = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    words += " --dynamo_backend no --main_process_port 0 --no_python"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words.split()]
    done = subprocess.run(
        [*launch, sys.executable, *COMMAND, "--out", path],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return [done.returncode] * 2, done.stdout, done.stderr


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    codes, _, said = forked(folder, folder / "p.nc")
    # a rate, and the time that is left before it
    assert codes == [0] and "sample/s" in said, said
    return folder / "p.nc"


@pytest.mark.parametrize(
    "twice",
    [
        pytest.param(partial(forked, processes=2), id="forked"),
        pytest.param(launched, marks=pytest.mark.nightly),
    ],
)
def test_launched_twice_is_the_same_file(commanded, tmp_path, twice):
    codes, out, said = twice(tmp_path, tmp_path / "p.nc")
    assert codes == [0, 0], said
    assert "probe (1 of 2)" in said and "probe (2 of 2)" in said
    assert out.count("questions on") == 1
    assert (tmp_path / "p.nc").read_bytes() == commanded.read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("stop, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_command_goes_on(commanded, tmp_path, stop, code):
    path = tmp_path / "p.nc"
    heeded = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # a shell lets what it starts in the background ignore it
    with subprocess.Popen(
        [sys.executable, *COMMAND, "--out", path],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeded,
    ) as child:
        while not rows_of(path) and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(stop)
        said = child.stderr.read()
    assert child.returncode == code and not path.exists() and 0 < len(rows_of(path)) < 6
    if stop == signal.SIGINT:
        assert said.splitlines()[-1] == "seats: interrupted" and "the same command goes on" in said
    other = subprocess.run(
        [sys.executable, *COMMAND, "--limit", "5", "--out", path],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (
        other.returncode == 2
        and "other data (6 samples there, 5 now" in other.stderr.splitlines()[-1]
    )
    assert (
        subprocess.run(
            [sys.executable, *COMMAND, "--out", path], env=environment(), capture_output=True
        ).returncode
        == 0
    )
    assert path.read_bytes() == commanded.read_bytes()
