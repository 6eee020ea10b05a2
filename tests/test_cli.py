"""The command line: one line and exit 2 for bad input, nothing lost, results on stdout."""

import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from typer.testing import CliRunner

from seats_analysis.cli import answers, app as shared
from seats_analysis.lab import demo as demo_commands, studies
from seats_analysis.cli.main import app
from seats_analysis.boundaries.find import Boundaries, find_boundaries
from seats_analysis.boundaries.retention import synthetic_profile
from seats_analysis.inputs.samples import read_samples
from seats_analysis.models.families import adapter_for
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.storage.schemas import SCHEMAS, save_profile

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch",
    "transformers",
    "xarray",
    "matplotlib",
    "pandas",
    "scipy",
    "av",
    "seaborn",
    "h5netcdf",
}


def seats(*args):
    "Run a command in this process. Bugs surface as exceptions."
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args):
    "The one line of a command that must end with exit code 2 and nothing on stdout."
    result = seats(*args)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert (
        result.stdout == ""
        and result.stderr.count("\n") == 1
        and result.stderr.startswith("seats: ")
    ), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def outside(*args, **kw):
    "Run the console script in a process of its own."
    code = 'import sys; from seats_analysis.cli.main import main; sys.argv[0] = "seats"; main()'
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, **kw
    )


@pytest.fixture
def profile(tmp_path, monkeypatch):
    "A stored profile of 12 layers with known blocks, in the current folder."
    monkeypatch.chdir(tmp_path)
    data = synthetic_profile(clips=64)
    data.attrs["tokens"] = '{"visual": 128, "audio": 80, "text": 17}'
    return save_profile(data, tmp_path / "made-up.nc")


@pytest.fixture(scope="module")
def model():
    "The testbed's structure with random weights."
    from seats_analysis.testbed.load import build_processor, build_model

    thinker = build_model(layers=12).eval()

    return thinker, build_processor()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    "A JSONL with six questions on two real clips."
    from seats_analysis.inputs.samples import write_samples
    from seats_analysis.testbed.load import fresh_samples

    folder = tmp_path_factory.mktemp("clips")
    samples = [
        replace(s, split=("derive", "test")[i // 3])
        for i, s in enumerate(fresh_samples(6, per_clip=3, folder=folder))
    ]
    return write_samples(samples, folder / "questions.jsonl")


@pytest.fixture
def clip(questions):
    return next(questions.parent.glob("*.mp4"))


@pytest.fixture
def stubbed(monkeypatch, model):
    "`load_model` gives the random model under any name."
    monkeypatch.setattr(shared, "check_model_name", lambda name, revision: None)
    for commands in (shared, studies):
        monkeypatch.setattr(commands, "load_model", lambda *args: model)


# help and start-up


def test_help():
    "Every command and every option says what it is for; no line is cut off or too wide."
    import typer

    commands = typer.main.get_command(app).commands
    assert len([c for c in commands.values() if not c.hidden]) == 14
    for name, command in {"": typer.main.get_command(app), **commands}.items():
        result = seats(*name.split(), "--help")
        assert result.exit_code == 0 and "Usage: " in result.stdout and result.stderr == ""
        assert "..." not in re.sub(r"\.\.\.`| \.\.\. |\]\.\.\.", "", result.stdout), result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert not [p.name for p in command.params if not getattr(p, "help", "said elsewhere")]


def test_help_is_quick_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert outside("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    )  # CPU seconds: the wall clock depends on the neighbours
    code = f"import sys, seats_analysis.cli.main; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_version_and_bare_call():
    from seats_analysis import __version__

    assert seats("--version").stdout.strip() == __version__
    assert seats().exit_code == 0 and "Commands:" in seats().stdout


# the command line itself


@pytest.mark.parametrize(
    "args, says",
    [
        (["prob"], "No such command 'prob'"),
        (["probe", "--bogus"], "--bogus"),
        (["probe", "--limit", "many"], "'many'|valid integer"),
        (["probe", "--limit", "0"], "--limit"),
        (["schedule"], "Missing argument"),
        (["run", "x.mp4"], "--question"),
        (["schedule", "x.nc", "--trr", "ten"], "--trr"),
    ],
)
def test_usage_errors_are_one_line(args, says):
    assert re.search(says, refused(*args))


# bad input


@pytest.mark.parametrize("trr", ["0", "-5", "100.1", "nan", "inf"])
def test_trr_outside_its_range(profile, tmp_path, trr):
    says = "finite" if trr in ("nan", "inf") else "(0, 100]"
    assert says in refused("schedule", profile, "--trr", trr, "--out", tmp_path / "plan.json")
    assert says in refused("run", "x.mp4", "--question", "?", "--trr", trr)
    assert not (tmp_path / "plan.json").exists()


def test_unreachable_target_says_what_to_change(profile, tmp_path):
    says = refused(
        "schedule", profile, "--trr", "80", "--late", "estimate", "--out", tmp_path / "plan.json"
    )
    assert "ask for at most 66.6 %" in says and "--late certified" in says
    says = refused(
        "schedule",
        profile,
        "--visual",
        "80",
        "--audio",
        "10",
        "--late",
        "estimate",
        "--out",
        tmp_path / "plan.json",
    )
    assert "visual" in says and "ask for at most 66.6 %" in says and "layer 9 of 12" in says


@pytest.mark.parametrize("command", [["boundaries"], ["schedule", "--trr", "10"]])
def test_missing_and_broken_profiles(tmp_path, command):
    assert "none.nc" in refused(*command, tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    assert "text.nc" in refused(*command, tmp_path / "text.nc")
    import xarray as xr

    xr.Dataset({"a": 1}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    assert "other.nc" in refused(*command, tmp_path / "other.nc")


def test_profile_without_token_counts(profile, tmp_path):
    save_profile(synthetic_profile(clips=64), tmp_path / "bare.nc")
    assert "--tokens" in refused("schedule", tmp_path / "bare.nc", "--trr", "10")
    assert (
        seats("schedule", tmp_path / "bare.nc", "--trr", "10", "--tokens", "128,80").exit_code == 0
    )
    assert "--tokens" in refused(
        "schedule", tmp_path / "bare.nc", "--trr", "10", "--tokens", "many", "--overwrite"
    )


def test_conflicting_targets(profile):
    for given in (
        [],
        ["--trr", "10", "--visual", "5"],
        ["--visual", "5"],
        ["--trr", "10", "--visual", "5", "--audio", "20"],
    ):
        assert "either --trr N" in refused("schedule", profile, *given)


@pytest.mark.parametrize(
    "name, says", [("nope", "unknown model 'nope'"), ("a/b/c", "unknown model 'a/b/c'")]
)
def test_unknown_model(name, says, clip):
    assert says in refused("probe", "--model", name)
    assert says in refused("run", clip, "--question", "?", "--model", name)


@pytest.mark.parametrize(
    "args, says",
    [
        (["probe", "--device", "foo"], "--device 'foo': cpu or cuda"),
        (["probe", "--device", "meta"], "--device 'meta'"),
        (["eval", "--device", "cuda:x"], "--device cuda:x"),
        (["probe", "--layers", "0:0"], "--layers '0:0'"),
        (["eval", "--methods", ","], "--methods: nothing named"),
        (["bench", "--seconds", "1e12"], "--seconds 1e+12: from 1"),
        (["bench", "--seconds", "nan"], "--seconds nan"),
        (["bench", "--frames", "1000000000"], "--frames 1000000000: an even number"),
    ],
)
def test_values_that_cannot_be(args, says, tmp_path):
    assert says in refused(*args, "--out", tmp_path / "x.nc") and not list(tmp_path.iterdir())


def test_schedule_file_of_brackets(clip, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    refused("run", clip, "--question", "?", "--schedule", tmp_path / "deep.json")


def test_weights_cut_off(clip, tmp_path, model):
    for part in model:
        part.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be read" in refused("run", clip, "--question", "?", "--model", tmp_path)


def test_model_the_hub_does_not_give(questions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    says = refused("probe", "--model", "nobody/nothing", "--data", questions)
    assert "not in the local cache" in says and "hf download nobody/nothing" in says
    assert "unknown" not in says


def test_folder_that_is_no_om_llm(tmp_path, questions):
    assert "no config.json" in refused("probe", "--model", tmp_path, "--data", questions)
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type="bert", architectures=["BertModel"]))
    )
    assert "not an om-LLM" in refused("probe", "--model", tmp_path, "--data", questions)


def test_jsonl_with_a_missing_field_names_the_line(questions, tmp_path):
    lines = questions.read_text().splitlines()
    broken = json.loads(lines[2])
    del broken["answer"]
    bad = questions.parent / "bad.jsonl"
    bad.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:]]))
    says = refused("probe", "--data", bad, "--out", tmp_path / "p.nc")
    assert "line 3" in says and "answer" in says and not (tmp_path / "p.nc").exists()
    assert "none.jsonl" in refused("probe", "--data", tmp_path / "none.jsonl")


def test_questions_without_answers_are_probed(questions, tmp_path, stubbed):
    "Only the divergence is measured, as with answers; boundaries say why they cannot be had."
    import xarray as xr

    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    files, leave = {}, {"with": ["lettered"], "without": ["lettered", "choices", "answer"]}
    for name, keys in leave.items():
        left = [{k: v for k, v in row.items() if k not in keys} for row in rows]
        files[name] = questions.parent / f"{name}.jsonl"
        files[name].write_text("\n".join(map(json.dumps, left)))
    for name, data in files.items():
        done = seats(
            "probe",
            "--model",
            "testbed",
            "--data",
            data,
            "--layers",
            "0,6",
            "--removed",
            "both",
            "--out",
            tmp_path / f"{name}.nc",
        )
        assert done.exit_code == 0, done.stderr
    assert "none with choices, so only the divergence is measured" in done.stdout
    told, found = (
        xr.load_dataset(tmp_path / f"{name}.nc", engine="h5netcdf") for name in ("with", "without")
    )
    np.testing.assert_allclose(found.kl, told.kl, atol=1e-4)
    assert found.n_choices.values.tolist() == [0] * 6 and not np.isfinite(found.nll).any()
    assert "no chosen question has choices" in refused(
        "boundaries", tmp_path / "without.nc", "--split", "all"
    )
    assert "'auto' follows the share of right answers" in refused(
        "probe",
        "--max-frames",
        "8",
        "--model",
        "testbed",
        "--data",
        files["without"],
        "--layers",
        "auto",
        "--out",
        tmp_path / "a.nc",
    )


def test_out_that_cannot_be_written_is_refused_first(tmp_path, questions):
    assert "is a folder" in refused("probe", "--data", questions, "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(
        "probe", "--data", questions, "--out", tmp_path / "file" / "p.nc"
    )


@pytest.fixture
def unloaded(monkeypatch):
    "Whatever is refused is refused before a model is loaded."

    def load(*args):
        raise AssertionError("the model was loaded")

    for commands in (shared, studies):
        monkeypatch.setattr(commands, "load_model", load)


@pytest.fixture
def broken(questions, tmp_path_factory):
    "The six questions, and five more on clips that are broken in five ways."
    good = [json.loads(line) for line in questions.read_text().splitlines()]
    folder = tmp_path_factory.mktemp("broken")
    for row in good:
        shutil.copy(questions.parent / row["video"], folder)
    whole = (folder / good[0]["video"]).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film")
    with wave.open(str(folder / "sound.wav"), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(bytes(32000))
    names = "nowhere.mp4 cut.mp4 empty.mp4 text.mp4 sound.wav".split()
    bad = [good[0] | dict(id=name, video=name) for name in names]
    path = folder / "broken.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good[:3], *bad, *good[3:]])))
    return path


@pytest.mark.parametrize("command", [["probe"], ["eval", "--trr", "35"]])
def test_broken_clips_are_named_all_at_once(command, broken, unloaded, tmp_path):
    done = seats(*command, "--data", broken, "--out", tmp_path / "x.json")
    first, *lines = done.stderr.splitlines()
    assert done.exit_code == 2 and "5 broken clips" in first and "--skip-broken" in first
    names = "nowhere cut empty text sound".split()
    for number, (name, line) in enumerate(zip(names, lines), 4):
        assert f"broken.jsonl, line {number}: " in line and name in line, line
    assert len(lines) == 5 and not list(tmp_path.iterdir())


def test_many_broken_clips_are_counted(broken, unloaded):
    row = json.loads(broken.read_text().splitlines()[3])
    rows = [row | dict(id=str(i), video=f"gone{i}.mp4") for i in range(25)]
    broken.write_text("\n".join(map(json.dumps, rows)))
    done = seats("probe", "--data", broken)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 12
    assert "25 broken clips" in done.stderr and "and 15 more" in done.stderr


def test_skip_broken_goes_on_and_counts_them(broken, stubbed, tmp_path):
    from seats_analysis.storage.schemas import load_profile

    options = ["--data", broken, "--skip-broken", "--threads", 1, "--out"]
    done = seats("probe", *options, tmp_path / "p.nc", "--layers", "0,6", "--removed", "both")
    assert done.exit_code == 0 and "5 questions on 5 broken clips are left out" in done.stdout
    profile = load_profile(tmp_path / "p.nc")
    assert profile.sizes["sample"] == 6 and len(json.loads(profile.attrs["broken"])) == 5


@pytest.mark.parametrize(
    "args, says",
    [
        (["probe", "--layers", "99"], "layer 99 is outside 0.."),
        (["probe", "--layers", "0,-1"], "layer -1 is outside 0.."),
        (["probe", "--removed", "vision"], "'vision' is not one of visual, audio, both"),
        (["probe", "--removed", "both,both"], "name each once"),
        (["probe", "--method", "fast"], "'fast' is not one of 'branch', 'plain'"),
        (["probe", "--out", "/proc/x.nc"], "cannot write in /proc"),
        (["eval", "--out", "/proc/x.json"], "cannot write in /proc"),
        (["eval", "--profile", "{profile}"], "12 layers"),
        (
            ["run", "{clip}", "--question", "?", "--trr", "10", "--profile", "{profile}"],
            "12 layers",
        ),
        (["run", "{clip}", "--question", "?", "--schedule", "{plan}"], "28 layers"),
        (["run", "{clip}", "--question", "?", "--kept", "/proc/k.json"], "cannot write in /proc"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    args, says, profile, clip, unloaded, tmp_path
):
    Schedule.published("qwen2.5-omni-7b", 10).save(tmp_path / "plan.json")
    given = dict(profile=profile, clip=clip, plan=tmp_path / "plan.json")
    assert says in refused(*(a.format(**given) for a in args))


LONG = "1" + "0" * 400
ENDS = {  # what is refused at the door: command and option -> values
    "probe --layers": f"0:999999999999:1 0:{LONG} 0:0:1 -1 nan {LONG}",
    "probe --fps": "0 -1 1e308 nan inf -inf 1e999",
    "probe --max-frames": f"0 nan {LONG}",
    "probe --max-branch-tokens": f"0 {LONG}",
    "probe --limit": f"0 999999999999 {LONG}",
    "probe --threads": "0 999999 999999999999",
    "boundaries testbed --rise": "nan inf",
    "boundaries testbed --tolerance": "nan inf",
    "boundaries testbed --margin": "nan inf",
    "schedule testbed --trr": "0 -1 1e308 nan inf",
    "schedule testbed --trr 10 --scale": "nan inf",
    "schedule testbed --trr 10 --tokens": "nan,1 1,inf",
    "simulate --sizes": f"0 99999999999 {LONG} nan",
    "simulate --trials": "0 999999999999",
    "simulate --replicates": "0 999999999999",
    "sample-size --sizes": "-1 99999999999",
    "sample-size --trials": "999999999999",
    "run {clip} --question ? --trr": "0 nan inf",
    "eval --trr": "0 nan inf 10,nan",
    "eval --seed": f"-1 {LONG}",
    "transfer --trr": "0 nan",
    "bench --width": "0 -1 999999999999",
    "bench --frames": "0 -1 999999999999",
    "bench --seconds": "0 nan inf 1e308",
    "bench --batch": "0 999999999999 nan",
    "bench --trr": "nan",
    "bench --scaling": "0 999999999999",
    "bench --repeats": "0 999999999999",
    "bench --steps": "0 999999999999",
    "bench --most-seconds": "-1 nan inf",
    "train-testbed --steps": "0 999999999999",
}


@pytest.mark.parametrize("line", ENDS)
def test_numbers_at_their_ends(line, clip, unloaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *command, option = line.format(clip=clip).split()
    for value in ENDS[line].split():
        said = refused(*command, f"{option}={value}")
        assert option.strip("-") in said and (len(said) < 250 or value == LONG), (value, said)
    assert not list(tmp_path.iterdir())


WORKS = {  # what makes each command quick where a number is good
    "probe": "--limit 2 --layers 0,5",
    "boundaries": "testbed",
    "schedule": "testbed --trr 10",
    "simulate": "--trials 1 --replicates 10 --sizes 25",
    "sample-size": "--trials 2 --sizes 25",
    "run": "{clip} --question x --trr 10 --max-tokens 2",
    "eval": "--methods seats,random --trr 10 --limit 2",
    "transfer": "--limit 2",
    "bench": "--config testbed --frames 8 --seconds 4 --methods seats --trr 10 --repeats 1 "
    "--steps 1",
    "train-testbed": "--config tiny.json",
    "demo": "--limit 6",
}
LISTS = (
    "probe --layers, simulate --sizes, sample-size --sizes, eval --trr, bench --trr, bench --batch"
)


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORKS)
def test_every_number_of_every_command(name, clip, tmp_path, monkeypatch):
    "It is refused in one line, or works, within 20 seconds of CPU."
    from signal import ITIMER_PROF, SIGPROF, setitimer, signal
    from test_wheel import TINY

    def too_late(*_):
        raise TimeoutError

    def demo_of_all(*_):
        raise ValueError("the demo itself takes its time")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_commands, "_demo", demo_of_all)
    Path("tiny.json").write_text(json.dumps(TINY))
    numbers = re.findall(r"(--[\w-]+) +<?(?:int|float)", seats(name, "--help").stdout, re.I)
    numbers += re.findall(rf"(?<!-)\b{name} (--[\w-]+)", LISTS)
    assert numbers
    before = signal(SIGPROF, too_late)
    for option in numbers:
        words = WORKS[name].format(clip=clip).split()
        if option in words:
            del words[(at := words.index(option)) : at + 2]
        if option in ("--visual", "--audio"):
            words = "testbed --visual 10 --audio 10".split()
        for value in ("0", "-1", "1e308", "nan", "inf", "1000000000000", LONG):
            shutil.rmtree("seats_out", ignore_errors=True)
            setitimer(ITIMER_PROF, 20)
            done = seats(name, *words, f"{option}={value}")
            setitimer(ITIMER_PROF, 0)
            said = (done.stderr.splitlines() or [""])[-1]
            refused_well = done.exit_code == 2 and said.startswith("seats: ")
            assert done.exit_code == 0 or refused_well, (option, value, done.stderr)
    signal(SIGPROF, before)


def test_schedule_of_other_weights_or_of_another_model(profile, clip, stubbed, tmp_path):
    "Both are used, and both are warned of; the model's own schedule is not."
    import xarray as xr
    from seats_analysis.models.families import hash_weights

    stored, plan = xr.load_dataset(profile, engine="h5netcdf"), tmp_path / "plan.json"
    thinker = answers.load_model()[0]
    own = hash_weights(thinker)
    for weights, model, warns in (
        (own, "other", None),
        ("0" * 64, "other", "made for other weights"),
        ("", "owner/other", "made for owner/other, and the model is mine"),
        ("", "owner/Mine", None),
    ):
        stored.attrs |= dict(weights_sha256=weights, model=model)
        save_profile(stored, tmp_path / "p.nc")
        made = seats("schedule", tmp_path / "p.nc", "--trr", "10", "--out", plan, "--overwrite")
        assert made.exit_code == 0, made.stderr
        with patch.object(type(adapter_for(thinker)), "name", lambda self, model: "mine"):
            done = seats("run", clip, "--question", "?", "--schedule", plan, "--max-tokens", 1)
        assert done.exit_code == 0, done.stderr
        assert (warns in done.stderr) if warns else ("made for" not in done.stderr)


def test_eval_does_not_conclude_from_few_clips(profile, questions, stubbed, tmp_path):
    "It says how many it takes, that the questions made the schedule, and shows progress early."
    probe = ["probe", "--data", questions, "--layers", "0,6", "--removed", "both"]
    seats(*probe, "--threads", 1, "--out", tmp_path / "p.nc")
    same = answers._made_from(read_samples(questions), tmp_path / "p.nc")
    assert same == 3  # of six: the other three are of the split `test`
    asked = ["eval", "--data", questions, "--trr", "35", "--methods", "random", "--json"]
    done = seats(*asked, "--profile", profile, "--out", tmp_path / "r.json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    found["questions_of_schedule"] = same
    text = answers._eval_text(found, "r.json")
    assert "too few for a conclusion: no difference can be significant below 6 clips" in text
    assert "3 of the questions made the schedules" in text
    assert found["batch_size"] == 1 and found["broken"] is None
    assert "equal cost" in done.stderr and "/18 [" in done.stderr  # three runs of six questions


def test_clip_that_is_missing_or_not_a_video(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("not a film")
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:3000])
    for name in ("none.mp4", "text.mp4", "half.mp4"):
        assert name in refused("run", tmp_path / name, "--question", "?")


def test_corrupted_schedule(tmp_path, clip, profile):
    plan = tmp_path / "plan.json"
    assert seats("schedule", profile, "--trr", "10", "--out", plan).exit_code == 0
    text = plan.read_text()
    for damage in (
        text[:100],
        "[]",
        text.replace('"schema"', '"scheme"'),
        text.replace('"num_layers": 12', '"num_layers": 6'),
        "\x00",
    ):
        plan.write_text(damage)
        assert "plan.json" in refused("run", clip, "--question", "?", "--schedule", plan)
    assert "none.json" in refused(
        "run", clip, "--question", "?", "--schedule", tmp_path / "none.json"
    )


def test_schedule_for_another_layer_count(tmp_path, clip, stubbed):
    Schedule.published("qwen2.5-omni-7b", 10).save(tmp_path / "seven.json")
    says = refused(
        "run",
        clip,
        "--question",
        "?",
        "--schedule",
        tmp_path / "seven.json",
        "--kept",
        tmp_path / "kept.json",
    )
    assert "28 layers" in says and "12" in says and not (tmp_path / "kept.json").exists()


def test_schedule_and_trr_exclude_each_other(clip):
    assert "not both" in refused(
        "run", clip, "--question", "?", "--schedule", "x.json", "--trr", "10"
    )


def test_trr_for_a_model_without_boundaries(clip, stubbed):
    assert "--profile" in refused(
        "run", clip, "--question", "?", "--trr", "10", "--model", "some/model"
    )


def test_old_schedule_survives_a_full_disk(profile, tmp_path):
    plan = tmp_path / "plan.json"
    assert seats("schedule", profile, "--trr", "35", "--out", plan).exit_code == 0
    before = plan.read_bytes()
    small = lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (200, 200)
    )  # the kernel refuses to let any file grow past 200 bytes
    done = outside(
        "schedule", profile, "--trr", "10", "--out", plan, "--overwrite", preexec_fn=small
    )
    assert (
        done.returncode == 2
        and done.stderr.splitlines()[-1].startswith("seats: File too large")
        and "Traceback" not in done.stderr
    ), done.stderr
    assert plan.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "plan.json",
        profile.name,
    }


def test_old_profile_survives_a_full_disk(questions, profile, tmp_path, stubbed, monkeypatch):
    out, write = profile.rename(tmp_path / "p.nc"), Path.write_bytes
    before = out.read_bytes()

    def full(self, data):
        write(self, data[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = seats(
        "probe",
        "--model",
        "any",
        "--data",
        questions,
        "--limit",
        "1",
        "--layers",
        "6",
        "--out",
        out,
        "--overwrite",
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"seats: No space left on device: {out}"
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "p.nc",
        "p.nc.checkpoint",
    ]  # what was measured is kept


def test_interrupt_is_one_line_and_130(questions, tmp_path, monkeypatch):
    def stop(*args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "load_model", stop)
    result = seats("probe", "--data", questions, "--out", tmp_path / "p.nc")
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (
        130,
        "seats: interrupted",
        "",
    )


def test_a_bug_keeps_its_traceback(questions, tmp_path, monkeypatch):
    def broken(*args, **kw):
        raise RuntimeError("a bug")

    monkeypatch.setattr(shared, "load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        seats("probe", "--data", questions, "--out", tmp_path / "p.nc")


# what the commands do


def test_boundaries_prints_layers_from_one(profile):
    result = seats("boundaries", profile)
    head, _, *rows = result.stdout.splitlines()
    assert [r.split()[0] for r in rows] == [
        "visual",
        "audio",
        "both",
    ] and "late starts (95 %)" in head
    stored = json.loads(seats("boundaries", profile, "--json").stdout)["both"]
    low, high = stored["late_start_ci"]
    end = high + 1 if high < stored["num_layers"] else "end"
    assert f"{stored['late_start'] + 1} ({low + 1} to {end})" in rows[2]
    assert rows[2].split()[1:4] == ["1", "to", str(stored["shallow_end"])]


def test_schedule_meets_its_target_and_prints_both_ratios(profile, tmp_path):
    out = ("--out", tmp_path / "plan.json", "--overwrite")
    for trr in (35, 25, 15, 10, 100):
        result = seats("schedule", profile, "--trr", trr, "--late", "estimate", *out)
        plan = Schedule.load(tmp_path / "plan.json")
        assert abs(plan.token_trr(128, 80) - trr / 100) < 1e-9
        assert (
            f"visual {100 * plan.trr['visual']:.3g} %, audio {100 * plan.trr['audio']:.3g} %"
            in result.stdout
        )
        assert (
            (plan.late_start, plan.evidence["kind"]) == (8, "derived")
            if trr < 100
            else plan.keeps_all
        )
    as_json = json.loads(seats("schedule", profile, "--trr", "10", *out, "--json").stdout)
    assert as_json == json.loads((tmp_path / "plan.json").read_text())


def test_schedule_takes_the_estimate_and_says_so(profile):
    "Its default file, and one note wherever estimate and certificate differ."
    result = seats("schedule", profile, "--trr", "10")
    made = profile.parent / "seats_out" / "made-up" / "schedules" / "made-up_trr10.json"
    assert Schedule.load(made).late_start == 8
    assert (
        result.stderr.startswith(
            "note: late block: layer 9 of 12, estimate; certified: none (64 clips"
        )
        and result.stderr.count("note: late block") == 1
    )
    assert "made-up_trr10.json exists" in refused("schedule", profile, "--trr", "10")
    args = ("schedule", profile, "--trr", "10", "--overwrite")
    careful = seats(*args, "--late", "certified", "--json")
    assert (
        json.loads(careful.stdout)["late_start"] == 12
        and "certified; estimate: layer 9 of 12" in careful.stderr
    )
    assert "'hope'" in refused(*args, "--late", "hope")
    sure = synthetic_profile(clips=800)
    save_profile(sure, profile.parent / "sure.nc")
    agreed = seats("schedule", profile.parent / "sure.nc", "--trr", "10", "--tokens", "128,80")
    assert agreed.exit_code == 0 and "late block: " not in agreed.stderr


def test_no_drops_are_announced_where_stage_two_keeps_everything(profile, tmp_path):
    "A late block so early that the scale moves to where nothing may be dropped."
    early = synthetic_profile(
        curves={
            m: np.r_[np.zeros(2), np.full(2, 0.5), np.ones(9)] for m in ("visual", "audio", "both")
        },
        clips=64,
    )
    save_profile(early, tmp_path / "early.nc")
    result = seats(
        "schedule",
        tmp_path / "early.nc",
        "--trr",
        "10",
        "--tokens",
        "128,80",
        "--out",
        tmp_path / "plan.json",
    )
    assert "drops     none" in result.stdout and "stage II drops nothing" in result.stderr
    assert Schedule.load(tmp_path / "plan.json").drop_layers == ()


def test_families_of_a_profile_that_names_none(profile, tmp_path):
    import xarray as xr

    bare = xr.load_dataset(profile, engine="h5netcdf")
    bare = bare.assign_coords(family=("sample", [""] * bare.sizes["sample"])).assign_attrs(needs="")
    save_profile(bare, tmp_path / "bare.nc")
    result = seats("boundaries", tmp_path / "bare.nc", "--families")
    assert (
        result.exit_code == 0
        and len(result.stdout.splitlines()) == 5
        and "one family" in result.stderr
    )
    assert (
        json.loads(seats("boundaries", tmp_path / "bare.nc", "--families", "--json").stdout)[
            "both"
        ]["by_family"]
        == {}
    )


def test_schedule_apart(profile):
    apart = seats("schedule", profile, "--trr", "10", "--apart", "--late", "estimate", "--json")
    assert json.loads(apart.stdout)["late_start"] == {"visual": 7, "audio": 8}


def test_probe_writes_a_profile_that_schedule_understands(questions, tmp_path, stubbed):
    out = tmp_path / "p.nc"
    result = seats(
        "probe",
        "--model",
        "any",
        "--data",
        questions,
        "--limit",
        "4",
        "--layers",
        "0:12:6",
        "--removed",
        "both",
        "--out",
        out,
        "--json",
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["samples"] == 4
    from seats_analysis.storage.schemas import load_profile

    stored = load_profile(out)
    assert stored["layer"].values.tolist() == [0, 6, 12] and stored["removed"].values.tolist() == [
        "both"
    ]
    assert (
        json.loads(stored.attrs["tokens"])["visual"] == 192
        and json.loads(stored.attrs["tokens"])["audio"] == 40
    )


def test_run_answers_with_and_without_pruning(tmp_path, clip, stubbed):
    Schedule.from_trr(Boundaries(12, 4, 9), 10, 192, 40).save(tmp_path / "plan.json")
    ask = [
        "run",
        clip,
        "--question",
        "what pitch is heard first ?",
        "--max-tokens",
        "3",
        "--model",
        "testbed",
        "--json",
    ]
    full = json.loads(seats(*ask).stdout)
    assert full["flops_fraction"] == 1 and full["tokens"]["visual"] == 192 and "trr" not in full
    pruned = json.loads(
        seats(
            *ask,
            "--schedule",
            tmp_path / "plan.json",
            "--choice",
            "low",
            "--choice",
            "high",
            "--kept",
            tmp_path / "kept.json",
        ).stdout
    )
    assert pruned["flops_fraction"] < 0.5 and abs(pruned["token_target"] - 0.1) < 1e-9
    media = sum(n - pruned["tokens"]["text"] for n in pruned["tokens_per_layer"]) / len(
        pruned["tokens_per_layer"]
    )
    assert (
        abs(pruned["token_trr"] - media / 232) < 1e-9 and abs(pruned["token_trr"] - 0.1) > 1e-3
    )  # what ran, not what was asked for
    assert (
        pruned["tokens_per_layer"][-1] == pruned["tokens"]["text"]
        and abs(sum(pruned["choices"].values()) - 1) < 1e-6
    )
    from seats_analysis.plots.kept import plot_kept
    from seats_analysis.storage.schemas import load_json
    from seats_analysis.inputs.media import decode_clip

    kept = load_json(tmp_path / "kept.json", "kept")
    assert (
        kept["grid"] == [8, 4, 6]
        and kept["audio_tokens"] == 40
        and (tmp_path / kept["clip"]).resolve() == clip.resolve()
    )
    sizes = [len(s["visual"]) + len(s["audio"]) for s in kept["stages"]]
    assert (
        sizes == sorted(sizes, reverse=True)
        and sizes[-1] == 0
        and sizes[0] + pruned["tokens"]["text"] == pruned["tokens_per_layer"][0]
    )
    assert len(plot_kept(decode_clip(clip), kept).axes) == 2 * len(sizes)


def test_run_compares_full_and_pruned(tmp_path, clip, profile, stubbed):
    ask = ["run", clip, "--question", "what ?", "--max-tokens", "2", "--model", "testbed"]
    ask += ["--profile", profile, "--trr", "10", "--compare"]
    data = json.loads(seats(*ask, "--choice", "low", "--choice", "high", "--json").stdout)
    assert data["full"]["flops_fraction"] == 1 > data["pruned"]["flops_fraction"]
    assert data["full"]["choices"].keys() == {"low", "high"}
    result = seats(*ask, "--figure", tmp_path / "kept")
    assert (tmp_path / "kept.png").stat().st_size > 10_000
    lines = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    early = next(words for name, words in lines.items() if "shallow" in name)
    assert [int(n) for n in early[-2:]] == [
        data[k]["tokens_per_layer"][0] for k in ("full", "pruned")
    ]
    assert "times faster" in result.stdout
    assert "--trr or --schedule" in refused("run", clip, "--question", "?", "--compare")


def test_frame_limits(capsys):
    "What was asked for, then the benchmark's, then a cap that is said aloud."
    from seats_analysis.cli.app import MAX_FRAMES, limits_of

    assert limits_of("mine.jsonl", None) == dict(fps=2.0, max_frames=MAX_FRAMES)
    assert "--max-frames" in capsys.readouterr().err
    assert limits_of("mine.jsonl", None, 1.0, 9) == dict(fps=1.0, max_frames=9)
    assert limits_of("testbed", None) == dict(fps=2.0, max_frames=None)
    assert capsys.readouterr().err == ""


def test_dtype_and_attention(clip):
    "In one line, also where a package for it is missing."
    ask = "run", clip, "--question", "?"
    assert "bfloat16" in refused(*ask, "--dtype", "int3")
    assert "sdpa, eager" in refused(*ask, "--attention", "fast")
    if importlib.util.find_spec("flash_attn") is None:
        assert "cannot be used" in refused(*ask, "--attention", "flash_attention_2")


def test_run_with_trr_solves_for_the_clip_and_prints_both(clip, profile, stubbed):
    result = seats(
        "run",
        clip,
        "--question",
        "what ?",
        "--trr",
        "10",
        "--profile",
        profile,
        "--late",
        "estimate",
        "--max-tokens",
        "2",
        "--model",
        "x/y",
    )
    assert (
        result.exit_code == 0
        and "(target 10 %)" in result.stdout
        and "visual" in result.stdout
        and "audio" in result.stdout
    )


def test_run_prints_what_was_kept(tmp_path, clip, profile, stubbed):
    "Not the target as if it were the result, and nothing about a modality that is not there."
    ask = [
        "run",
        clip,
        "--question",
        "what ?",
        "--max-tokens",
        "1",
        "--model",
        "testbed",
        "--profile",
        profile,
    ]
    least = json.loads(seats(*ask, "--trr", "0.1", "--json").stdout)
    assert (
        least["token_target"] == pytest.approx(0.001) and least["token_trr"] > 0.02
    )  # a token in every window
    assert (
        f"together {100 * least['token_trr']:.3g} % (target 0.1 %)"
        in seats(*ask, "--trr", "0.1").stdout
    )
    import av
    from seats_analysis.inputs.media import decode_clip

    with av.open(str(tmp_path / "sound.wav"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        wave = (decode_clip(clip).waveform * 32767).astype("int16")[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode()):
            out.mux(packet)
    heard = seats("run", tmp_path / "sound.wav", *ask[2:], "--trr", "10")
    assert (
        heard.exit_code == 0 and "kept      audio" in heard.stdout and "visual" not in heard.stdout
    ), heard.stdout


def test_published_pair_is_used_where_there_is_one():
    plans = answers.solve("Qwen/Qwen2.5-Omni-7B", (10.0, 12.0), (500, 100), late="certified")
    assert plans[10] == Schedule.published("qwen2.5-omni-7b", 10)
    assert abs(plans[12].token_trr(500, 100) - 0.12) < 1e-9 and plans[12].late_start == 23


# demo


@pytest.fixture
def demo(monkeypatch, tmp_path):
    "`seats demo` without its work: results that are made up, and the same ones committed."
    data = synthetic_profile(clips=64)
    data = data.assign(margin=data["correct"] * 2.0 - 1).assign_attrs(model="testbed")
    data = data.assign_coords(sample=[f"q{i}" for i in range(data.sizes["sample"])])
    bounds = {"both": find_boundaries(data, "both")}
    plans = {trr: Schedule.from_trr(bounds["both"], trr, 128, 80) for trr in demo_commands.TARGETS}
    rows = [dict(method="seats", trr=10, wrong=["q3", "q8"], accuracy=0.9, flops_fraction=0.1)]
    for part in ("profiles", "schedules", "results"):
        (tmp_path / part).mkdir()
    save_profile(data, tmp_path / "profiles" / "testbed.nc")
    for trr, plan in plans.items():
        plan.save(tmp_path / "schedules" / f"testbed_trr{trr}.json")
    (tmp_path / "results" / "testbed.json").write_text(
        json.dumps(dict(schema=SCHEMAS["results"].id, rows=rows))
    )

    def run(profile=data, bounds=bounds, plans=plans, rows=rows, folder=tmp_path):
        monkeypatch.setattr(demo_commands, "_demo", lambda *args: (profile, bounds, plans, rows))
        monkeypatch.setattr(demo_commands, "_demo_table", lambda rows: "")
        return seats("demo", "--out", tmp_path / "out", "--data", folder)

    return SimpleNamespace(run=run, profile=data, bounds=bounds, plans=plans, rows=rows)


def test_demo_agrees_with_another_machine(demo):
    noise = np.random.default_rng(0).normal(0, 1e-5, demo.profile["margin"].shape)
    result = demo.run(profile=demo.profile.assign(margin=demo.profile["margin"] + noise))
    assert (
        result.exit_code == 0
        and "DIFFERS" not in result.stdout
        and "agrees with what is committed" in result.stdout
    )


def test_numbers_beyond_the_tolerance_are_a_remark(demo):
    result = demo.run(profile=demo.profile.assign(margin=demo.profile["margin"] * 1.01))
    assert (
        result.exit_code == 0
        and "note     numbers: up to 0.01 nats apart (margin of q" in result.stdout
    )


def test_a_turned_answer_is_named(demo):
    turned = demo.profile.copy(deep=True)
    turned["correct"][5, 1, 3] = not turned["correct"][5, 1, 3]
    result = demo.run(profile=turned)
    assert (
        result.exit_code == 1
        and "DIFFERS  decisions: turned: q5 (audio removed before layer 4)" in result.stdout
        and "does NOT agree" in result.stdout
    )
    result = demo.run(rows=[demo.rows[0] | dict(wrong=["q3"])])
    assert result.exit_code == 1 and "DIFFERS  seats 10 %: turned: q8" in result.stdout


def test_a_moved_boundary_or_schedule_is_named(demo):
    moved = replace(demo.bounds["both"], late_start=demo.bounds["both"].late_start + 1)
    result = demo.run(bounds=dict(both=moved))
    assert result.exit_code == 1 and "DIFFERS  boundaries, both removed" in result.stdout
    other = demo.plans | {10: Schedule.from_trr(Boundaries(12, 4, 10), 10, 128, 80)}
    result = demo.run(plans=other)
    assert (
        result.exit_code == 1
        and "DIFFERS  schedule 10 %" in result.stdout
        and "agrees   schedule 15 %" in result.stdout
    )


def test_other_weights_do_not_agree_and_nothing_committed_is_said(demo, tmp_path):
    assert demo.run(profile=demo.profile.assign_attrs(weights_sha256="x")).exit_code == 1
    (tmp_path / "partly" / "profiles").mkdir(parents=True)
    save_profile(demo.profile, tmp_path / "partly" / "profiles" / "testbed.nc")
    assert "no results/testbed.json in " in demo.run(folder=tmp_path / "partly").stdout
    empty = demo.run(folder=tmp_path / "nowhere")
    assert (
        empty.exit_code == 0
        and "nothing to compare with" in empty.stdout
        and "agrees" not in empty.stdout
    )


def test_update_needs_all_questions_and_a_place():
    assert "--limit" in refused("demo", "--update", "--limit", "3")
    assert "--data" in refused("demo", "--update")


def test_the_demo_replaces_nothing_unasked(demo, tmp_path):
    there = tmp_path / "out" / "schedules" / "testbed_trr10.json"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    assert "testbed_trr10.json exists" in refused("demo", "--out", tmp_path / "out")


def test_the_other_processes_of_a_launch_may_come_late(tmp_path, monkeypatch):
    "The first has then written the result, which is theirs too."
    from seats_analysis.cli.app import check_new

    (tmp_path / "p.nc").write_text("done")
    with pytest.raises(ValueError, match="--overwrite"):
        check_new(tmp_path / "p.nc", False)
    monkeypatch.setattr("seats_analysis.cli.app.processes", lambda: (1, 2))
    check_new(tmp_path / "p.nc", False)


@pytest.mark.skipif(
    not (ROOT / "data" / "testbed" / "model.safetensors").exists(),
    reason="the testbed has no weights yet",
)
def test_demo_on_a_few_questions(tmp_path, monkeypatch):
    "All of it but the drawing, which is tested with the figures."
    from seats_analysis.lab import paper

    monkeypatch.setattr(paper, "make_figures", lambda data, out: drawn.append((data, out)))
    drawn, out = [], tmp_path / "demo"
    done = seats("demo", "--limit", 6, "--out", out, "--data", ROOT / "data", "--threads", 1)
    assert done.exit_code == 0 and "agrees" in done.stdout, done.stdout + done.stderr
    assert drawn == [(out, out / "figures")]
    jobs = paper.figure_jobs(out)
    assert {"testbed_dependency", "testbed_retention", "kept_testbed"} <= set(jobs)
    written = {
        p.relative_to(tmp_path / "demo").as_posix()
        for p in (tmp_path / "demo").rglob("*")
        if p.is_file()
    }
    assert {
        "profiles/testbed.nc",
        "results/testbed.json",
        "results/kept_testbed.json",
        *(f"schedules/testbed_trr{t}.json" for t in demo_commands.TARGETS),
    } <= written
    rows = json.loads((tmp_path / "demo" / "results" / "testbed.json").read_text())["rows"]
    assert [(r["method"], r["trr"]) for r in rows] == [
        ("full", 100),
        *(("seats", t) for t in demo_commands.TARGETS),
        ("random", 10),
    ]
