"""The command line: one line and exit 2 for bad input, nothing lost, results where they belong."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from conftest import ROOT
import numpy as np
import pytest
import typer.main
from clips import write_wav
from typer.testing import CliRunner

from seats_analysis import (
    Boundaries,
    Schedule,
    __version__,
    adapter_for,
    decode_clip,
    load_profile,
    read_samples,
)
from seats_analysis.cli import answers, app as shared
from seats_analysis.cli.main import app
from seats_analysis.evaluation.compare import made_from
from seats_analysis.storage.schemas import save_profile
from seats_analysis.testbed.load import write_samples, build_model, build_processor, fresh_samples
from seats_analysis.testbed.task import synthetic_profile

HEAVY = "torch transformers xarray matplotlib pandas scipy av seaborn h5netcdf".split()


def seats(line, *more, **places):
    "Run a command in this process. Bugs surface as exceptions."
    words = [word.format(**places) for word in line.split()] + [str(word) for word in more]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(line, *more, **places):
    "The one line of a command that must end with exit code 2 and nothing on stdout."
    result = seats(line, *more, **places)
    assert (result.exit_code, result.stdout) == (2, ""), (result.stdout, result.stderr)
    assert result.stderr.startswith("seats: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def done(line, *more, **places):
    "What a command that must succeed prints."
    result = seats(line, *more, **places)
    assert result.exit_code == 0, result.stderr + result.stdout
    return result


def outside(*args, **kw):
    "Run the console script in a process of its own."
    code = 'import sys; from seats_analysis.cli.main import main; sys.argv[0] = "seats"; main()'
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env=env, **kw)


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
    return build_model(layers=12).eval(), build_processor()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    "A JSONL with six questions on two real clips."
    folder = tmp_path_factory.mktemp("clips")
    samples = fresh_samples(6, per_clip=3, folder=folder)
    samples = [replace(s, split=("derive", "test")[i // 3]) for i, s in enumerate(samples)]
    return write_samples(samples, folder / "questions.jsonl")


@pytest.fixture
def clip(questions):
    return next(questions.parent.glob("*.mp4"))


@pytest.fixture
def stubbed(monkeypatch, model):
    "`load_model` gives the random model under any name."
    monkeypatch.setattr(shared, "check_model_name", lambda name, revision: {})
    monkeypatch.setattr(shared, "load_model", lambda *args, **options: model)


@pytest.fixture
def rows(questions):
    return [json.loads(line) for line in questions.read_text().splitlines()]


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# ---------------------------------------------------------------- help and start-up


def test_help():
    "Every command and every option says what it is for; no line is cut off or too wide."
    commands = typer.main.get_command(app).commands
    for name, command in {"": typer.main.get_command(app), **commands}.items():
        result = done(name, "--help")
        assert "Usage: " in result.stdout and result.stderr == ""
        shown = re.sub(r"\.\.\.`| \.\.\. |\]\.\.\.|clips}?\.\.\.", "", result.stdout)
        assert "..." not in shown, result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert not [p.name for p in command.params if not getattr(p, "help", "said elsewhere")]


def test_help_is_quick_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert outside("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds: the wall clock depends on the neighbours
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    code = f"import sys, seats_analysis.cli.main; print({set(HEAVY)!r} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == "set()", said.stderr


def test_version_and_bare_call():
    assert seats("--version").stdout.strip() == __version__
    assert "Commands:" in done("").stdout


# ---------------------------------------------------------------- bad input, line by line

UNLOADED = [  # what is refused before a model is loaded: command line, words of the answer
    ("prob", "No such command 'prob'"),
    ("probe --bogus", "--bogus"),
    ("probe --limit many", "--limit"),
    ("schedule", "Missing argument"),
    ("schedule {profile}", "--trr"),
    ("schedule {profile} --trr ten", "--trr"),
    ("run {clip}", "--question"),
    ("probe --device cpu", "No such option"),
    ("eval --json", "No such option"),
    # values that cannot be
    ("probe --layers 0:0", "--layers '0:0'"),
    ("probe --layers 99", "layer 99 is outside 0.."),
    ("probe --layers 0,-1", "layer -1 is outside 0.."),
    ("probe --removed vision", "'vision' is not one of visual, audio, both"),
    ("probe --removed both,both", "name each once"),
    ("eval --methods ,", "--methods: nothing named"),
    ("schedule {profile} --trr 10 --blocks 4", "--blocks '4': give the first layers"),
    ("schedule {profile} --trr 10 --blocks 4,99", "from 1 to 13, as 4,11"),
    ("schedule {profile} --trr 10 --late hope", "'hope'"),
    ("run {clip} --question ? --schedule x.json --trr 10", "not both"),
    ("run {clip} --question ? --compare", "--trr or --schedule"),
    ("run {clip} --question ? --choice low", "at least two choices"),
    ("flow --edges audio->words", "'words' is not one of visual, audio"),
    ("flow --edges audio", "'audio', expected 'source->target'"),
    ("flow --edges ,", "--edges: nothing named"),
    ("flow --window 2", "--window 2: give an odd number"),
    ("flow --out {profile} --overwrite", "is not a flow; choose another name"),
    # models and data
    ("probe --model nope", "unknown model 'nope'"),
    ("run {clip} --question ? --model a/b/c", "unknown model 'a/b/c'"),
    ("probe --model testbed@new", "testbed is here as it is"),
    ("probe --model nobody/nothing", "hf download nobody/nothing"),
    ("probe --model nobody/nothing@v1", "nobody/nothing' at v1 is not in the local cache"),
    ("probe --model {folder}", "no config.json"),
    ("schedule {profile} --trr 80 --late estimate", "ask for at most 66.6 %"),
    ("run {clip} --question ? --trr 10 --model Qwen/Qwen2-Audio-7B", "not in the local cache"),
    ("eval --profile {profile}", "12 layers"),
    ("run {clip} --question ? --trr 10 --profile {profile}", "12 layers"),
    ("run {clip} --question ? --schedule {plan}", "28 layers"),
    ("probe --data none.jsonl", "none.jsonl"),
    ("probe --data {lacking}", "line 3"),
    ("probe --data {lacking}", "answer"),
    ("run none.mp4 --question ?", "none.mp4"),
    ("run {text} --question ?", "text.mp4"),
    ("run {half} --question ?", "half.mp4"),
    # files
    ("boundaries none.nc", "none.nc"),
    ("boundaries {text}", "text.mp4"),
    ("schedule {other} --trr 10", "other.nc"),
    ("schedule {bare} --trr 10", "how many visual and audio tokens"),
    ("run {clip} --question ? --schedule none.json", "none.json"),
    ("run {clip} --question ? --schedule {deep}", "deep.json"),
    ("probe --out {folder}", "is a folder"),
    ("probe --out {text}/p.nc", "not a folder"),
    ("probe --out /proc/x.nc", "cannot write in /proc"),
    ("eval --out /proc/x.json", "cannot write in /proc"),
]


@pytest.mark.parametrize("line, says", UNLOADED)
def test_what_is_refused_before_a_model_is_loaded(
    line, says, profile, clip, rows, no_model, tmp_path, monkeypatch
):
    import xarray as xr

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "given"
    home.mkdir()
    places = dict(profile=profile, clip=clip, folder=home)
    for name in "text.mp4 half.mp4 deep.json other.nc bare.nc plan.json".split():
        places[name.split(".")[0]] = home / name
    places["lacking"] = questions = clip.parent / "lacking.jsonl"
    jsonl(questions, [*rows[:2], {k: v for k, v in rows[2].items() if k != "answer"}])
    places["text"].write_text("not a film")
    places["half"].write_bytes(clip.read_bytes()[:3000])
    places["deep"].write_text("[" * 100_000)
    xr.Dataset({"a": 1}).to_netcdf(places["other"], engine="h5netcdf")
    save_profile(synthetic_profile(clips=8), places["bare"])
    Schedule.published("qwen2.5-omni-7b", 10).save(places["plan"])
    before = set(tmp_path.rglob("*"))
    assert says in refused(line, **places)
    assert set(tmp_path.rglob("*")) == before


LONG = "1" + "0" * 400
ENDS = {  # numbers at their ends: command and option -> values
    "probe --layers": f"0:999999999999:1 0:{LONG} 0:0:1 -1 nan {LONG}",
    "probe --fps": "0 -1 1e308 nan inf -inf 1e999",
    "probe --max-frames": f"0 nan {LONG}",
    "probe --limit": f"0 999999999999 {LONG}",
    "boundaries testbed --tolerance": "nan inf",
    "schedule testbed --trr": "0 -5 100.1 1e308 nan inf",
    "schedule testbed --trr 10 --blocks": "nan,1 1,inf many 9 9,4 0,4 4,18",
    "run {clip} --question ? --trr": "0 -5 100.1 nan inf",
    "eval --trr": "0 nan inf 10,nan",
    "eval --seed": f"-1 {LONG}",
    "tune --budget": "inf nan 1e308 1001 1.4 -1",
    "tune --max-change": "nan",
    "tune --confidence": "nan",
    "check testbed/tuned --max-change": "nan",
    "check testbed/tuned --confidence": "nan",
}


@pytest.mark.parametrize("line", ENDS)
def test_numbers_at_their_ends(line, clip, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_ends(line, ENDS[line], clip=clip)
    assert not list(tmp_path.iterdir())


def check_ends(line, values, **places):
    "Every value of the option at the end of the line is refused in a short line that names it."
    for value in values.split():
        said = refused(f"{line}={value}", **places)
        named = line.split()[-1].strip("-") in said
        assert named and (len(said) < 250 or value == LONG), (value, said)


def test_weights_cut_off(clip, tmp_path, model):
    for part in model:
        part.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be read" in refused("run {c} --question ? --model {m}", c=clip, m=tmp_path)


def test_a_model_without_media(tmp_path):
    config = dict(model_type="bert", architectures=["BertModel"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused("probe --limit 1 --model {bert}", bert=tmp_path)
    assert "is no model of transformers that takes" in said


def test_a_revision_goes_to_the_loader(monkeypatch, clip):
    "`owner/name@revision`, and nothing else is cut at an @."
    found = []

    def load(name, **options):
        found.append((name, options["revision"]))
        raise ValueError("enough")

    monkeypatch.setattr(shared, "check_model_name", lambda *given: found.append(given) or {})
    monkeypatch.setattr(shared, "load_model", load)
    refused("run {c} --question ? --model owner/name@v1", c=clip)
    refused("run {c} --question ? --model owner/name", c=clip)
    assert found == [("owner/name", "v1")] * 2 + [("owner/name", None)] * 2


OWN = [
    "run {c} --question ? --trr 10",
    "eval --methods random --overwrite --data {d} --trr 35",
    "tune --data {d}",
]


@pytest.mark.parametrize("line", OWN)
def test_blocks_of_a_checkpoint_of_ones_own(line, questions, clip, profile, stubbed, tmp_path):
    """Where nothing says them, the command that measures them; else what it has written, which is
    said, of the same data if there is more; a schedule's own blocks are taken as well."""
    places = dict(c=clip, d=questions, t=tmp_path)
    data = questions if "{d}" in line else "QUESTIONS.jsonl"
    wanted = f"`seats probe --model '/ckpt/my sft' --data {data}` measures it"
    assert wanted in refused(line, "--model", "/ckpt/my sft", **places)
    for home, layers in dict(older=11, questions=12).items():
        made = tmp_path / "seats_out" / home / "profiles" / "my sft.nc"
        made.parent.mkdir(parents=True)
        stored = synthetic_profile({r: np.linspace(0, 1, layers + 1) for r in ("visual", "both")})
        save_profile(stored, made)
    said = seats(line, "--model", "/ckpt/my sft", **places).stderr
    assert "the blocks are those of seats_out/questions/profiles/my sft.nc; --profile" in said
    done("schedule {p} --trr 30 --blocks 4,9 --out plan.json", p=profile)
    line = re.sub("--trr [0-9]+", "", line) + " --schedule {t}/plan.json"
    said = seats(line, "--model", "/ckpt/my sft", **places).stderr
    assert "the blocks are" not in said and "is not known" not in said, said


def test_a_schedule_takes_part_as_it_is(questions, profile, stubbed, tmp_path):
    done("schedule {p} --trr 30 --blocks 4,9 --out plan.json", p=profile)
    line = "eval --data {d} --model m --methods random --schedule plan.json"
    done(line + " --out r.json", d=questions)
    rows = json.loads(Path("r.json").read_text())["rows"]
    share = 100 * Schedule.load("plan.json").token_trr(192, 40)
    assert [(r["label"], r["trr"]) for r in rows[1:]] == [
        ("seats", round(share, 1)), ("random", round(share, 1))
    ]  # fmt: skip
    assert rows[1]["knob"] == 1 and "not both" in refused(line + " --trr 10", d=questions)


STRANGE = "probe", "eval", "tune --max-change 90 --confidence 50", "check testbed/10", "flow"


@pytest.mark.parametrize("line", [*STRANGE, "run {c} --question 'What?' --choice a --choice cat"])
def test_what_the_testbed_cannot_read_is_refused(
    line, rows, questions, clip, tmp_path, monkeypatch
):
    "The words, what it can be asked, and where a real model goes; and nothing is written."
    monkeypatch.chdir(tmp_path)
    words = dict(question="What? red", choices=["a", "cat"], answer=0, lettered=False)
    data = jsonl(questions.parent / "strange.jsonl", [row | words for row in rows])
    given = () if line.startswith("run") else ("--data", data)
    if line.startswith("check"):
        given = *given, "--max-change", 90, "--confidence", 50
    result = seats(line.replace("'", ""), *given, c=clip)
    said = result.stderr.splitlines()[-1]
    assert (result.exit_code, result.stdout) == (2, ""), said
    assert "testbed does not know the words What?, a, cat: it can be asked 'what colour is" in said
    assert "--model DIR" in said and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_unknown_words_of_another_model_are_said_once(rows, questions, stubbed, tmp_path):
    rows = [r | dict(question=f"zebra {i} ?", lettered=False) for i, r in enumerate(rows)]
    share = 2 * len(rows) / sum(3 + len(" ".join(r["choices"]).split()) for r in rows)
    data = jsonl(questions.parent / "zebra.jsonl", rows)
    line = "probe --data {d} --layers 6 --removed both --out {t}/z.nc"
    said = done(line, d=data, t=tmp_path).stderr
    assert re.findall("does not know (.*) %", said) == [f"{100 * share:.3g}"], said


# ---------------------------------------------------------------- broken clips


@pytest.fixture
def broken(questions, rows, tmp_path_factory):
    "The six questions, and five more on clips that are broken in five ways."
    folder = tmp_path_factory.mktemp("broken")
    for row in rows:
        shutil.copy(questions.parent / row["video"], folder)
    whole = (folder / rows[0]["video"]).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film")
    write_wav(folder / "sound.wav", np.zeros(16000))
    names = "nowhere.mp4 cut.mp4 empty.mp4 text.mp4 sound.wav".split()
    bad = [rows[0] | dict(id=name, video=name) for name in names]
    return jsonl(folder / "broken.jsonl", [*rows[:3], *bad, *rows[3:]])


@pytest.mark.parametrize("command", ["probe", "eval --trr 35"])
def test_broken_clips_are_named_all_at_once(command, broken, no_model, tmp_path):
    result = seats(command + " --data {d} --out {t}/x.json", d=broken, t=tmp_path)
    first, *lines = result.stderr.splitlines()
    assert result.exit_code == 2 and "5 broken clips" in first and "--allow broken" in first
    for number, name in enumerate("nowhere cut empty text sound".split(), 4):
        line = lines[number - 4]
        assert f"broken.jsonl, line {number}: " in line and name in line, line
    assert len(lines) == 5 and not list(tmp_path.iterdir())


def test_many_broken_clips_are_counted(broken, rows, no_model):
    jsonl(broken, [rows[3] | dict(id=str(i), video=f"gone{i}.mp4") for i in range(25)])
    said = seats("probe --data {d}", d=broken).stderr
    assert "25 broken clips" in said and "and 15 more" in said and len(said.splitlines()) == 12


def test_skip_broken_goes_on_and_counts_them(broken, stubbed, tmp_path):
    line = "probe --data {d} --allow broken --out {t}/p.nc --layers 0,6 --removed both"
    assert "5 questions on 5 broken clips are left out" in done(line, d=broken, t=tmp_path).stdout
    profile = load_profile(tmp_path / "p.nc")
    assert profile.sizes["sample"] == 6 and len(json.loads(profile.attrs["broken"])) == 5


# ---------------------------------------------------------------- nothing is lost


def test_interrupt_and_bug(questions, tmp_path, monkeypatch):
    "An interrupt is one line and 130; a bug keeps its traceback."

    def stop(error):
        def load(*args, **options):
            raise error

        monkeypatch.setattr(shared, "load_model", load)
        return seats("probe --data {d} --out {t}/p.nc", d=questions, t=tmp_path)

    result = stop(KeyboardInterrupt())
    assert (result.exit_code, result.stderr, result.stdout) == (130, "seats: interrupted\n", "")
    with pytest.raises(RuntimeError, match="a bug"):
        stop(RuntimeError("a bug"))


def test_the_other_processes_of_a_launch_may_come_late(tmp_path, monkeypatch):
    "The first has then written the result, which is theirs too."
    (tmp_path / "p.nc").write_text("done")
    with pytest.raises(ValueError, match="--overwrite"):
        shared.writable(tmp_path / "p.nc")
    monkeypatch.setattr(shared, "processes", lambda: (1, 2))
    shared.writable(tmp_path / "p.nc")


# ---------------------------------------------------------------- boundaries and schedules


def test_boundaries_prints_layers_from_one(profile):
    head, _, *lines = done("boundaries {p}", p=profile).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["visual", "audio", "both"]
    assert "late starts (95 %)" in head
    stored = json.loads(done("boundaries {p} --json", p=profile).stdout)["both"]
    low, high = stored["late_start_ci"]
    end = high + 1 if high < stored["num_layers"] else "end"
    assert f"{stored['late_start'] + 1} ({low + 1} to {end})" in lines[2]
    assert lines[2].split()[1:4] == ["1", "to", str(stored["shallow_end"])]


def test_families_of_a_profile_that_names_none(profile):
    bare = load_profile(profile)
    bare = bare.assign_coords(family=("sample", [""] * bare.sizes["sample"])).assign_attrs(needs="")
    save_profile(bare, "bare.nc")
    result = done("boundaries bare.nc --families")
    assert len(result.stdout.splitlines()) == 5 and "one family" in result.stderr
    stored = json.loads(done("boundaries bare.nc --families --json").stdout)
    assert stored["both"]["by_family"] == {}


@pytest.mark.parametrize("trr", [35, 10, 100])
def test_schedule_meets_its_target_and_prints_both_ratios(profile, trr):
    said = done("schedule {p} --late estimate --out plan.json --trr", trr, p=profile).stdout
    plan = Schedule.load("plan.json")
    assert abs(plan.token_trr(128, 80) - trr / 100) < 1e-9
    visual, audio = (f"{100 * plan.trr[m]:.3g} %" for m in ("visual", "audio"))
    assert f"visual {visual}, audio {audio}" in said
    derived = (plan.late_start, plan.evidence["kind"]) == (8, "derived")
    assert plan.keeps_all if trr == 100 else derived


def test_schedule_takes_the_estimate_and_says_so(profile):
    "Its default file, and one note wherever estimate and certificate differ."
    result = done("schedule {p} --trr 10", p=profile)
    made = "seats_out/made-up/schedules/made-up_trr10.json"
    assert Schedule.load(made).late_start == 8
    said = "note: late block: layer 9 of 12, estimate; certified: none (64 clips"
    assert result.stderr.startswith(said) and result.stderr.count("note: late block") == 1
    assert "made-up_trr10.json exists" in refused("schedule {p} --trr 10", p=profile)
    careful = done("schedule {p} --trr 10 --overwrite --late certified", p=profile)
    assert Schedule.load(made).late_start == 12
    assert "certified; estimate: layer 9 of 12" in careful.stderr
    sure = synthetic_profile(clips=800).assign_attrs(load_profile(profile).attrs)
    save_profile(sure, "sure.nc")
    assert "late block: " not in done("schedule sure.nc --trr 10").stderr


def test_no_drops_are_announced_where_stage_two_keeps_everything(profile):
    "A late block so early that the scale moves to where nothing may be dropped."
    curve = np.r_[np.zeros(2), np.full(2, 0.5), np.ones(9)]
    early = synthetic_profile({m: curve for m in ("visual", "audio", "both")}, clips=64)
    save_profile(early.assign_attrs(tokens=load_profile(profile).attrs["tokens"]), "early.nc")
    result = done("schedule early.nc --trr 10 --out plan.json")
    assert "drops     none" in result.stdout and "stage II drops nothing" in result.stderr
    assert Schedule.load("plan.json").drop_layers == ()


def test_schedule_of_other_weights_or_of_another_model(profile, clip, stubbed, model):
    "Both are used, and both are warned of; the model's own schedule is not."
    stored = load_profile(profile)
    for weights, name, warns in (
        (adapter_for(model[0]).hash_weights(model[0]), "other", None),
        ("0" * 64, "other", "made for other weights"),
        ("", "owner/other", "made for owner/other, and the model is mine"),
        ("", "owner/Mine", None),
    ):
        stored.attrs |= dict(weights_sha256=weights, model=name)
        save_profile(stored, "p.nc")
        done("schedule p.nc --trr 10 --out plan.json --overwrite")
        with patch.object(type(adapter_for(model[0])), "name", lambda self, model: "mine"):
            line = "run {c} --question ? --schedule plan.json --max-tokens 1"
            said = done(line, c=clip).stderr
        assert (warns in said) if warns else ("made for" not in said)


# ---------------------------------------------------------------- probe, run, eval


def test_probe_writes_a_profile_that_schedule_understands(questions, tmp_path, stubbed):
    line = "probe --model any --data {d} --limit 4 --layers 0:12:6 --removed both --out {t}/p.nc"
    assert "4 questions on" in done(line, d=questions, t=tmp_path).stdout
    stored = load_profile(tmp_path / "p.nc")
    assert stored["layer"].values.tolist() == [0, 6, 12]
    assert stored["removed"].values.tolist() == ["both"]
    assert json.loads(stored.attrs["tokens"]).items() >= dict(visual=192, audio=40).items()


def test_questions_without_answers_are_probed(questions, rows, tmp_path, stubbed):
    "Only the divergence is measured; boundaries say why they cannot be had."
    rows = [{k: row[k] for k in row.keys() - {"lettered", "choices", "answer"}} for row in rows]
    data = jsonl(questions.parent / "bare.jsonl", rows)
    line = "probe --data {d} --layers 6 --removed both --out {t}/bare.nc"
    said = done(line, d=data, t=tmp_path).stdout
    assert "none with choices, so only the divergence is measured" in said
    assert "no chosen question has choices" in refused("boundaries {t}/bare.nc", t=tmp_path)


RUN = "run {c} --question what --model testbed --max-tokens 2 "


def test_run_answers_with_and_without_pruning(tmp_path, clip, stubbed):
    Schedule.from_trr(Boundaries(12, 4, 9), 10, 192, 40).save(tmp_path / "plan.json")
    full = json.loads(done(RUN + "--json", c=clip).stdout)
    assert full["flops_fraction_causal_with_selection"] == 1
    assert full["tokens"]["visual"] == 192 and "trr" not in full
    more = "--json --schedule {t}/plan.json --choice low --choice high"
    pruned = json.loads(done(RUN + more, c=clip, t=tmp_path).stdout)
    assert pruned["flops_fraction_causal_with_selection"] < 0.5
    assert abs(pruned["token_target"] - 0.1) < 1e-9
    text, layers = pruned["tokens"]["text"], pruned["tokens_per_layer"]
    media = np.mean(layers) - text  # what ran, not what was asked for
    assert abs(pruned["token_trr"] - media / 232) < 1e-9 and abs(pruned["token_trr"] - 0.1) > 1e-3
    assert layers[-1] == text and abs(sum(pruned["choices"].values()) - 1) < 1e-6


def test_run_compares_full_and_pruned(clip, profile, stubbed):
    line = RUN + "--profile {p} --trr 10 --compare"
    data = json.loads(done(line + " --choice low --choice high --json", c=clip, p=profile).stdout)
    full, pruned = data["full"], data["pruned"]
    assert full["flops_fraction_causal_with_selection"] == 1
    assert pruned["flops_fraction_causal_with_selection"] < 1
    assert full["choices"].keys() == {"low", "high"}
    said = done(line, c=clip, p=profile).stdout
    early = next(row.split() for row in said.splitlines() if "shallow" in row)
    assert [int(n) for n in early[-2:]] == [a["tokens_per_layer"][0] for a in (full, pruned)]
    assert "times as fast" in said and "FLOPs (causal, with selection)" in said


def test_run_prints_what_was_kept(tmp_path, clip, profile, stubbed):
    "Not the target as if it were the result, and nothing about a modality that is not there."
    line = RUN + "--profile {p} --trr 0.1"
    least = json.loads(done(line + " --json", c=clip, p=profile).stdout)
    assert least["token_target"] == pytest.approx(0.001)
    assert least["token_trr"] > 0.02  # a token in every window
    said = done(line, c=clip, p=profile).stdout
    assert f"together {100 * least['token_trr']:.3g} % (target 0.1 %)" in said
    write_wav(tmp_path / "sound.wav", decode_clip(clip).waveform)
    heard = done(RUN + "--profile {p} --trr 10", c=tmp_path / "sound.wav", p=profile).stdout
    assert "kept      audio" in heard and "visual" not in heard, heard


def test_a_cap_of_frames_is_said_aloud(capsys):
    found = shared.limits_of("mine.jsonl", None)
    assert found == dict(fps=2.0, max_frames=shared.MAX_FRAMES)
    assert "--max-frames" in capsys.readouterr().err
    assert shared.limits_of("mine.jsonl", None, 1.0, 9) == dict(fps=1.0, max_frames=9)
    assert capsys.readouterr().err == ""


def test_eval_does_not_conclude_from_few_clips(profile, questions, stubbed):
    "It says how many it takes, that the questions made the schedule, and shows progress early."
    done("probe --data {d} --layers 0,6 --removed both --out p.nc", d=questions)
    same = made_from(read_samples(questions), "p.nc")
    assert same == 3  # of six: the other three are of the split `test`
    line = "eval --data {d} --trr 35 --methods random --profile {p} --out r.json"
    result = done(line, d=questions, p=profile)
    found = json.loads(Path("r.json").read_text())
    text = answers._eval_text(found | dict(questions_of_schedule=same), "r.json")
    assert "too few for a conclusion: no difference can be significant below 6 clips" in text
    assert "3 of the questions are on clips that made the schedules" in text
    assert found["batch_size"] == 1 and found["broken"] is None and "--profile" in found["command"]
    assert "equal cost" in result.stderr and "/6 [" in result.stderr  # six questions
