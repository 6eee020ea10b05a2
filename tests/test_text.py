"""Whole answers: teacher forcing decides what `generate` would write, under both cache rules."""

import json

import pytest
import torch

import seats_analysis as sa
from seats_analysis import load_testbed
from seats_analysis.evaluation.evaluate import force_answers, write_tokens
from seats_analysis.schedules.schedule import ScheduleWarning
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.task import Scene

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 24


@pytest.fixture(scope="module")
def testbed():
    return load_testbed("qwen3-omni")


@pytest.fixture(scope="module")
def captions():
    "The first 16 shipped test clips, each with its caption."
    folder = shipped_folder("testbed")
    rows = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
    return [
        sa.Sample(str(folder / r["video"]), r["question"], (r["caption"],), 0, id=r["video"])
        for r in rows
        if r["split"] == "test"
    ][:16]


def generated(model, batch):
    new = dict(max_new_tokens=STEPS, do_sample=False)
    return model.generate(**batch.inputs, **new)[:, batch.shape[1] :]


def test_forcing_decides_what_generate_writes(testbed, captions):
    "On 16 clips: three schedules under both rules, token by token up to the first that changes."
    model, processor = testbed
    batch = sa.encode(model, processor, captions)
    written = write_tokens(model, processor, batch, STEPS)[0]
    shares = {}
    for name in ("35", "10", "tuned"):
        for kv in ("retain", "evict"):
            with sa.prune(model, sa.Schedule.load(f"testbed-qwen3/{name}"), kv=kv):
                logp = force_answers(model, batch, written)
                ours = generated(model, batch).tolist()
            changed = []
            for ids, row, said in zip(written, logp.argmax(-1).tolist(), ours, strict=True):
                stays = [a == b for a, b in zip(row, ids)]
                first = stays.index(False) if False in stays else len(ids)
                assert said[:first] == ids[:first]
                assert first == len(ids) or said[first] == row[first] != ids[first]
                changed.append(first < len(ids))
            shares[name, kv] = sum(changed) / len(changed)
    assert len(captions) == 16
    for name in ("35", "10", "tuned"):
        assert shares[name, "evict"] > 0.9  # the published rule changes nearly every caption
        assert shares[name, "retain"] < 0.85


def test_one_token_is_the_same_under_both_rules(testbed, captions):
    model, processor = testbed
    batch = sa.encode(model, processor, captions[:8])
    plan = sa.Schedule.load("testbed-qwen3/10")
    first = []
    for kv in ("retain", "evict"):
        with sa.prune(model, plan, kv=kv):
            first.append(model(**batch.inputs).logits[:, -1])
    assert torch.equal(*first)


def test_the_published_rule_says_what_it_does_to_long_answers(testbed, captions):
    model, processor = testbed
    batch = sa.encode(model, processor, captions[:1])
    with sa.prune(model, sa.Schedule.load("testbed-qwen3/10"), kv="evict"):
        with pytest.warns(ScheduleWarning, match="after the first token"):
            model.generate(**batch.inputs, max_new_tokens=2)


def test_windows_of_a_caption_are_judged_one_by_one():
    right = Scene.windows_right("cool red then dim low", "cool red then dim high then warm")
    assert right == [True, False, False]
