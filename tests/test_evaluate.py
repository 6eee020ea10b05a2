"""Scores equal teacher forcing, tables pair questions, intervals resample clips."""

import json
import numpy as np, pandas as pd, pytest, torch
from scipy.special import ndtri
from seats_analysis.evaluation import evaluate as module
from seats_analysis.models.encode import encode
from seats_analysis.baselines.simple import Random
from seats_analysis.baselines.registry import METHODS, method_at
from seats_analysis.evaluation.evaluate import (
    accuracy_interval,
    accuracy_table,
    clip_weights,
    evaluate,
    load_samples,
)
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.testbed.load import build_processor, build_model

COLUMNS = {"id", "clip", "family", "split", "correct", "letter_correct", "nll", "prediction"}
PLAN = Schedule(
    num_layers=4,
    drop_layers=(1, 2),
    late_start=3,
    entering=dict(visual=0.4, audio=0.5),
    keep_ratios=dict(visual=(0.8, 0.5), audio=(0.8, 0.5)),
)


@pytest.fixture(scope="module")
def testbed():

    model = build_model(layers=4).eval()

    return model, build_processor()


def clip(seed, seconds=4, sight=True, sound=True):
    rng = np.random.default_rng(seed)
    return Clip(
        id=f"c{seed}",
        frames=rng.integers(0, 255, (int(2 * seconds), 56, 84, 3), dtype="uint8")
        if sight
        else None,
        fps=2.0,
        waveform=(rng.standard_normal(int(16000 * seconds)) * 0.1).astype("float32")
        if sound
        else None,
        sample_rate=16000,
    )


def ask(i, video, **kw):
    return Sample(
        **(
            dict(
                id=f"q{i}",
                video=video,
                question="what colour is the circle ?",
                choices=("red", "blue", "green", "white"),
                answer=i % 4,
                family="colour",
                split="test",
            )
            | kw
        )
    )


SAMPLES = [
    ask(0, clip(0)),
    ask(1, clip(0), lettered=True),
    ask(2, clip(1, 3, sound=False)),
    ask(
        3, clip(2, 5, sight=False), lettered=True, choices=("low", "high"), answer=1, family="tone"
    ),
    ask(4, None, family="control", choices=("monday", "tuesday", "sunday"), answer=0),
]


def by_force(model, processor, s, text):
    e = encode(model, processor, [s], answers=[text])
    ((a, b),) = e.answer_spans
    with torch.no_grad():
        logp = model(**e.inputs).logits[0].log_softmax(-1)
    return logp[torch.arange(a, b) - 1, e.inputs["input_ids"][0, a:b]]


def test_full_model_equals_teacher_forcing(testbed):
    frame = evaluate(*testbed, SAMPLES, batch_size=3)
    assert (
        COLUMNS <= set(frame)
        and list(frame.id) == [s.id for s in SAMPLES]
        and list(frame["clip"]) == ["c0", "c0", "c1", "c2", ""]
    )
    for row, s in zip(frame.itertuples(), SAMPLES):
        logp = [by_force(*testbed, s, t) for t in s.answer_texts]
        mean = np.array([p.mean().item() for p in logp])
        assert row.nll == pytest.approx(-logp[s.answer].sum().item(), abs=1e-5)
        assert row.prediction == s.choices[mean.argmax()] and row.correct == (
            mean.argmax() == s.answer
        )
        assert row.margin == pytest.approx(
            mean[s.answer] - np.delete(mean, s.answer).max(), abs=1e-5
        )
        if s.lettered:
            assert row.letter_correct == (np.argmax([p[0].item() for p in logp]) == s.answer)
        else:
            assert row.letter_correct is pd.NA
        assert row.chance == 1 / len(s.choices)


@pytest.mark.parametrize(
    "plan", [None, PLAN, Random(PLAN, seed=2)], ids=["full", "seats", "random"]
)
def test_batch_size_does_not_show(testbed, plan):
    together, alone = (evaluate(*testbed, SAMPLES, plan, batch_size=n) for n in (5, 1))
    np.testing.assert_allclose(together.nll, alone.nll, atol=1e-5)
    np.testing.assert_allclose(together.attrs["tokens_per_layer"], alone.attrs["tokens_per_layer"])


def test_pruning_is_what_changes(testbed):
    full, keep_all, pruned, blind = (
        evaluate(*testbed, SAMPLES, p)
        for p in (None, Schedule(num_layers=4), PLAN, Schedule(num_layers=4, late_start=0))
    )
    assert (
        full.equals(keep_all)
        and (pruned.nll != full.nll)[:4].all()
        and pruned.nll[4] == pytest.approx(full.nll[4], abs=1e-5)
    )
    assert (
        full.attrs["method"] == "full"
        and pruned.attrs["method"] == "seats"
        and set(pruned.attrs["timings"]) >= {"encoders", "selection", "prefill", "decode"}
    )
    assert max(blind.attrs["tokens_per_layer"]) == pytest.approx(
        np.mean([encode(*testbed, [s]).layout.text.sum().item() for s in SAMPLES])
    )


def test_model_is_clean_afterwards(testbed):
    with pytest.raises(ValueError, match="ids repeat"):
        evaluate(*testbed, [SAMPLES[0]] * 2, PLAN)
    with pytest.raises(TypeError):
        evaluate(*testbed, SAMPLES, plan=0.1)
    evaluate(*testbed, SAMPLES[:1], PLAN)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in testbed[0].modules())


def test_a_file_is_decoded_once(testbed, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "decode_clip", lambda path, **kw: opened.append(path) or clip(0))
    files = [ask(i, f"folder/{'ab'[i // 3]}.mp4") for i in range(6)]
    frame = evaluate(*testbed, files, PLAN, batch_size=2)
    assert (
        opened == ["folder/a.mp4", "folder/b.mp4"] and list(frame["clip"]) == ["a"] * 3 + ["b"] * 3
    )


def test_load_samples(tmp_path):
    rows = [
        dict(video=None, question="q", choices=["a", "b"], answer="b", split=s, id=str(i))
        for i, s in enumerate(["derive", "test", "test"])
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [s.id for s in load_samples(path)] == ["0", "1", "2"] and [
        s.id for s in load_samples(str(path), split="test", limit=1)
    ] == ["1"]
    with pytest.raises(ValueError, match="--split 'fresh': the data have 'derive', 'test'"):
        load_samples(path, split="fresh")
    with pytest.raises(ValueError, match="expected testbed, daily-omni"):
        load_samples("worldsens")
    path.write_text(json.dumps(dict(question="q", choices=["a"])))
    with pytest.raises(ValueError, match="mine.jsonl"):
        load_samples(path)


# ---------------------------------------------------------------- tables


def frame(right, clips=5, family=("colour", "control")):
    return pd.DataFrame(
        dict(
            id=[f"q{i}" for i in range(len(right))],
            clip=[f"c{i // clips}" for i in range(len(right))],
            family=[family[i % len(family)] for i in range(len(right))],
            correct=right,
            letter_correct=pd.array([None] * len(right), "boolean"),
            nll=1.0,
            chance=0.25,
        )
    )


def test_weights_draw_whole_clips():
    w = clip_weights(np.arange(30) // 3, 50)
    assert (w.reshape(50, 10, 3) == w.reshape(50, 10, 3)[..., :1]).all() and (w.sum(1) == 30).all()


def test_interval_is_a_cluster_bootstrap():
    rng = np.random.default_rng(0)
    right, clips = rng.random(60) < 0.7, np.arange(60) // 4
    means = [
        np.concatenate([right[clips == c] for c in rng.integers(0, 15, 15)]).mean()
        for _ in range(4000)
    ]
    np.testing.assert_allclose(
        accuracy_interval(right, clips, n_boot=4000), np.quantile(means, [0.025, 0.975]), atol=0.015
    )
    for share in (0, 1):  # the score interval of 5 clips, not of 20 questions, in closed form
        found = accuracy_interval(np.full(20, share), np.arange(20) // 4)
        end = ndtri(0.975) ** 2 / (5 + ndtri(0.975) ** 2)
        np.testing.assert_allclose(found, (1 - end, 1) if share else (0, end), atol=1e-9)


def test_table_by_hand():
    full = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 1], bool)
    lean = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 1], bool)
    table = accuracy_table(dict(full=frame(full), lean=frame(lean)))
    media, row = np.arange(10) % 2 == 0, table.loc[("lean", "all")]
    assert row.n == 5 and row.accuracy == pytest.approx(100 * lean[media].mean())
    assert row.relative == pytest.approx(100 * lean[media].sum() / full[media].sum())
    assert row.corrected == pytest.approx(
        100 * (lean[media].mean() - 0.25) / (full[media].mean() - 0.25)
    )
    assert table.loc[("lean", "control"), "accuracy"] == pytest.approx(100 * lean[~media].mean())
    assert accuracy_table(dict(lean=frame(lean)), "lean", apart=()).loc[("lean", "all"), "n"] == 10
    with pytest.raises(ValueError, match="no run"):
        accuracy_table(dict(lean=frame(lean)))
    with pytest.raises(ValueError, match="same questions"):
        accuracy_table(dict(full=frame(full), lean=frame(lean)[:-1]))


def test_nothing_right_gives_no_share():
    table = accuracy_table(dict(full=frame(np.zeros(10, bool)), lean=frame(np.ones(10, bool))))
    assert np.isnan(table.loc[("lean", "all"), ["relative", "corrected"]].astype(float)).all()


def test_registry():
    assert METHODS["seats"].name == "seats" and METHODS["random"] is Random
    with pytest.raises(ValueError, match="known: full, seats, random"):
        method_at("seat", PLAN, (40, 20))
