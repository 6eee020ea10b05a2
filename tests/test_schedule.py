"""The schedules that are shipped, and the solver on random plans. Parity with the recorded reference is in test_golden.py."""
import csv
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seats_analysis.agreement import same_plan
from seats_analysis.boundaries import Boundaries
from seats_analysis.schedule import MAX_STRENGTH, PUBLISHED, Schedule, feasible_scales, solve_keep_ratios, solve_trr

ROOT = Path(__file__).resolve().parents[1]


def test_shipped_files_are_the_published_plans():
    for name, setting in PUBLISHED.items():
        for trr in setting["pairs"]:
            shipped = Schedule.load(ROOT / "data" / "schedules" / f"{name}_trr{trr}.json")
            assert same_plan(shipped, Schedule.published(name, trr))


def test_published_constants_equal_the_reported_table():
    with open(ROOT / "data" / "reported" / "schedules.csv", newline="") as file: rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(setting["pairs"]) for setting in PUBLISHED.values())
    for row in rows:
        plan = Schedule.published(row["model"], int(row["label"]))
        assert (plan.num_layers, plan.shallow_end, plan.late_start) == (int(row["num_layers"]), int(row["shallow_end"]), int(row["late_start"]) - 1)
        assert plan.drop_layers == tuple(map(int, row["drop_after_layers"].split("-")))  # after 1-based layer d = before 0-based layer d
        assert plan.trr == {"visual": float(row["visual_trr"]), "audio": float(row["audio_trr"])}
        assert (plan.temperature, plan.scale) == (float(row["temperature"]), pytest.approx(float(row["scale"])))


@st.composite
def plans(draw):
    """Layers, drops, late start and a reachable target."""
    layers = draw(st.integers(2, 96))
    late = draw(st.integers(1, layers))
    drops = sorted(draw(st.sets(st.integers(1, max(late - 1, 1)), max_size=5))) if late > 1 else []
    return layers, drops, late, draw(st.floats(0.005, late / layers))


@settings(max_examples=300, deadline=None)
@given(plans(), st.floats(1.0, 3.0))
def test_any_solved_plan_averages_its_target(plan, scale):
    layers, drops, late, target = plan
    solved = Schedule.solve(layers, drops, late, visual=target, audio=target, scale=scale)
    if target == 1.0:
        assert solved.keeps_all
        return
    assert solved.average_trr() == pytest.approx({"visual": target, "audio": target}, abs=1e-9)
    assert all(0 < ratio <= 1 for ratio in solved.keep_ratios["visual"]) and solved.entering["visual"] <= 1
    assert all(a >= b for a, b in zip(solved.levels("visual"), solved.levels("visual")[1:]))


@settings(max_examples=200, deadline=None)
@given(plans(), st.floats(0.0, 1.0))
def test_every_scale_in_the_feasible_range_is_solved_as_asked(plan, where):
    layers, drops, late, target = plan
    low, high = feasible_scales(target, drops, late, layers)
    entering = min(target * (low + where * (high - low)), 1.0)
    ratios = solve_keep_ratios(target, entering, drops, late, layers)
    assert math.prod(ratios) >= 1 - MAX_STRENGTH - 1e-9


@settings(max_examples=100, deadline=None)
@given(plans())
def test_round_trip(tmp_path_factory, plan):
    layers, drops, late, target = plan
    solved = Schedule.solve(layers, drops, late, visual=target, audio=target / 2, temperature=0.3, model="any/model")
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    solved.save(path)
    assert Schedule.load(path) == solved


means = st.tuples(st.integers(1, 200_000), st.integers(1, 50)).map(lambda pair: pair[0] / pair[1])  # of token counts over clips


@settings(max_examples=1000, deadline=None)
@given(means, means)
def test_a_trr_of_100_keeps_all_whatever_the_mean_counts(n_visual, n_audio):
    assert solve_trr(n_visual, n_audio, 100) == {"visual": 1.0, "audio": 1.0}
    assert Schedule.from_trr(Boundaries(20, 5, 16), 100, n_visual, n_audio).keeps_all


@settings(max_examples=300, deadline=None)
@given(means, st.integers(2, 20), st.floats(1.0, 99.9), st.booleans())
def test_a_modality_without_tokens_sets_no_limit(tokens, late, trr, is_visual):
    """Only one modality is there, and it may stay to the end; the other would leave early."""
    there, gone = ("visual", "audio") if is_visual else ("audio", "visual")
    plan = Schedule.from_trr({there: Boundaries(20, 2, 20), gone: Boundaries(20, 2, late)}, trr, *((tokens, 0) if is_visual else (0, tokens)))
    assert plan.trr[there] == pytest.approx(trr / 100) and plan.trr[gone] <= late / 20
