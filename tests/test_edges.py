"""Ties, empty sets, rounding and other ends, where a small wrong change shows first."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from seats_analysis import (
    Boundaries,
    Promise,
    Sample,
    Schedule,
    decode_clip,
    testbed_samples as shipped_samples,
)
from seats_analysis.boundaries.find import Resampled
from seats_analysis.boundaries.retention import ClipCounts
from seats_analysis.evaluation.evaluate import paired_difference
from seats_analysis.probing.branches import Scores
from seats_analysis.probing.edges import spans_of
from seats_analysis.schedules.solve import Segments
from seats_analysis.serving.lmms import by_family
from seats_analysis.testbed.task import synthetic_profile
from seats_analysis.tuning.tune import Tuning


def test_a_tie_is_no_right_answer():
    mean = np.array([[-1.0, -1.0], [-1.0, -1.5]])
    scores = Scores(mean=mean, first=mean, total=mean, answer=torch.zeros(2, 3))
    found = scores.metrics([Sample(None, "?", ("a", "b"), 0, id=i) for i in "12"], scores)
    assert found["correct"].tolist() == [False, True]
    assert found["margin"].tolist() == [0.0, 0.5]


def test_choices_are_words():
    "One within another, and a token that ends a choice and its line."
    asked = Sample(None, "?", ("1.", "12."), 0, lettered=True)
    ids = "?\n|A.| 1|.\n|B.| 1|2|.".split("|")
    assert spans_of(SimpleNamespace(decode="".join), ids, asked) == [range(2, 4), range(5, 8)]


def test_critical_value_is_never_below_the_normal_quantile():
    right = np.array([[5.0, 9.0, 10.0]])
    boot = np.tile(right / 10, (100, 1))
    boot[:3, 1] = 0.1  # rare and far below: nearly all resamples are where the curve is
    drawn = Resampled(ClipCounts(np.arange(3), right, np.array([10.0]), 0.25), boot)
    assert drawn.critical_value(0.9) == pytest.approx(ndtri(0.9))


def test_chance_is_the_mean_over_questions():
    profile = synthetic_profile(clips=8)
    n = np.where(np.arange(profile.sizes["sample"]) % 2, 4, 2)
    profile = profile.assign_coords(n_choices=("sample", n))
    families = tuple(set(profile["family"].values.tolist()))
    found = ClipCounts.of(profile, "both", split=None, families=families)
    assert found.chance == pytest.approx((1 / n).mean())


def test_a_drop_at_the_late_start_finds_no_tokens():
    assert Segments(num_layers=8, drops=(2, 4), late_start=4).active == [2]


def test_the_middle_begins_where_both_modalities_are_past_shallow():
    bounds = dict(visual=Boundaries(16, 3, 12), audio=Boundaries(16, 6, 12))
    plan = Schedule.from_boundaries(bounds, visual=0.2, audio=0.2, late="estimate")
    assert plan.shallow_end == 6
    assert min(plan.drop_layers) == 6


def test_no_difference_is_still_an_interval():
    diff, low, high, _ = paired_difference([1, 0, 1, 1], [1, 0, 1, 1], list("abcd"))
    assert diff == 0
    assert low == -high < 0


def test_families_count_the_same_in_the_harness():
    assert by_family([("a", 1), ("a", 0), ("a", 0), ("b", 1)]) == pytest.approx((1 / 3 + 1) / 2)


def test_a_thinned_video_with_separate_audio_keeps_its_rate():
    path = shipped_samples("test")[0].video
    clip = Sample(path, "?", (), -1, id="1", audio=path).load_media(max_frames=3)[0]
    assert clip.fps == decode_clip(path, max_frames=3).fps
    assert len(clip.frames) == 3


def test_a_clip_is_for_the_search_or_for_calibration():
    first, second = (Sample("same.mp4", "?", ("a", "b"), 0, id=name) for name in "12")
    with pytest.raises(ValueError, match="both for the search and for calibration"):
        Tuning(
            model=None, processor=None, promise=Promise(), proposal=[first], calibration=[second]
        )
