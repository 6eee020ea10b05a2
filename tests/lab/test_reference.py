"""The authors' code beside ours; with their code where `SEATS_REFERENCE` and `SEATS_OVERLAY` name its
folders (nbs/experiments/05_reference.ipynb)."""

import os

import pytest
import tiny
import torch

from seats_analysis.boundaries.find import Boundaries
from seats_analysis.lab import reference as R
from seats_analysis.models.encode import encode
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule

FOLDERS = os.environ.get("SEATS_REFERENCE"), os.environ.get("SEATS_OVERLAY")


def test_a_side_runs_and_keeps_what_the_model_does_here(tmp_path):
    model, processor = tiny.thinker("qwen2.5-omni", 4), tiny.processor("qwen2.5-omni")
    inputs = encode(model, processor, tiny.probed()[:1]).inputs
    plan = Schedule.from_boundaries(Boundaries(4, 1, 3), 0.3, 0.5)
    R.write_shared(tmp_path, model, plan, {"p": inputs})
    with R.asked("ours", tmp_path) as side:
        rows, kept = R.take_turns({"ours": side}, ["p"], rounds=2)
    with torch.no_grad():
        said = {(k, False): model(**inputs).logits[0, -1].argmax() for k in (1, 2)}
        with prune(model, plan) as run:
            said |= {(k, True): model(**inputs).logits[0, -1].argmax() for k in (1, 2)}
    assert kept["p", "ours"] == {name: k[0].tolist() for name, k in run.kept.items()}
    assert {(r["round"], r["pruned"]): r["said"] for r in rows} == said
    assert all(0 < r["encoders"] < r["seconds"] and r["peak_mb"] >= 0 for r in rows)


@pytest.mark.skipif(not all(FOLDERS), reason="SEATS_REFERENCE and SEATS_OVERLAY name no folders")
def test_the_reference_keeps_and_says_the_same(tmp_path):
    "But for a token by which the two count on purpose: see nbs/explanations/parity.ipynb."
    found = R.beside_reference(tmp_path / "x.json", *FOLDERS, max_tokens=1100, rounds=1, width=128)
    for row in found["kept"]:
        assert max(row["ours"], row["reference"]) - row["both"] <= 1, row
    assert {row["stage"] for row in found["kept"]} >= {"stage1", "late23"}
    assert len({(r["pruned"], r["said"]) for r in found["rows"]}) == 2
