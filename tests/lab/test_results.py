"""Rows of the demo."""

import numpy as np
import pytest

from seats_analysis import (
    Boundaries,
    Schedule,
    evaluate,
    load_testbed,
    testbed_samples as shipped_samples,
)
from seats_analysis.baselines.base import Random
from seats_analysis.lab.results import answer_rows


def test_tokens_per_block_of_the_demo():
    "Means over questions, of which a clip may have several, as they were really processed."
    testbed, samples, plan = load_testbed(), shipped_samples(limit=3), Schedule.load("testbed/10")
    rows = answer_rows(*testbed, samples, {10: plan}, Boundaries(plan.num_layers, 5, 12))
    assert [r["method"] for r in rows] == ["full", "seats", "random"]
    for row, method in zip(rows, (None, plan, Random(plan))):
        layers = evaluate(*testbed, samples, method).attrs["tokens_per_layer"]
        blocks = dict(shallow=layers[:5], middle=layers[5:12], late=layers[12:])
        assert row["tokens"] == {k: pytest.approx(np.mean(v)) for k, v in blocks.items()}
