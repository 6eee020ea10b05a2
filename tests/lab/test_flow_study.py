"""Conflict clips against what their scenes show, and the study of flows against plain counts."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from test_cli import done, refused

from seats_analysis import load_flow, load_profile
from seats_analysis.lab.flow import (
    flow_flops,
    joint_heads,
    joint_sets,
    repair_table,
    strongest_heads,
    window_hits,
)
from seats_analysis.models.encode import encode_questions
from seats_analysis.probing.flow import Branches, Knockouts, jobs_of, joined
from seats_analysis.testbed import load
from seats_analysis.testbed.conflict import CONFLICTS, Conflict, conflict_samples
from seats_analysis.testbed.task import POOLS


def read(scene, question):
    "(right, misleading) by a scene and the words of a question, and whether it is as usual."
    things = [(t.window, t.colour) for t in scene.things]
    sounds = [(s.window, s.pitch) for s in scene.sounds]
    if many := re.fullmatch("how many (objects|sounds) are there [?]", question):
        n = dict(objects=len(things), sounds=len(sounds))
        other = sum(n.values()) - n[many[1]]
        words = POOLS["number"]
        return (words[n[many[1]] - 1], words[other - 1]), n["objects"] == n["sounds"]
    if end := re.fullmatch("what pitch is heard (first|last) [?]", question):
        at = 0 if end[1] == "first" else -1
        with_thing = [p for w, p in sounds if w in dict(things)]
        alone = sounds[at][0] not in dict(things)
        return (sounds[at][1], with_thing[at]), not alone
    key = re.search(r"with the (\w+)", question)[1]
    keys, others = (sounds, things) if "sound" in question else (things, sounds)
    named = [w for w, word in keys if word == key]
    paired = [word for w, word in others if w in named]
    if paired:
        away = [word for w, word in others if w not in named and w in dict(keys)]
        return (*paired, *away), len(named) == 1
    nearest = sorted(others, key=lambda x: abs(x[0] - named[0]))
    assert abs(nearest[0][0] - named[0]) < abs(nearest[1][0] - named[0])
    return tuple(word for _, word in nearest), False


def test_what_is_right_can_be_read_off_the_scene():
    samples = conflict_samples(200, seed=3)
    for sample in samples:
        conflict = Conflict.of(sample)
        answers, usual = read(conflict.scene, sample.question)
        assert answers == (conflict.right, conflict.misleading) and not usual, sample
        assert sample.choices[sample.answer] == conflict.right != conflict.misleading
        assert conflict.misleading in sample.choices and len(set(sample.choices)) == 4
        assert set(f"{sample.question} {' '.join(sample.choices)}".split()) <= set(load.word_ids())
        np.testing.assert_array_equal(sample.video.frames, conflict.scene.frames())
    assert {s.family for s in samples} == set(CONFLICTS)
    assert abs(np.mean([s.answer for s in samples]) - 1.5) < 0.3  # the place tells nothing


def test_conflict_clips_are_nobody_elses():
    ids = [{s.id for s in conflict_samples(60, seed)} for seed in (0, 1, 8)]
    assert len(set.union(*ids)) == 180 and ids[0] == {s.id for s in conflict_samples(60)}
    ours = {Conflict.of(s).scene.seed for s in conflict_samples(5)}
    assert min(ours) > load.held_out_scene(89, 9_999).seed and max(ours) < 10**6
    for bad in (-1, 9):
        with pytest.raises(ValueError, match="from 910,000 to 999,999"):
            conflict_samples(1, bad)


def test_repair_of_removal_is_a_plain_count():
    profile = load_profile("testbed")
    table = repair_table(profile)
    for removed in ("visual", "both"):
        for layer in (0, 5, 12):
            now = profile["correct"].sel(removed=removed, layer=layer).values
            full = profile["correct"].sel(removed=removed, layer=16).values
            row = table.loc[removed, layer]
            assert row["repaired"] == pytest.approx((now & ~full).mean())
            assert row["broken"] == pytest.approx((full & ~now).mean())
            assert row["broken_low"] <= row["broken"] <= row["broken_high"]


def test_windows_are_counted_by_the_truth():
    samples = [s for s in load.testbed_samples("derive") if s.family == "light"]
    at = [
        next(i for i, w in enumerate(("first", "second", "third", "fourth")) if w in s.question)
        for s in samples
    ]
    edges = [f"{m}@{k}->text" for m in ("visual", "audio") for k in range(4)]
    kl = np.zeros((len(samples), 8, 2))
    for i, window in enumerate(at):
        kl[i, window if i else (window + 1) % 4, 1] = 1  # the first one elsewhere
    coords = dict(sample=[s.id for s in samples], edge=edges)
    found = window_hits(xr.Dataset(dict(kl=(("sample", "edge", "layer"), kl)), coords), samples)
    (row,) = found.to_dict("records")
    assert row["family"] == "light" and row["questions"] == len(samples)
    assert row["share"] == pytest.approx(1 - 1 / len(samples))


def test_heads_that_stand_in_for_each_other_are_found_together():
    cells = [(layer, head) for layer in range(6) for head in range(4)]
    carry = {(2, 0), (2, 3), (4, 1)}  # the answer is lost by what share of them is blind
    sets = joint_sets(cells)
    change = [[[-(len(carry & set(s)) ** 2) / 9 for s in sets.values()]]]
    coords = dict(edge=["audio->text"], heads=list(sets))
    flow = xr.Dataset(dict(change=(("sample", "edge", "heads"), change)), coords)
    assert set(joint_heads(flow, cells, sets, 3)) == carry


def test_the_study(tmp_path):
    out = tmp_path / "flow.json"
    done(f"flow-study --limit 6 --out {out}")
    found = json.loads(out.read_text())
    heads = {r["heads"]: r for r in found["heads"] if r["edge"] == "audio->text"}
    flow = load_flow("testbed_heads")
    assert heads["alone"]["cells"] == [list(c) for c in strongest_heads(flow, "audio->text")]
    picked = {tuple(c) for name in ("alone", "jointly") for c in heads[name]["cells"]}
    drawn = [{tuple(c) for c in r["cells"]} for name, r in heads.items() if "random" in name]
    assert len(drawn) == 5 and all(len(d) == 10 and not d & picked for d in drawn)
    assert {r["family"] for r in found["conflicts"]} == set(CONFLICTS)
    assert {r["by"] for r in found["repair"]} == {"blocked", "removed"}
    assert "exists" in refused(f"flow-study --out {out}")


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("family", ["qwen2.5-omni", "qwen3-omni"])
def test_flops_are_those_that_torch_counts(family, heads, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    model, processor = tiny.thinker(family, 4), tiny.processor(family)
    config = model.config.get_text_config()
    monkeypatch.setattr(config, "_experts_implementation", "eager")  # the others are not counted
    one = [s for s in tiny.probed() if s.id == "open"]
    (questions,) = encode_questions(model, processor, one)
    walk = Knockouts(model, processor, questions)
    count = model.config.get_text_config().num_attention_heads
    _, blocked = jobs_of(np.eye(4, dtype=bool), heads, count)
    pairs = ("question", "last"), ("first", "question"), ("last", "answer"), ("first", "text")
    cuts = [cut for pair in pairs if (cut := walk.sides.cut(*pair))]
    branches = {i: Branches(cut, blocked) for i, cut in enumerate(cuts)}
    once = joined(branches)
    assert len(once) == len(cuts) - 1  # the first tokens to the question and to all text
    with FlopCounterMode(display=False) as counter:
        walk.branch(branches)
    c = walk.questions.shared
    blocked = blocked.any(-1)
    edges = [(len(b.cut.rows), len(b.cut.fixed), len(own), blocked) for b, own in once]
    logits = len(walk.tail.wanted)
    closed = flow_flops(
        model.config, c, len(walk.tail.ids), edges, logits=logits, convention="counter"
    )
    assert closed == counter.get_total_flops()
