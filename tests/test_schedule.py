"""The shipped schedules, and the solver on random plans; parity is in test_golden.py."""

import csv
import math

from conftest import ROOT
import numpy as np
import pytest
from hypothesis import given, strategies as st

from seats_analysis import Schedule
from seats_analysis.schedules.file import PUBLISHED
from seats_analysis.schedules.solve import MAX_STRENGTH, Segments


def test_published_constants_equal_the_reported_table():
    with open(ROOT / "data" / "reported" / "schedules.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(setting["pairs"]) for setting in PUBLISHED.values())
    for row in rows:
        plan = Schedule.published(row["model"], int(row["label"]))
        assert (plan.num_layers, plan.shallow_end, plan.late_start) == (
            int(row["num_layers"]),
            int(row["shallow_end"]),
            int(row["late_start"]) - 1,
        )
        assert plan.drop_layers == tuple(
            map(int, row["drop_after_layers"].split("-"))
        )  # after 1-based layer d = before 0-based layer d
        assert plan.trr == {"visual": float(row["visual_trr"]), "audio": float(row["audio_trr"])}
        assert (plan.temperature, plan.scale) == (
            float(row["temperature"]),
            pytest.approx(float(row["scale"])),
        )


@st.composite
def plans(draw):
    """Layers, drops, late start and a reachable target."""
    layers = draw(st.integers(2, 96))
    late = draw(st.integers(1, layers))
    drops = sorted(draw(st.sets(st.integers(1, max(late - 1, 1)), max_size=5))) if late > 1 else []
    return layers, tuple(drops), late, draw(st.floats(0.005, late / layers))


def averages(plan):
    return {m: np.mean(plan.levels(m)) for m in ("visual", "audio")}


@given(plans(), st.floats(1.0, 3.0))
def test_any_solved_plan_averages_its_target_and_survives_a_file(tmp_path_factory, plan, scale):
    layers, drops, late, target = plan
    options = dict(scale=scale, temperature=0.3, model="any/model")
    solved = Schedule.solve(layers, drops, late, target, target / 2, **options)
    assert averages(solved) == pytest.approx({"visual": target, "audio": target / 2}, abs=1e-9)
    for m in ("visual", "audio"):
        assert all(0 < ratio <= 1 for ratio in solved.keep_ratios[m]) and solved.entering[m] <= 1
        assert all(a >= b for a, b in zip(solved.levels(m), solved.levels(m)[1:]))
    path = tmp_path_factory.getbasetemp() / "plan.json"
    solved.save(path)
    assert Schedule.load(path) == solved


@given(plans(), st.floats(0.0, 1.0))
def test_every_scale_in_the_feasible_range_is_solved_as_asked(plan, where):
    layers, drops, late, target = plan
    segments = Segments(layers, drops, late)
    low, high = segments.scales(target)
    entering = min(target * (low + where * (high - low)), 1.0)
    e, ratios = segments.keep_ratios(target, entering=entering)
    assert e == entering and math.prod(ratios) >= 1 - MAX_STRENGTH - 1e-9
    nearest = segments.keep_ratios(target, low + where * (high - low), nearest=True)
    assert nearest[0] == pytest.approx(e) and nearest[1] == pytest.approx(ratios, abs=1e-6)


@given(plans(), st.floats(0.005, 1.0), st.booleans())
def test_the_nearest_plan_meets_what_can_be_met(plan, target, equal):
    """From above where nothing is dropped, from below where all is; exactly between the two."""
    layers, drops, late, _ = plan
    e, keep = Segments(layers, drops, late, equal).keep_ratios(target, nearest=True)
    level, levels = e, []
    for i in range(layers):
        level = level * keep[drops.index(i)] if i in drops else level
        levels.append(level if i < late else 0)
    assert np.mean(levels) == pytest.approx(min(target, late / layers), abs=1e-9)
    if equal and len(drops) > 1 and math.prod(keep) < 1 - 1e-6:
        removed = 1 - np.cumprod(keep)
        assert np.diff(removed, prepend=0) == pytest.approx([removed[0]] * len(drops), abs=1e-9)
