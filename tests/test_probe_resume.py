"""The probe can be stopped at any moment: what was finished counts, the same command goes on, and
nobody sees it in the result."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

from conftest import ROOT
import pytest
import tiny
import torch

from launch import ended, launch
from seats_analysis import probe_dependency, probe_to_file, random_fraction
from seats_analysis.cli.main import main

from seats_analysis.probing import run as probe
from seats_analysis.probing.run import ProbeRun
from seats_analysis.storage.files import Checkpoint

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny.thinker("qwen2.5-omni", 3)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen2.5-omni")


@pytest.fixture(scope="module")
def samples():
    "Two questions on each of six clips."
    return [
        tiny.ask(f"c{i}-{q}", clip, text, family="a", split="derive")
        for i, clip in enumerate(tiny.clip(i, 2, size=(56, 56)) for i in range(6))
        for q, text in enumerate(("what colour is the circle ?", "what is it ?"))
    ]


@pytest.fixture(scope="module")
def ask(model, processor):
    "Asks the probe itself."
    return partial(probe_dependency, model, processor, progress=False)


@pytest.fixture(scope="module")
def to_file(model, processor, samples):
    "Probes into a file."
    return partial(probe_to_file, model, processor, samples, progress=False)


@pytest.fixture(scope="module")
def whole(to_file, tmp_path_factory):
    "The bytes of an uninterrupted run's file."
    path = tmp_path_factory.mktemp("whole") / "p.nc"
    to_file(path)
    return path.read_bytes()


def rows_of(path):
    return sorted(p.name for p in Checkpoint.folder_of(path).glob("[0-9]*.json"))


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def stopped_at(row):
    "Within the block a run ends when it is about to write that row."

    def write(self, i, values, write=Checkpoint.write):
        if i == row:
            raise KeyboardInterrupt
        write(self, i, values)

    with patch.object(Checkpoint, "write", write), pytest.raises(KeyboardInterrupt):
        yield


@pytest.fixture
def ran(monkeypatch):
    "Which samples a run has asked about, by unit."
    found, unit = [], ProbeRun.rows_of

    def watch(self, part, *args):
        found.append([s.id for s in part])
        return unit(self, part, *args)

    monkeypatch.setattr(ProbeRun, "rows_of", watch)
    return found


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


def kill_and_resume(ask, to_file, samples, path, kills, seed):
    "Kill one run again and again; nothing finished is lost. Finished samples at each hit."
    draw, counts = random.Random(seed), []
    began = time.perf_counter()
    ask(samples[:2])
    alone = time.perf_counter() - began
    while len(counts) < kills:
        if path.exists():
            path.unlink()  # it came through: begin again
        before = rows_of(path)
        rows = draw.randint(len(before), len(samples))  # all: while the file is written
        wait = draw.uniform(0, alone) if len(before) < len(samples) or draw.random() < 0.5 else 600
        if killed(partial(to_file, path), path, rows, wait):
            counts.append(len(rows_of(path)))
        if not path.exists():
            assert set(before) <= set(rows_of(path)), "a finished sample is gone"
    to_file(path)
    return counts


def test_killed_and_resumed_is_the_uninterrupted_file(ask, to_file, samples, whole, tmp_path):
    counts = kill_and_resume(ask, to_file, samples, tmp_path / "p.nc", kills=2, seed=1)
    assert (tmp_path / "p.nc").read_bytes() == whole and any(counts)
    assert names_in(tmp_path) == ["p.nc"]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_many_random_kills(ask, to_file, samples, whole, tmp_path, seed):
    counts = kill_and_resume(ask, to_file, samples, tmp_path / "p.nc", kills=20, seed=seed)
    assert (tmp_path / "p.nc").read_bytes() == whole and len(set(counts)) > 2, counts


def test_only_what_was_in_flight_is_run_again(to_file, samples, tmp_path, ran):
    "Stopped while the fourth clip is being written: its two questions are run again, nothing else."
    path = tmp_path / "p.nc"
    with stopped_at(7):
        to_file(path)
    assert len(rows_of(path)) == 7 and len(ran) == 4
    ran.clear()
    to_file(path)
    assert ran == [[s.id for s in samples[i : i + 2]] for i in (6, 8, 10)]


def test_killed_while_the_file_is_written(to_file, samples, whole, tmp_path, monkeypatch, ran):
    "Stopped before, in between or after, the same call ends in the same file."
    path, save = tmp_path / "p.nc", probe.save_profile

    def late(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "save_profile", late)
    with pytest.raises(KeyboardInterrupt):
        to_file(path)
    assert len(rows_of(path)) == len(samples)
    monkeypatch.setattr(probe, "save_profile", save)
    ran.clear()
    to_file(path)
    assert path.read_bytes() == whole and not ran and not Checkpoint.folder_of(path).exists()


# onto something else


def other_weights(arguments):
    model = deepcopy(arguments["model"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return dict(model=model)


def other_limits(arguments):
    processor = deepcopy(arguments["processor"])
    video = processor.video_processor
    token = (video.patch_size * video.merge_size) ** 2
    video.size = dict(video.size) | dict(shortest_edge=token, longest_edge=2 * token)
    return dict(processor=processor)


def other_first(**change):
    def other(arguments):
        first, *rest = arguments["samples"]
        return dict(samples=[replace(first, **change), *rest])

    return other


@pytest.mark.parametrize(
    "change, says",
    [
        (other_weights, "other weights"),
        (
            other_first(question="what colour ?"),
            "other data .2 samples there, 2 now; the first that differs is 'c0-0'",
        ),
        (other_first(answer=0), "'c0-0'"),
        (
            lambda arguments: dict(samples=arguments["samples"][:1]),
            "other data .2 samples there, 1 now; the first that differs is 'c0-1'",
        ),
        (dict(layers=[0, 1]), r"other layers .\[1, 3\] there, \[0, 1, 3\] now"),
        (dict(removed="audio"), "other removed"),
        (dict(fps=1.0), "other fps"),
        (dict(max_branch_tokens=77), "other max_branch_tokens .4096 there, 77 now"),
        (other_limits, "other processor settings .pixel limits"),
    ],
)
def test_refuses_a_checkpoint_of_another_run(model, processor, samples, tmp_path, change, says):
    "Named, and nothing of the old run is lost."
    base = dict(model=model, processor=processor, samples=samples[:2], layers=[1], progress=False)
    one = partial(probe_dependency, **base, checkpoint=tmp_path)
    one()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"cannot be continued: .*{says}"):
        one(**change(base) if callable(change) else change)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    one()


@dataclass(frozen=True)
class Window:
    "A selector of one's own."

    i: int

    def __call__(self, view):
        return view.among(("both",)) & (view.window == self.i)


@pytest.mark.parametrize(
    "one, other", [(random_fraction(0.5), random_fraction(0.25)), (Window(0), Window(3))]
)
def test_selectors_tell_runs_apart(ask, samples, tmp_path, one, other):
    removed = lambda s: ask(samples[:2], {"part": s}, layers=[1], checkpoint=tmp_path / "j")
    first = removed(one)
    assert removed(replace(one)).identical(first)
    with pytest.raises(ValueError, match="other selectors"):
        removed(other)


def test_a_run_with_other_layers_is_not_swept_away(to_file, tmp_path):
    "The finished samples of an unfinished run stay."
    path = tmp_path / "p.nc"
    with stopped_at(2):
        to_file(path, layers=[0, 1])
    before = sorted(Checkpoint.folder_of(path).rglob("*"))
    says = "holds an unfinished run that cannot be continued: other layers"
    with pytest.raises(ValueError, match=says):
        to_file(path)
    assert sorted(Checkpoint.folder_of(path).rglob("*")) == before
    to_file(path, layers=[0, 1])
    assert names_in(tmp_path) == ["p.nc"]


# the command


ENVIRONMENT = os.environ | dict(
    PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)


WORDS_OF_COMMAND = "probe --limit 6 --layers 0:16:4".split()
COMMAND = [sys.executable, "-c", "from seats_analysis.cli.main import main; main()"]
COMMAND += WORDS_OF_COMMAND


def forked(folder, path, processes=1):
    "The command in so many forked processes: (exit codes, standard output, standard error)."

    def run(rank):
        for number, name in ((1, f"out{rank}"), (2, f"err{rank}")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["seats", *WORDS_OF_COMMAND, "--out", str(path)]
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        main()

    codes = ended(launch(run, processes))
    said = ("".join(p.read_text() for p in sorted(folder.glob(f"{n}?"))) for n in ("out", "err"))
    return codes, *said


def launched(folder, path):
    "`accelerate launch`; `--multi_gpu` is its launcher of processes, with or without GPUs."
    words = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    words += " --dynamo_backend no --main_process_port 0 --no_python"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words.split()]
    words = [*launch, *COMMAND, "--out", path]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
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
