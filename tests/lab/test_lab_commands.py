"""Commands of the laboratory: their numbers at their ends, and what a demo says of its results."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import LONG, ROOT, check_ends, done, refused, seats
from test_wheel import TINY

from seats_analysis import Boundaries, Schedule, find_boundaries
from seats_analysis.lab import demo as demo_commands, paper
from seats_analysis.storage.schemas import SCHEMAS, save_profile
from seats_analysis.testbed.task import synthetic_profile

ENDS = {  # numbers at their ends: command and option -> values
    "simulate --sizes": f"0 99999999999 {LONG} nan",
    "simulate --trials": "0 999999999999",
    "sample-size --sizes": "-1 99999999999",
    "sample-size --trials": "999999999999",
    "transfer --trr": "0 nan",
    "bench --width": "0 -1 999999999999",
    "bench --frames": "0 -1 999999999999 1000000000",
    "bench --seconds": "0 nan inf 1e308 1e12",
    "bench --batch": "0 999999999999 nan",
    "bench --trr": "nan",
    "bench --scaling": "0 999999999999",
    "bench --repeats": "0 999999999999",
}


@pytest.mark.parametrize("line", ENDS)
def test_numbers_at_their_ends(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_ends(line, ENDS[line])
    assert not list(tmp_path.iterdir())


WORKS = {  # what makes each command quick where a number is good
    "probe": "--limit 2 --layers 0,5",
    "boundaries": "testbed",
    "schedule": "testbed --trr 10",
    "simulate": "--trials 1 --sizes 25",
    "sample-size": "--trials 2 --sizes 25",
    "run": "{clip} --question x --trr 10 --max-tokens 2",
    "eval": "--methods seats,random --trr 10 --limit 2",
    "transfer": "--limit 2",
    "bench": "--config testbed --frames 8 --seconds 4 --methods seats --trr 10 --repeats 1",
    "train-testbed": "--config tiny.json",
    "demo": "--limit 6",
}
LISTS = (
    "probe --layers, simulate --sizes, sample-size --sizes, eval --trr, bench --trr, bench --batch"
)


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORKS)
def test_every_number_of_every_command(name, tmp_path, monkeypatch):
    "It is refused in one line, or works, within 20 seconds of CPU."
    from signal import ITIMER_PROF, SIGPROF, setitimer, signal

    def too_late(*_):
        raise TimeoutError

    def demo_of_all(*_):
        raise ValueError("the demo itself takes its time")

    clip = next((ROOT / "data" / "testbed" / "clips").glob("*.mp4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_commands, "_demo", demo_of_all)
    Path("tiny.json").write_text(json.dumps(TINY))
    numbers = re.findall(r"(--[\w-]+) +<?(?:int|float)", seats(name, "--help").stdout, re.I)
    numbers += re.findall(rf"(?<!-)\b{name} (--[\w-]+)", LISTS)
    before = signal(SIGPROF, too_late)
    for option in numbers:
        words = WORKS[name].format(clip=clip).split()
        if option in words:
            del words[(at := words.index(option)) : at + 2]
        for value in ("0", "-1", "1e308", "nan", "inf", "1000000000000", LONG):
            shutil.rmtree("seats_out", ignore_errors=True)
            setitimer(ITIMER_PROF, 20)
            result = seats(name, *words, f"{option}={value}")
            setitimer(ITIMER_PROF, 0)
            said = (result.stderr.splitlines() or [""])[-1]
            refused_well = result.exit_code == 2 and said.startswith("seats: ")
            assert result.exit_code == 0 or refused_well, (option, value, result.stderr)
    signal(SIGPROF, before)


@pytest.fixture
def demo(monkeypatch, tmp_path):
    "`seats demo` without its work: results that are made up, and the same ones committed."
    data = synthetic_profile(clips=64)
    data = data.assign(margin=data["correct"] * 2.0 - 1).assign_attrs(model="testbed")
    data = data.assign_coords(sample=[f"q{i}" for i in range(data.sizes["sample"])])
    bounds = {"both": find_boundaries(data, "both")}
    plans = {trr: Schedule.from_trr(bounds["both"], trr, 128, 80) for trr in demo_commands.TARGETS}
    rows = [dict(method="seats", trr=10, wrong=["q3", "q8"], accuracy=0.9)]
    rows[0]["flops_fraction_causal_without_selection"] = 0.1
    for part in ("profiles", "schedules", "results"):
        (tmp_path / part).mkdir()
    save_profile(data, tmp_path / "profiles" / "testbed.nc")
    for trr, plan in plans.items():
        plan.save(tmp_path / "schedules" / f"testbed_trr{trr}.json")
    stored = dict(schema=SCHEMAS["results"].id, rows=rows)
    (tmp_path / "results" / "testbed.json").write_text(json.dumps(stored))

    def run(profile=data, bounds=bounds, plans=plans, rows=rows, folder=tmp_path):
        monkeypatch.setattr(demo_commands, "_demo", lambda *args: (profile, bounds, plans, rows))
        monkeypatch.setattr(demo_commands, "_demo_table", lambda rows: "")
        monkeypatch.setattr(demo_commands, "shipped_folder", lambda name: folder / name)
        return seats("demo", "--out", tmp_path / "out")

    return SimpleNamespace(run=run, profile=data, bounds=bounds, plans=plans, rows=rows)


@pytest.mark.parametrize(
    "change, code, says",
    [
        (lambda m: m + np.random.default_rng(0).normal(0, 1e-5, m.shape), 0, "agrees with what is"),
        (lambda m: m * 1.01, 0, "note     numbers: up to 0.01 nats apart (margin of q"),
    ],
)
def test_numbers_of_another_machine(demo, change, code, says):
    result = demo.run(profile=demo.profile.assign(margin=change(demo.profile["margin"])))
    assert result.exit_code == code and says in result.stdout and "DIFFERS" not in result.stdout


def test_what_differs_is_named(demo):
    turned = demo.profile.copy(deep=True)
    turned["correct"][5, 1, 3] = not turned["correct"][5, 1, 3]
    moved = replace(demo.bounds["both"], late_start=demo.bounds["both"].late_start + 1)
    other = demo.plans | {10: Schedule.from_trr(Boundaries(12, 4, 10), 10, 128, 80)}
    for given, says in (
        (dict(profile=turned), "decisions: turned: q5 (audio removed before layer 4)"),
        (dict(rows=[demo.rows[0] | dict(wrong=["q3"])]), "seats 10 %: turned: q8"),
        (dict(bounds=dict(both=moved)), "boundaries, both removed"),
        (dict(plans=other), "schedule 10 %"),
    ):
        result = demo.run(**given)
        assert result.exit_code == 1 and f"DIFFERS  {says}" in result.stdout
        assert "does NOT agree" in result.stdout and "agrees   schedule 15 %" in result.stdout


def test_other_weights_do_not_agree_and_nothing_committed_is_said(demo, tmp_path):
    assert demo.run(profile=demo.profile.assign_attrs(weights_sha256="x")).exit_code == 1
    (tmp_path / "partly" / "profiles").mkdir(parents=True)
    save_profile(demo.profile, tmp_path / "partly" / "profiles" / "testbed.nc")
    assert "no results/testbed.json in " in demo.run(folder=tmp_path / "partly").stdout
    empty = demo.run(folder=tmp_path / "nowhere")
    assert empty.exit_code == 0 and "agrees" not in empty.stdout
    assert "nothing to compare with" in empty.stdout


def test_the_demo_replaces_nothing_unasked(demo, tmp_path):
    there = tmp_path / "out" / "schedules" / "testbed_trr10.json"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    assert "testbed_trr10.json exists" in refused("demo", "--out", tmp_path / "out")


@pytest.mark.skipif(
    not (ROOT / "data" / "testbed" / "model.safetensors").exists(),
    reason="the testbed has no weights yet",
)
def test_demo_on_a_few_questions(tmp_path, monkeypatch):
    "All of it but the drawing, which is tested with the figures."
    drawn = []
    monkeypatch.setattr(paper, "make_figures", lambda data, out: drawn.append((data, out)))
    out = tmp_path / "demo"
    said = done("demo --limit 6 --out {o} --data {d}", o=out, d=ROOT / "data").stdout
    assert "agrees" in said and drawn == [(out, out / "figures")]
    jobs = paper.figure_jobs(out)
    assert {"testbed_dependency", "testbed_retention", "kept_testbed"} <= set(jobs)
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(demo_commands._files("testbed")) <= written
    rows = json.loads((out / "results" / "testbed.json").read_text())["rows"]
    plans = [("seats", t) for t in demo_commands.TARGETS]
    found = [(r["method"], r["trr"]) for r in rows]
    assert found == [("full", 100), *plans, ("random", 10)]


@pytest.mark.parametrize("command", ["simulate", "sample-size", "transfer"])
def test_outputs_of_studies_do_not_replace_their_profile(command, tmp_path):
    stored = tmp_path / "p.nc"
    shutil.copy(ROOT / "data" / "profiles" / "testbed.nc", stored)
    before = stored.read_bytes()
    assert "exists and is not a" in refused(command, "--profile", stored, "--out", stored)
    assert stored.read_bytes() == before


def stored_search(folder, change):
    "A folder of results with the testbed's search, changed."
    found = json.loads((ROOT / "data" / "results" / "tune_testbed.json").read_text())
    change(found)
    (folder / "results").mkdir()
    path = folder / "results" / "tune_t.json"
    path.write_text(json.dumps(found))
    return path


def test_a_search_without_its_fields_is_not_drawn(tmp_path):
    path = stored_search(tmp_path, lambda found: found.pop("promise"))
    said = refused("figures", "--data", tmp_path, "--out", tmp_path / "figures")
    assert f"{path} is not a tuned chain: " in said


def test_a_chain_of_another_name_is_drawn(tmp_path):
    def change(found):
        found["chains"]["mine"] = found["chains"]["tuned"]

    stored_search(tmp_path, change)
    assert "tune_t.png" in seats("figures", "--data", tmp_path, "--out", tmp_path / "f").stdout
