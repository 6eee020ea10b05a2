"""Parity of the schedule solver with the recorded reference, and where `Schedule` deliberately differs from it."""
import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seats_analysis.schedule import MAX_STRENGTH, MODALITIES, PUBLISHED, Schedule, drop_shares, feasible_scales, solve_keep_ratios

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("SEATS_GOLDEN", ROOT / "tests" / "fixtures" / "golden"))
DATA = json.loads((GOLDEN / "schedule.json").read_text())
CASES = {case["name"]: case for case in DATA["cases"]}


# The recorded behaviour, kept here and only here: clipping, filtering, four decimals, 1-based layers.
def parse_layers(text):
    """Sorted layers of "16-18-20" or "20, 16,18"; none for None or a blank."""
    return sorted(int(part) for part in (text or "").replace("-", ",").split(",") if part.strip())


def count_layers(name):
    """Layer count by the first known name inside the model path."""
    for known, layers in DATA["num_layers"].items():
        if known in name: return layers
    raise ValueError(f"Unknown model {name!r}, cannot compute progressive_remove lm_ratio")


def clipped_strength(target, entering, drops, last, layers):
    """Closed form of the strength, clipped to [0, 1] as the bisection of the reference ends up."""
    pieces = np.diff([0, *drops, last])
    return min(max((entering * last - target * layers) / (entering * float(pieces[1:] @ drop_shares(len(drops)))), 0.0), 1.0)


def rounded_ratios(target, entering, drops, last, layers):
    """Keep ratios with four decimals; levels floored at 1e-12."""
    active = [d for d in drops if d < last]
    if not active: return []
    strength = clipped_strength(target, entering, active, last, layers)
    levels = [entering, *(max(entering * (1 - strength * share), 1e-12) for share in drop_shares(len(active)))]
    return [round(after / before, 4) for before, after in zip(levels, levels[1:])]


def reference_solver(pretrained, video_ratio, audio_ratio, video_encoder_ratio, audio_encoder_ratio, progressive_drop_layers, late_block_layer,
                     progressive_schedule):
    """All outputs of the recorded solver, by the names in the file."""
    layers, drops = count_layers(pretrained), parse_layers(progressive_drop_layers)
    if progressive_schedule != "exp": raise ValueError(f"Unknown progressive_schedule: {progressive_schedule!r}")
    last = layers if late_block_layer is None else min(late_block_layer - 1, layers)
    solve = lambda target, entering: rounded_ratios(target, entering, drops, last, layers)
    return dict(video_inner_progressive_ratio_list=solve(video_ratio, video_encoder_ratio),
                audio_inner_progressive_ratio_list=solve(audio_ratio, audio_encoder_ratio), num_layers=layers, drop_layers=drops, remove_layer=last,
                progressive_schedule=progressive_schedule, video_encoder_ratio=video_encoder_ratio, audio_encoder_ratio=audio_encoder_ratio)


@pytest.mark.parametrize("name", CASES)
def test_reference_solver_matches_every_case(name):
    case = CASES[name]
    if "exception" in case:
        with pytest.raises(ValueError) as caught: reference_solver(**case["inputs"])
        assert (type(caught.value).__name__, str(caught.value)) == (case["exception"], case["message"])
    else: assert reference_solver(**case["inputs"]) == case["outputs"]


SOLVED = [name for name, case in CASES.items() if "outputs" in case]


def recorded(case, modality):
    """(target, entering, active drops, late_start, layers, recorded ratios) of one modality, 0-based."""
    inputs, outputs, name = case["inputs"], case["outputs"], {"visual": "video", "audio": "audio"}[modality]
    drops = [d for d in outputs["drop_layers"] if d < outputs["remove_layer"]]
    return (inputs[f"{name}_ratio"], inputs[f"{name}_encoder_ratio"], drops, outputs["remove_layer"], outputs["num_layers"],
            outputs[f"{name}_inner_progressive_ratio_list"])


def is_feasible(target, entering, drops, last, layers):
    """Whether levels of the recorded form can average the target, from their definition: strength 0 gives the most, strength 1 the least."""
    average = lambda strength: float(np.diff([0, *drops, last]) @ (entering * (1 - strength * np.r_[0, drop_shares(len(drops))]))) / layers
    return entering <= 1 and average(1.0) < target <= average(0.0) and (bool(drops) or math.isclose(target, average(0.0), rel_tol=1e-9))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", SOLVED)
def test_full_precision_agrees_or_refuses(name, modality):
    target, entering, drops, last, layers, ratios = recorded(CASES[name], modality)
    if is_feasible(target, entering, drops, last, layers):
        assert solve_keep_ratios(target, entering, drops, last, layers) == pytest.approx(ratios, abs=5.1e-5)
    else:
        with pytest.raises(ValueError, match="feasible"): solve_keep_ratios(target, entering, drops, last, layers)


@pytest.mark.parametrize("name", SOLVED)
def test_schedule_meets_the_target_or_refuses(name):
    (t_v, e_v, drops, last, layers, _), (t_a, e_a, *_) = (recorded(CASES[name], m) for m in MODALITIES)
    build = lambda: Schedule.solve(layers, drops, last, visual=t_v, audio=t_a, entering={"visual": e_v, "audio": e_a})
    if is_feasible(t_v, e_v, drops, last, layers) and is_feasible(t_a, e_a, drops, last, layers):
        assert build().average_trr() == pytest.approx({"visual": t_v, "audio": t_a}, abs=1e-9)
    else:
        with pytest.raises(ValueError, match="feasible"): build()


def test_shipped_files_are_the_published_plans():
    for name, setting in PUBLISHED.items():
        for trr in setting["pairs"]:
            shipped = Schedule.load(ROOT / "data" / "schedules" / f"{name}_trr{trr}.json")
            assert shipped == Schedule.published(name, trr)


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
