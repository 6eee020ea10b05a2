"""Scores equal teacher forcing, tables pair questions, intervals resample clips."""

import itertools
from dataclasses import replace

import naive
import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from seats_analysis import Schedule, accuracy_table, encode, evaluate
from seats_analysis.baselines.base import Random
from seats_analysis.evaluation import evaluate as module
from seats_analysis.evaluation.evaluate import parse_answer

PLAN = tiny.schedule()
ASK = tiny.ask("0", tiny.clip(0))
SAMPLES = [
    ASK,
    replace(ASK, id="1", answer=0, lettered=True),
    tiny.ask("2", tiny.clip(1, 3, sound=False)),
    replace(ASK, id="3", video=tiny.clip(2, sight=False), choices=("low", "high"), lettered=True),
    replace(ASK, id="4", video=None, choices=("monday", "tuesday", "sunday"), answer=0),
]


@pytest.fixture(scope="module")
def omni():
    return tiny.thinker(tiny.FAMILIES[0]), tiny.processor(tiny.FAMILIES[0])


def by_force(model, processor, s, text):
    e, n = naive.with_answer(model, processor, s, text)
    b = e.shape[1]
    a = b - n
    with torch.no_grad():
        logp = model(**e.inputs).logits[0].log_softmax(-1)
    return logp[torch.arange(a, b) - 1, e.inputs["input_ids"][0, a:b]]


def test_full_model_equals_teacher_forcing(omni):
    frame = evaluate(*omni, SAMPLES, batch_size=3)
    assert list(frame.id) == list("01234")
    assert list(frame["clip"]) == ["c0", "c0", "c1", "c2", ""]
    assert {*frame.family} == {s.family for s in SAMPLES} and {*frame.split} == {ASK.split}
    for row, s in zip(frame.itertuples(), SAMPLES):
        logp = [by_force(*omni, s, t) for t in s.answer_texts]
        mean = np.array([p.mean().item() for p in logp])
        best_wrong = np.delete(mean, s.answer).max()
        assert row.nll == pytest.approx(-logp[s.answer].sum().item(), abs=1e-5)
        assert row.margin == pytest.approx(mean[s.answer] - best_wrong, abs=1e-5)
        assert row.correct == (mean.argmax() == s.answer)
        assert row.prediction == s.choices[mean.argmax()]
        assert row.chance == 1 / len(s.choices)
        if s.lettered:
            assert row.letter_correct == (np.argmax([p[0].item() for p in logp]) == s.answer)
        else:
            assert row.letter_correct is pd.NA


@pytest.mark.parametrize("plan", [None, PLAN, Random(PLAN, seed=2)])
def test_batch_size_does_not_show(omni, plan):
    together, alone = (evaluate(*omni, SAMPLES, plan, batch_size=n) for n in (5, 1))
    np.testing.assert_allclose(together.nll, alone.nll, atol=1e-5)
    np.testing.assert_allclose(together.attrs["tokens_per_layer"], alone.attrs["tokens_per_layer"])


def test_pruning_is_what_changes(omni):
    plans = None, Schedule(tiny.LAYERS), PLAN, Schedule(tiny.LAYERS, late_start=0)
    full, keep_all, pruned, blind = (evaluate(*omni, SAMPLES, p) for p in plans)
    assert full.equals(keep_all)
    assert (pruned.nll != full.nll)[:4].all()
    assert pruned.nll[4] == pytest.approx(full.nll[4], abs=1e-5)
    assert (full.attrs["method"], pruned.attrs["method"]) == ("full", "seats")
    assert set(pruned.attrs["timings"]) >= {"encoders", "selection", "prefill", "decode"}
    text = np.mean([encode(*omni, [s]).layout.text.sum().item() for s in SAMPLES])
    assert max(blind.attrs["tokens_per_layer"]) == pytest.approx(text)


def test_model_is_clean_afterwards(omni):
    with pytest.raises(ValueError, match="ids repeat"):
        evaluate(*omni, [ASK] * 2, PLAN)
    with pytest.raises(TypeError):
        evaluate(*omni, SAMPLES, plan=0.1)
    evaluate(*omni, [ASK], PLAN)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in omni[0].modules())


def test_a_file_is_decoded_once(omni, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "decode_clip", lambda path, **kw: opened.append(path) or ASK.video)
    files = [replace(ASK, id=str(i), video=f"folder/{'ab'[i // 3]}.mp4") for i in range(6)]
    frame = evaluate(*omni, files, PLAN, batch_size=2)
    assert opened == ["folder/a.mp4", "folder/b.mp4"]
    assert list(frame["clip"]) == ["a"] * 3 + ["b"] * 3


def test_parsing_never_guesses():
    "Text that names no choice, or two, is unparsable; only what names one is taken."
    assert parse_answer("Option red.", ("Option red", "red")) == 0
    choices = ("red", "green circle", "blue")
    words = (*choices, "A", "B.", "(C)", "D", "or", "not")
    for said in itertools.chain(*(itertools.product(words, repeat=n) for n in (1, 2, 3))):
        named = {choices.index(w) for w in said if w in choices}
        letters = {"ABC".index(w.strip("(.)")) for w in said if w.strip("(.)") in "ABC"}
        for lettered, meant in ((False, named), (True, named | letters)):
            pick = parse_answer(" ".join(said), choices, lettered)
            assert pick is None or meant == {pick}, said
            if len(said) == 1:
                assert (pick is not None) == bool(meant)


# ---------------------------------------------------------------- statistics


def frame(right):
    return pd.DataFrame(
        dict(
            id=[f"q{i}" for i in range(10)],
            clip=[f"c{i // 5}" for i in range(10)],
            family=["colour", "control"] * 5,
            correct=np.array(right, bool),
            letter_correct=pd.array([None] * 10, "boolean"),
            nll=1.0,
            chance=0.25,
        )
    )


def test_table_by_hand():
    full = frame([1, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    lean = frame([1, 1, 0, 1, 0, 0, 1, 1, 1, 1])
    table = accuracy_table(dict(full=full, lean=lean))

    def row(right):  # of all families but the control
        return accuracy_table(dict(full=full, lean=right)).loc[("lean", "all")]

    # 3 of 5 are right, 3 of 5 with the full model
    names = ["n", "accuracy", "relative", "corrected"]
    assert row(lean)[names].tolist() == pytest.approx([5, 60, 100, 100])
    assert row(frame([1] * 10))[names[2:]].tolist() == pytest.approx([500 / 3, 100 * 0.75 / 0.35])
    assert [table.loc[(run, "control"), "accuracy"] for run in ("lean", "full")] == [80, 100]
    alone = accuracy_table(dict(lean=lean), "lean")
    assert alone.loc[("lean", "all"), ["n", "relative"]].tolist() == [5, 100]
    full = frame([0] * 10)
    assert row(lean)[names[2:]].isna().all()
