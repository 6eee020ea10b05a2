"""Crowded scenes leave the others alone; the testbeds attend over whole frames."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from seats_analysis.inputs.samples import Sample
from seats_analysis.lab import train
from seats_analysis.lab.batches import Batch, TrainConfig, features
from seats_analysis.models.encode import encode
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.testbed.load import TESTBEDS, load_testbed
from seats_analysis.testbed.task import Scene

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "testbed"


def digest(seeds, **draw):
    "Frames, sound, caption and one question of each family, of some scenes."
    h = hashlib.sha256()
    for seed in seeds:
        scene = Scene.draw(seed, 2 + seed % 3, **draw)
        h.update(scene.frames().tobytes())
        h.update((1e4 * scene.waveform()).round().astype("int32").tobytes())  # sines differ by CPU
        rng = random.Random(seed)
        asked = [scene.ask(f, rng, lettered=rng.random() < 0.5) for f in scene.families]
        told = [(q.id, q.question, q.choices, q.answer, q.lettered) for q in asked]
        h.update(repr((scene.caption(), told)).encode())
    return h.hexdigest()


def test_plain_scenes_are_what_they_were():
    "The digest was taken before there were crowded scenes."
    seeds = [0, 5, 1000, 10007, 1234567, 77_001_000_003, *range(20_000, 20_020)]
    assert digest(seeds) == "e78e41bd2e74d2533d46f01af2a4a2d7f889e8351e3274ad2d329c638c4e7217"
    assert digest(seeds[:2], crowded=True) != digest(seeds[:2])


def test_batches_of_the_recipe_without_crowds_are_what_they_were():
    "No decoy in them, and the read-outs of things and sounds alone."
    batch = Batch.of_step(2400 + 1, TrainConfig(batch=2))
    assert list(batch.hints) == ["colour", "shape", "place", "light", "pitch", "kind"]
    said = [b.ids for row in batch.branches for b in row]
    hinted = {name: classes.tolist() for name, classes in batch.hints.items()}
    made = hashlib.sha256(repr((said, hinted)).encode()).hexdigest()
    assert made == "e7a22b99ce774629001c681370eca8e033f95611be885affc834fe2d9bb1dd9c"


def crowded_scenes(n):
    return [Scene.draw(77_001_000_000 + k, crowded=True) for k in range(n)]


def test_decoys_are_apart_from_evidence_and_unspoken():
    for scene in crowded_scenes(50):
        cells = [t.token for t in (*scene.things, *scene.decoys)]
        assert len(set(cells)) == len(cells) and max(cells) < 192
        assert all(5 <= sum(t.window == w for t in scene.decoys) <= 8 for w in range(4))
        for noise in scene.noises:
            near = [s for s in scene.sounds if s.window == noise.window]
            assert all(abs(s.onset - noise.onset) > 0.45 for s in near)
            assert noise.onset + 0.25 < scene.WINDOW_SECONDS
        assert all(t.hollow for t in scene.decoys) and not any(t.hollow for t in scene.things)
        spoken = scene.caption().split(" then ")
        for w, part in enumerate(spoken):  # a light, three words an object, two a sound
            there = (
                sum(t.window == w for t in scene.things),
                sum(s.window == w for s in scene.sounds),
            )
            assert len(part.split()) == 1 + 3 * there[0] + 2 * there[1]


def test_wrong_choices_come_from_the_clip_first():
    "No colour that is nowhere while one that is somewhere is not offered."
    for k, scene in enumerate(crowded_scenes(50)):
        for family in ("colour", "see_while_hear", "sequence"):
            if family not in scene.families:
                continue
            q = scene.ask(family, random.Random(k))
            seen = {t.colour for t in scene.things}
            asked = {q.question.split()[-2]} if family == "sequence" else set()
            assert len(set(q.choices)) == 4 and not asked & set(q.choices)
            assert len(seen & set(q.choices)) == min(4, len(seen - asked))
            there = seen | {t.colour for t in scene.decoys}
            assert len(there & set(q.choices)) == min(4, len(there - asked))


def test_hints_name_every_decoy():
    scenes = crowded_scenes(3)
    told = train.Batch._of(scenes, [[]] * 3, TrainConfig(crowded=1.0), told=False).hints
    for b, scene in enumerate(scenes):
        assert (told["rim"][b] > 0).sum() == len(scene.decoys)
        assert (told["colour"][b] > 0).sum() == len(scene.things)
        assert not (told["rim"][b] > 0)[[t.token for t in scene.things]].any()
        frames = told["thing"][b].view(8, 24)
        with_thing = {2 * t.window + t.second for t in scene.things}
        for grid, row in enumerate(frames):
            assert set(row.tolist()) - {-100} == {1 + (grid in with_thing)}


def test_the_last_vision_block_spans_a_frame():
    "The segments that the tower's last block is handed: frames of 24 cells of four patches."
    model, _ = load_testbed()
    seen = []
    last = train.adapter_for(model).visual(model).blocks[-1]
    last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["cu_seqlens"]), with_kwargs=True
    )
    patches, mel = features([Scene.draw(3)], "qwen2.5-omni")
    train.embed_clips(model, Batch([()], patches=patches, mel=mel), "qwen2.5-omni")
    assert set(seen[0].diff().tolist()) == {96}


def test_beside_a_sound_nothing_is_asked_or_nothing_is_there():
    "A sound lasts two or three tokens, of which hints name the middle one."
    scenes = crowded_scenes(3)
    for beside in (False, True):
        c = TrainConfig(crowded=1.0, beside=beside)
        told = train.Batch._of(scenes, [[]] * 3, c, told=False).hints
        for b, scene in enumerate(scenes):
            for what, name in ((scene.sounds, "pitch"), (scene.noises, "noise")):
                for s in what:
                    asked = told[name][b].tolist()
                    assert asked[s.token] > 0
                    around = {asked[i] for i in (s.token - 1, s.token + 1) if 0 <= i < len(asked)}
                    assert around - {x for x in asked if x > 0} <= {0 if beside else -100}


@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
def test_evidence_receives_attention_and_survives(name, monkeypatch):
    "Its token receives more than the mean of its window, and Stage I keeps it."
    model, processor = load_testbed(TESTBEDS[name])
    *_, last = (SHIPPED / TESTBEDS[name] / "train_log.jsonl").read_text().splitlines()
    stored = json.loads(last)["weights_sha256"]
    assert stored == train.adapter_for(model).hash_weights(model)
    scenes = crowded_scenes(8)
    asked = [Sample(s.clip(), s.CAPTION, (s.caption(),), 0) for s in scenes]
    batch = encode(model, processor, asked)
    seen = []  # attention received, and which are kept: visual tokens, then those of the sound

    def select(self, inputs):
        keep = real(self, inputs)
        seen.append((inputs.attention, keep))
        return keep

    real = Seats.select
    monkeypatch.setattr(Seats, "select", select)
    with prune(model, Schedule.load(f"{name}/35")), torch.no_grad():
        model(**batch.inputs)
    pairs = zip(*(x.split([8 * 192, 8 * 40]) for x in seen[0]))
    for window, what, pair in zip((48, 10), ("things", "sounds"), pairs, strict=True):
        received, keep = (x.view(8, -1) for x in pair)
        mean = received.unflatten(1, (-1, window)).mean(-1)
        assert torch.allclose(mean, torch.ones_like(mean), atol=1e-4)
        at = [(b, x.token) for b, s in enumerate(scenes) for x in getattr(s, what)]
        assert torch.stack([received[i] for i in at]).median() > 1
        assert sum(bool(keep[i]) for i in at) > 0.9 * len(at)
