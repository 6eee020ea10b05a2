"A certificate goes with its plan, its model and its own fields, or it goes."

import json
import math
from copy import deepcopy
from dataclasses import replace

from conftest import ROOT
import pytest
import tiny
from test_cli import refused

from seats_analysis import Promise, Schedule
from seats_analysis.cli import answers
from seats_analysis.schedules.schedule import ScheduleWarning
from seats_analysis.tuning.check import verdict_on

TUNED, OTHER = (
    json.loads((ROOT / "data" / "schedules" / f"{name}_tuned.json").read_text())
    for name in ("testbed", "testbed-qwen3")
)
CHAIN = ROOT / "data" / "results" / "tune_testbed.json"
PROOF = TUNED["evidence"]["certificate"]
GONE = object()


def edited(data, place, value):
    "A copy with one value changed or gone; `place` as promise.max_change or rows.0.cost."
    data = deepcopy(data)
    *above, last = (int(k) if k.isdigit() else k for k in place.split("."))
    inner = data
    for key in above:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return data


# ---------------------------------------------------------------- a schedule file

KNOWN = PROOF["known_clips"]
WRONG = {
    "known_clips": ("abc", 7, [], [KNOWN], KNOWN[1:]),
    "promise": (0.02,),
    "promise.max_change": (0, 0.5, math.nan, "0.02"),
    "promise.confidence": (GONE,),
    "promise.more": (1,),
    "mix.families": (GONE,),
    "mix.tokens": (GONE,),
    "mix.tokens.visual": (GONE,),
    "mix.families.colour": (50, None),
    "cost": (0.3,),
    "p": (True,),
    "clips": (596.5,),
    "sha256": ("0" * 64,),
    "plan_sha256": (OTHER["evidence"]["certificate"]["plan_sha256"],),
    "more": (1,),
}
CASES = [(f"certificate.{name}", GONE) for name in PROOF]
CASES += [(f"certificate.{place}", value) for place in WRONG for value in WRONG[place]]
CASES += [("certificate", value) for value in ({}, "yes", OTHER["evidence"]["certificate"])]
CASES += [("weights_sha256", value) for value in (OTHER["evidence"]["weights_sha256"], GONE)]
CASES = [(f"evidence.{place}", value) for place, value in CASES]
CASES += [("temperature", 0.5), ("query", "text"), ("windows.visual_grids", 5)]
CASES += [("weighted", not TUNED["weighted"])]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("place, value", CASES)
def test_a_changed_certificate_or_plan_is_refused_when_it_is_read(tmp_path, place, value):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(edited(TUNED, place, value)))
    said = refused("check", file)
    assert f"{file} is not a usable schedule: `evidence" in said


def test_a_certificate_survives_other_writers_and_older_plans_without_one_load(tmp_path):
    file = tmp_path / "t.json"
    for data in (json.dumps(TUNED, sort_keys=True), json.dumps(TUNED).replace("192.0", "192")):
        file.write_text(data)
        assert Schedule.load(file).certificate == Schedule.load("testbed/tuned").certificate
    file.write_text(json.dumps(edited(TUNED, "evidence.certificate", GONE)))
    assert Schedule.load(file).certificate is None


# ---------------------------------------------------------------- a plan in Python


ANEW = dict(trr=None, scale=None)  # computed
CHANGES = [
    dict(num_layers=17, **ANEW),
    dict(shallow_end=5, drop_layers=(5,), keep_ratios=tiny.ratios((0.5,), (1.0,)), **ANEW),
    dict(late_start=15, **ANEW),
    dict(entering=tiny.ratios(0.5, 0.5), **ANEW),
    dict(temperature=0.7),
    dict(query="text"),
    dict(weighted=not TUNED["weighted"]),
    dict(windows=dict(visual_grids=5, seconds=8.0)),
    dict(evidence=OTHER["evidence"]),
    dict(evidence=TUNED["evidence"] | dict(weights_sha256="0" * 64)),
]


@pytest.mark.parametrize("change", [(0.05,), (0.5, 0.1), *CHANGES], ids=str)
def test_another_plan_has_no_certificate_and_says_so(tmp_path, change):
    "Other fields, or so many times the tokens."
    other = Schedule.load("testbed/tuned")
    with pytest.warns(ScheduleWarning, match="was for another plan and is gone"):
        if isinstance(change, dict):
            other = replace(other, **change)
        else:
            for times in change:
                other = other.times(times)
    assert other.certificate is None
    other.save(tmp_path / "t.json")
    assert Schedule.load(tmp_path / "t.json") == other


# ---------------------------------------------------------------- what a check says

MEASURED = {k: PROOF[k] for k in ("answers", "clips", "questions", "mix", "data")}
MEASURED["weights_sha256"] = TUNED["evidence"]["weights_sha256"]


@pytest.mark.parametrize(
    "changed, held, promise, result, said",
    [
        (0.01, 0, (), {}, "stands: at most 2 %"),
        (0.01, 0, (), dict(clips=149), "stands: at most 2 %"),
        (0.0, 0, (), dict(clips=148), "too few to tell: 148 clips, it takes 149"),
        (0.0, 0, (), dict(clips=4), "too few to tell: 4 clips, it takes 149"),
        (0.03, 0, (), {}, "not shown: at most 2 %"),
        (0.01, 0, (0.015,), {}, "not shown: at most 1.5 %"),
        (0.01, 0, (0.05,), {}, "not shown: at most 5 %"),
        (0.01, 0, (0.02, 0.99), {}, "not shown: at most 2 %"),
        (0.01, 1, (0.05,), {}, "holds: at most 5 %"),
        (0.01, 0, (), dict(weights_sha256="0" * 64), "refused: another model, or other"),
        (0.01, 0, (), dict(answers="token"), "refused: answers by token"),
        (0.01, 0, (), dict(mix=edited(PROOF["mix"], "tokens.audio", 90.0)), "refused: 90"),
    ],
)
def test_only_the_promise_of_the_file_stands_and_with_enough_clips(
    changed, held, promise, result, said
):
    result = MEASURED | result
    result["chains"] = dict(given=dict(held=held, rows=[dict(changed=changed)]))
    plan = Schedule.load("testbed/tuned")
    good, text = verdict_on(result, Promise(*promise), plan)
    assert text.startswith(said) and good == (said.split(":")[0] in ("stands", "holds"))
    n = PROOF["questions"], result["questions"]
    pooled = (PROOF["changed"] * n[0] + changed * n[1]) / sum(n)
    assert (f"{100 * pooled:.2f} % of {sum(n):,} with" in text) != text.startswith("refused")
    if good and not held:  # another plan never stands
        with pytest.warns(ScheduleWarning):
            plan = plan.times(0.05)
        good, text = verdict_on(result, Promise(*promise), plan)
        assert not good and text.startswith("not shown")


# ---------------------------------------------------------------- the evidence of a search

ROW = "chains.tuned.rows.3"
FIELDS = [
    *(f"{ROW}.{name}" for name in "cost changed p losses schedule method settings".split()),
    *"promise mix known_clips method search chains one_question_a_clip clips".split(),
    *"chains.tuned chains.tuned.held chains.tuned.rows promise.confidence".split(),
    *"mix.families mix.tokens search.0.kl search.0.fixed".split(),
]
BAD = [(place, value) for place in FIELDS for value in (GONE, "abc", [], math.nan)]
BAD = [case for case in BAD if case not in ((f"{ROW}.method", "abc"), ("method", "abc"))]  # texts
BAD += [(f"{ROW}.losses.0", 2), ("known_clips", {}), ("promise", {}), ("chains", {})]
RATHER = [  # only where plans are made
    (f"{ROW}.method", "nobody"),
    (f"{ROW}.settings", dict(nothing=1)),
    (f"{ROW}.schedule.temperature", 0),
    (f"{ROW}.schedule.temperature", GONE),
    (f"{ROW}.losses", [0.0]),
    ("promise.max_change", 0.5),
    ("promise.max_change", 0),
    ("chains.tuned.held", 9),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("place, value", [*BAD, *RATHER])
def test_a_search_without_its_fields_is_refused_in_one_line(tmp_path, place, value):
    file = tmp_path / "results" / "tune_t.json"
    file.parent.mkdir()
    file.write_text(json.dumps(edited(json.loads(CHAIN.read_text()), place, value)))
    said = refused("check", file, "--out", tmp_path / "c.json")
    assert f"{file} is not a tuned chain: " in said
    with pytest.raises(ValueError) as error:
        answers._tuned([file])
    assert f"seats: {error.value}\n" == said
