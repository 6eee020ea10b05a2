"""The authors' code beside ours, where `SEATS_REFERENCE` and `SEATS_OVERLAY` name its folders (see
nbs/experiments/05_reference.ipynb)."""

import os

import pytest

from seats_analysis.lab.reference import beside_reference

FOLDERS = os.environ.get("SEATS_REFERENCE"), os.environ.get("SEATS_OVERLAY")


@pytest.mark.skipif(not all(FOLDERS), reason="SEATS_REFERENCE and SEATS_OVERLAY name no folders")
def test_the_reference_keeps_and_says_the_same(tmp_path):
    "But for a token by which the two count on purpose: see nbs/explanations/parity.ipynb."
    found = beside_reference(tmp_path / "x.json", *FOLDERS, max_tokens=1100, rounds=1, width=128)
    for row in found["kept"]:
        assert max(row["ours"], row["reference"]) - row["both"] <= 1, row
    assert {row["stage"] for row in found["kept"]} >= {"stage1", "late23"}
    assert len({(r["pruned"], r["said"]) for r in found["rows"]}) == 2
