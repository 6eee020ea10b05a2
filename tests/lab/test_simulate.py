"""Planted boundaries come back, intervals hold them, and the stored studies are those."""

import json

from conftest import ROOT
import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from seats_analysis import Promise
from seats_analysis.boundaries import find as B
from seats_analysis.boundaries.retention import needed_families, profile_hash
from seats_analysis.cli.main import app
from seats_analysis.lab import simulate as S
from seats_analysis.storage.schemas import load_json
from seats_analysis.testbed.task import synthetic_profile

DATA = ROOT / "data"
STUDY = DATA / "results" / "boundary_coverage.json"


@pytest.fixture(scope="module")
def measured():
    return xr.load_dataset(DATA / "profiles" / "testbed.nc", engine="h5netcdf")


@pytest.fixture(scope="module")
def noise(measured):
    return S.noise_of(measured)


def test_questions_on_a_clip_stay_together(noise):
    drawn = noise.draw(S.SHAPES["ramp"](16), 500, np.random.default_rng(0))
    assert len(drawn.asked) == round(500 / noise.per_clip) and set(drawn.asked) == {
        len(r) for r in noise.rows
    }


def test_the_default_covers_a_loss_that_few_clips_hide(noise):
    "The hard cell: a loss of 1.1 % that twenty-odd clips hardly ever show."
    row = S.coverage_row("shelf at 98.5 %", 50, noise, trials=60, n_boot=100, seed=5)
    default, percentile = (row["late_interval"][str(c)] for c in (B.Resampled.LATE_CONFIDENCE, 0))
    assert default["coverage"] >= 0.93 and default["coverage"] >= percentile["coverage"]
    assert default["width"] > percentile["width"]


def test_stored_study_meets_the_goal():
    study = load_json(STUDY, "coverage")
    assert {r["shape"] for r in study["rows"]} == set(S.SHAPES) and sorted(
        {r["questions"] for r in study["rows"]}
    ) == sorted(S.SIZES)
    assert study["command"].startswith("seats simulate --trials") and study["trials"] >= 100
    shallow = [r["shallow_interval"]["coverage"] for r in study["rows"]]
    late = [r["late_interval"][str(B.Resampled.LATE_CONFIDENCE)]["coverage"] for r in study["rows"]]
    assert np.mean(shallow) >= study["goal"] and np.mean(late) >= study["goal"]
    slack = 2 * np.sqrt(study["goal"] * (1 - study["goal"]) / study["trials"])  # of one cell
    assert min(shallow) >= study["goal"] - slack and min(late) >= study["goal"] - slack


def test_the_default_late_confidence_is_enough_and_not_more_than_tried():
    study = load_json(STUDY, "coverage")
    assert (
        B.Resampled.LATE_CONFIDENCE in study["late_confidences"]
        and S.choose_late_confidence(study, study["goal"]) <= B.Resampled.LATE_CONFIDENCE
    )
    worse = json.loads(json.dumps(study))
    for row in worse["rows"]:
        row["late_interval"][str(B.Resampled.LATE_CONFIDENCE)]["coverage"] = 0.5
    assert S.choose_late_confidence(worse, study["goal"]) != B.Resampled.LATE_CONFIDENCE


@pytest.mark.nightly
def test_the_stored_study_is_reproduced(measured):
    study = load_json(STUDY, "coverage")
    if study["profile_hash"] != profile_hash(measured):
        pytest.fail("the study was made with the noise of another profile: run " + study["command"])
    again = S.coverage_study(
        measured, sizes=(50,), trials=study["trials"], n_boot=study["n_boot"], seed=study["seed"]
    )
    rows = [r for r in study["rows"] if r["questions"] == 50]
    for new, old in zip(again["rows"], rows, strict=True):  # older studies say less of the ends
        assert new["errors"].items() <= old["errors"].items()
        intervals = lambda row: [row["shallow_interval"], *row["late_interval"].values()]
        for ours, theirs in zip(intervals(new), intervals(old), strict=True):
            assert theirs.items() <= ours.items()


def test_the_ends_of_intervals_are_counted_apart(noise):
    "A curve whose estimate is early fails below and never above."
    row = S.coverage_row("shelf at 98.5 %", 50, noise, trials=10, n_boot=40)
    found = row["late_interval"][str(B.Resampled.LATE_CONFIDENCE)]
    assert found["lower"] == 1 and found["coverage"] == found["upper"] <= 1
    assert found["open"] > 0.8
    table = S.coverage_table(dict(rows=[dict(removed="both", **row)]))
    assert table["high end open"].item() == found["open"]


def test_noise_leaves_out_questions_without_margins(measured, noise):
    mixed = measured.copy(deep=True)
    needed = np.flatnonzero(np.isin(measured.family.values.astype(str), needed_families(measured)))
    gone, n = needed[0], measured.sizes["sample"]
    mixed["margin"][gone], mixed["n_choices"][gone] = np.nan, 0
    left = S.noise_of(mixed)
    assert np.isfinite(left.ranks).all() and len(left.ranks) == len(noise.ranks) - 1 == sum(
        map(len, left.rows)
    )
    without = S.noise_of(measured.isel(sample=np.arange(n) != gone))
    assert (
        (left.ranks == without.ranks).all()
        and all(map(np.array_equal, left.rows, without.rows))
        and left.blocks == without.blocks
    )
    mixed["margin"][:] = np.nan
    with pytest.raises(ValueError, match="has a `margin` at every layer"):
        S.noise_of(mixed)


def test_sample_size_is_said_for_a_pilot_that_measures_nothing():
    "The planted curves are left, and why the pilot's own one is not among them."
    flat = synthetic_profile(clips=40)
    flat["correct"][:] = True
    flat["margin"] = flat["correct"] + np.random.default_rng(0).random(flat["correct"].shape)
    study = S.needed_study(flat, sizes=(25, 50), trials=2)
    assert "nothing is lost" in study["pilot"] and S.MEASURED not in [
        r["curve"] for r in study["rows"]
    ]


def test_sensitivity_answers_every_kind(tmp_path):
    result = CliRunner().invoke(app, ["transfer", "--limit", "3", "--out", f"{tmp_path}/s.json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "s.json").read_text())
    assert load_json(tmp_path / "s.json", "sensitivity") == data
    made = {r["made_for"] for r in data["rows"]}
    assert (
        made | set(data["without_schedule"]) == {"full", *data["kinds"]}
        and data["command"] == "seats transfer --trr 10 --limit 3"
    )
    assert all(r["kept"] in (1.0, None) for r in data["rows"] if r["made_for"] == "full")


@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize("risk", [0.0201, 0.03])
def test_a_schedule_over_the_bound_comes_out_in_at_most_five_percent(questions, risk):
    "The hardest chain: one schedule that is just too bad, behind one that is fine."
    world = np.random.default_rng(5).random((2, 200_000, questions)) < [[[0.001]], [[risk]]]
    rows = S.draw_certificates(
        Promise(0.02), world.mean(-1), [0.5, 0.2], questions == 1, draws=2000
    )
    assert max(r["low"] for r in rows) <= 0.05
    assert [r["none"] for r in rows][0] == 1  # 100 clips can show nothing
    if questions == 1 and risk == 0.0201:
        assert max(r["broken"] for r in rows) > 0.02  # the test is not empty
