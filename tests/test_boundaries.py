"""Boundaries that others would find again: intervals, other rules, evidence in schedules."""

import json
from dataclasses import replace

from conftest import ROOT
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest
from test_cli import seats

from seats_analysis import Schedule, boundary_table, explain, find_boundaries
from seats_analysis.boundaries import find as B
from seats_analysis.boundaries.report import boundary_row
from seats_analysis.boundaries.retention import layer_changes, retained
from seats_analysis.storage.schemas import save_profile
from seats_analysis.testbed.task import synthetic_profile


PROFILE = ROOT / "data" / "profiles" / "testbed.nc"


@pytest.fixture(scope="module")
def measured():
    return xr.load_dataset(PROFILE, engine="h5netcdf")


# intervals


def test_an_interval_leaves_out_as_much_on_both_sides():
    "Of 95 % in all, 2.5 % on either side; four per cent lie inside, at 90 % outside."
    replicates = np.repeat([1, 5, 9], [40, 920, 40])
    assert B.Resampled.interval(replicates, 5, 0.95) == (1, 9)
    assert B.Resampled.interval(replicates, 5, 0.9) == (5, 5)
    assert B.Resampled.interval(replicates, 10, 0.9) == (5, 10)  # the estimate lies inside
    assert B.Resampled.interval(np.arange(100), 50, 0.95) == (2, 97)  # rounded outwards


def test_stability_is_the_share_of_resamples(measured):
    b = find_boundaries(measured, "both", n_boot=300)
    _, (_, lates) = B.Resampled.of(measured, "both", n_boot=300).blocks()
    share = (lates == b.late_start).mean()
    assert b.parameters["stability"]["late_start"] == round(float(share), 4)


# other rules


def test_kl_rule_moves_with_the_temperature_and_the_answers_do_not(measured):
    profiles = [measured.assign(kl=measured.kl * factor) for factor in (0.01, 1, 100)]
    found = [B.kl_late_start(p, threshold=0.05, n_boot=20)["late_start"] for p in profiles]
    assert found == sorted(found) and found[0] < found[2]
    assert len({find_boundaries(p, n_boot=50).late_start for p in profiles}) == 1


@pytest.mark.parametrize("clips", [16, 32])
def test_divergence_sees_a_drifting_shelf_with_few_clips(clips):
    "Where 1.5 % of the answers are lost and all drift a little; the answers rarely show it."
    shelf = np.r_[np.zeros(4), np.full(4, 0.98), np.ones(5)]
    met = dict(answers=0, kl=0)
    for seed in range(10):
        profile = synthetic_profile({"both": shelf}, clips, splits=("derive",), seed=seed)
        drift = np.random.default_rng(seed).gamma(2, 0.02, profile.correct.shape)
        profile["kl"] = profile.correct.dims, np.where(shelf < 1, drift + (shelf == 0), 0)
        b = find_boundaries(profile, "both", n_boot=50)
        kl = b.parameters["kl"]
        met["answers"] += b.late_start == 8 and b.late_start_ci[1] < 12
        met["kl"] += kl["late_start"] == 8 and kl["interval"] == [8, 8]
        assert kl["retained"] == 1
        assert f"{kl['threshold']:g} nats (mean KL) from layer 9" in explain(b)
    assert met == dict(answers=0, kl=10)


def test_divergence_needs_no_choices(measured):
    "Nor does it change what the answers say; a file keeps it."
    open_questions = measured.assign_coords(n_choices=("sample", [0] * measured.sizes["sample"]))
    wanted = B.kl_late_start(measured, n_boot=20)
    assert B.kl_late_start(open_questions, n_boot=20) == wanted
    found = find_boundaries(measured, n_boot=20)
    bare = find_boundaries(measured.drop_vars("kl"), n_boot=20)
    assert found.parameters.pop("kl")["late_start"] == wanted["late_start"]
    known = lambda b: {k: v for k, v in b.to_dict().items() if k != "profile_hash"}
    assert known(found) == known(bare)


# what is missing harms nothing else


def test_a_control_that_is_missing_or_never_right_leaves_the_rest():
    whole = synthetic_profile(clips=40)
    control = whole.family.values.astype(str) == "control"
    absent = whole.isel(sample=~(control & (whole.split.values.astype(str) == "derive")))
    unanswered = whole.copy(deep=True)
    unanswered["correct"][control] = False
    wanted = find_boundaries(whole, n_boot=60)
    assert len(wanted.control) == 13
    for profile in (absent, unanswered):
        found = find_boundaries(profile, n_boot=60)
        assert found.control == ()
        for field in ("curve", "late_start", "late_start_ci"):
            assert getattr(found, field) == getattr(wanted, field)
        assert boundary_table(profile, n_boot=60).equals(boundary_table(whole, n_boot=60))


def test_a_family_that_was_not_asked_in_the_split_has_an_empty_row():
    profile = synthetic_profile(clips=30)
    asked = (profile.family.values != "tone") | (profile.split.values != "derive")
    only = profile.isel(sample=asked)
    table = boundary_table(only, ["audio"], n_boot=50).drop(columns="late_by_kl")  # it has no kl
    assert table.loc["audio", "tone"].isna().all() and table.loc["audio", "all"].notna().all()
    unasked = only.isel(sample=np.isin(only.family.values, ["tone", "control"]))
    with pytest.raises(ValueError, match="no sample of the families"):
        boundary_table(unasked, n_boot=50)
    with pytest.raises(ValueError, match="no split"):
        boundary_table(profile, split="dev")


# what few clips cannot know


def lies_inside(band, name):
    return ((band[f"{name}_low"] <= band[name]) & (band[name] <= band[f"{name}_high"])).all()


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_too_few_clips_claim_no_width_of_nothing(clips, tmp_path):
    profile = synthetic_profile(clips=40)
    profile = profile.assign_coords(clip=("sample", np.arange(profile.sizes["sample"]) % clips))
    found = find_boundaries(profile, n_boot=100)
    band = retained(profile, n_boot=100)
    assert found.shallow_end_ci == found.late_start_ci == (0, 12)
    assert "stability" not in found.parameters
    assert f"too few clips: {found.n_clips}, which count as" in explain(found)
    for name in ("retained", "corrected"):
        assert (band[f"{name}_high"] - band[f"{name}_low"] > 0.1)[:12].all()
        assert lies_inside(band, name)
    assert boundary_table(profile, ["both"], n_boot=50).late_start_same.isna().all()
    if clips > 1:
        return
    save_profile(profile, tmp_path / "p.nc")
    result = seats("boundaries", tmp_path / "p.nc", "--families", "--figure", tmp_path / "drawn")
    assert result.exit_code == 0 and "not measurable" in result.stdout, result.output
    stored = json.loads(seats("boundaries", tmp_path / "p.nc", "--json").stdout)
    assert stored["both"]["late_start_ci"] == [0, 12]
    with pytest.raises(ValueError, match="too few clips.*--blocks"):
        Schedule.from_boundaries(found, 0.1, 0.3)


def changed(profile, rows, layers, value):
    profile["correct"][rows, :, layers] = value
    return profile


@pytest.mark.parametrize(
    "change, says",
    [
        # a quarter right with nothing removed, which is what guessing gets
        (
            lambda p, n: changed(p, np.arange(n) // 2 % 4 > 0, slice(None), False),
            "not above the 25 %",
        ),
        (lambda p, n: changed(p, slice(None), slice(None), True), "nothing is lost"),
        (lambda p, n: p.isel(sample=p["clip"].values < "clip0006"), "too few clips: 3, which"),
    ],
    ids=["near chance", "nothing lost", "three clips"],
)
def test_what_cannot_be_measured_is_not(change, says, tmp_path):
    "No blocks, no stability and no schedule; the command says why, and what is left to do."
    profile = synthetic_profile(clips=40)
    profile = change(profile, profile.sizes["sample"])
    found = find_boundaries(profile, n_boot=50)
    assert says in found.unmeasurable and "seats sample-size" in explain(found)
    assert found.late_start_ci == (0, 12) and "stability" not in found.parameters
    assert boundary_table(profile, ["both"], n_boot=50).late_start.isna().all()
    profile.attrs["tokens"] = '{"visual": 128, "audio": 80, "text": 17}'
    save_profile(profile, tmp_path / "p.nc")
    told = seats("boundaries", tmp_path / "p.nc").stdout
    assert told.count("not measurable") >= 4 and says in told and "seats sample-size" in told
    asked = ["schedule", tmp_path / "p.nc", "--trr", "10", "--out", tmp_path / "plan.json"]
    refused = seats(*asked)
    assert refused.exit_code == 2 and says in refused.stderr and "--blocks" in refused.stderr
    assert not (tmp_path / "plan.json").exists()
    assert seats(*asked, "--blocks", "4,9").exit_code == 0
    plan = Schedule.load(tmp_path / "plan.json")
    assert (plan.shallow_end, plan.late_start, plan.evidence["kind"]) == (3, 8, "stated")


def test_five_clips_are_resampled():
    found = find_boundaries(synthetic_profile(clips=5, full=1.0), "both", n_boot=100)
    assert found.parameters["effective_clips"] == 5 and "stability" in found.parameters
    assert "it takes" not in explain(found)


CHANGED = dict(
    lettered=[30] * 9 + [12, 9, 20], open=[30] * 9 + [6, 0, 0]
)  # clips, by layer left out


def left_out(profile):
    "The same, its first 30 clips asked: of each the first question has letters, the others none."
    number = np.array([int(name[4:]) for name in profile["clip"].values])
    lettered = profile["family"].values == profile["family"].values[0]
    counts = np.where(lettered[:, None], *([*CHANGED[k], 0] for k in ("lettered", "open")))
    changes = np.where(number[:, None] < 30, number[:, None] < counts, np.nan)
    letters = np.where(lettered[:, None, None], 1, np.nan) + np.zeros(profile["correct"].shape)
    return profile.assign(
        bypass_changes=(("sample", "layer"), changes),
        correct_letter=(profile["correct"].dims, letters),
    )


def test_a_late_block_says_which_layer_does_least():
    "Shares and intervals by counting clips: all open questions on one change together, or none."
    profile = synthetic_profile(clips=40, full=1.0)
    assert layer_changes(profile) is None
    assert "does least" not in explain(find_boundaries(profile, n_boot=50))
    some = left_out(profile)
    table = layer_changes(some)
    assert dict(zip(table["kind"], table["questions"])) == dict(lettered=30, open=90)
    for row in table.itertuples():
        k = CHANGED[row.kind][row.layer]
        exact = binomtest(k, 30).proportion_ci(method="wilson")
        assert (row.share, row.low, row.high) == pytest.approx((k / 30, *exact), abs=0.01)
    found = find_boundaries(some, n_boot=50)
    least = found.parameters["does_least"]
    assert found.late_start == 8 and [row["layer"] for row in least] == [10, 10]
    said = explain(found)
    assert "layers 11 does least: left out, it changes 30.0 % of 30 lettered answers" in said
    assert "and 0.0 % of 90 open answers (0.0 to 11.4)." in said
    assert layer_changes(some.assign(bypass_changes=some["bypass_changes"] * np.nan)) is None


def test_clips_that_are_needed_are_effective_ones(measured):
    found = find_boundaries(measured, "both", n_boot=200)
    told = explain(found)
    effective = found.parameters["effective_clips"]
    assert "effective clips without a loss would be needed" in told
    assert f"these {found.n_clips} for {effective:.1f}" in told and effective < found.n_clips


# tables, schedules, commands


def test_interval_that_does_not_close_says_end(tmp_path):
    profile = synthetic_profile(clips=40)
    save_profile(profile, tmp_path / "p.nc")
    assert "to end)" in seats("boundaries", tmp_path / "p.nc").stdout
    assert "to the end, " in explain(find_boundaries(profile, n_boot=100))


def test_questions_without_choices_do_not_count():
    "They are neither right nor wrong: a mixed profile has the boundaries of its labelled ones."
    asked = synthetic_profile(clips=40)
    size = asked.sizes["sample"]
    number = lambda part, n, first: part.assign_coords(
        n_choices=("sample", [n] * size), sample=np.arange(size) + first
    )
    alone = number(asked, 4, 0)
    bare = number(asked.assign(correct=asked.correct & False), 0, 10_000)
    mixed = xr.concat([alone, bare], "sample", combine_attrs="override")
    ours, theirs = (find_boundaries(p, n_boot=100) for p in (mixed, alone))
    for field in ("curve", "late_start_ci", "n_samples"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.parameters["chance"] == 0.25
    with pytest.raises(ValueError, match="no chosen question has choices"):
        find_boundaries(bare)


def test_no_share_above_all_and_no_layer_behind_the_last_is_printed():
    b = find_boundaries(synthetic_profile(clips=40), n_boot=50)

    def said(late):
        kl = dict(threshold=0.01, late_start=late, interval=(12, 12), stability=1, retained=1.175)
        return explain(replace(b, parameters=b.parameters | dict(kl=kl)))

    assert "100.0 % of the performance is left" in said(8) and "from layer 9 on" in said(8)
    assert "Removed anywhere, they move" in said(12) and "from layer" not in said(12)
    assert "interval the end to the end" in said(12)
    row = boundary_row(replace(b, parameters=b.parameters | dict(unmeasurable="too few clips: 3")))
    assert list(row.values()).count("not measurable") == 2
