"""NaN and infinity: whatever a choice would be made from is refused with the stage and the layer,
never chosen from silently."""

import pytest
import tiny
import torch

from seats_analysis import METHODS, adapter_for, encode, prune
from seats_analysis.pruning.encoders import EncoderWatch

PLAN = tiny.schedule()
NAN, INF = float("nan"), float("inf")
pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.parametrize("family", ["qwen2.5-omni"], indirect=True, scope="session"),
]


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, [tiny.ask("0", tiny.clip(0)), tiny.ask("1", tiny.clip(1, 3))])


def spoilt(model, place, value, at=(..., 0)):
    "Inside, what comes out of a tower, or of a layer's MLP, has a bad value in some places."
    adapter = adapter_for(model)
    towers = dict(visual=adapter.visual(model).merger, audio=adapter.audio_tower(model).proj)
    return tiny.spoilt(towers.get(place) or adapter.layers(model)[place].mlp, value, at)


def first_choice(place, *rows):
    """What is said of the first choice that is made from what this place holds, and of what mostly
    is the reason: an activation beyond the range of float16."""
    if place in ("visual", "audio"):
        before, what = "stage I, before layer 0", f"{place} features"
    else:
        drop = next(d for d in PLAN.drop_layers if d > place)
        before, what = f"stage II, before layer {drop}", "scores"
    return (
        f"{before}: " + ", ".join(f"the {what} of sample {row}" for row in rows) + " hold .*float16"
    )


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("place", ("visual", "audio", 0, 1, 2))
def test_the_first_choice_from_it_is_named(model, batch, place, value):
    said = first_choice(place, 0, 1)
    with spoilt(model, place, value), prune(model, PLAN) as run:
        with pytest.raises(ValueError, match=said):
            model(**batch.inputs)
        assert run.kept == {}  # nothing is reported as kept
        with pytest.raises(ValueError, match=said):
            model.generate(**batch.inputs, max_new_tokens=2)


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize(
    "place, row, at", [(1, 0, (0, ..., 0)), (1, 1, (1, ..., 0)), ("visual", 1, (-1, 3))]
)
def test_only_the_broken_sample_is_named(model, batch, place, row, at, value):
    "Also where it is a single token, the last visual one."
    with spoilt(model, place, value, at), prune(model, PLAN):
        with pytest.raises(ValueError, match=first_choice(place, row)):
            model(**batch.inputs)


def test_broken_attention_is_noticed(model, batch, monkeypatch):
    "The features may be fine, and the attention that weighs them not."
    whole = EncoderWatch.aggregate

    def spoil(watch, modality, call, q, k):
        whole(watch, modality, call, q, k)
        if modality == "audio":
            call.received[0] = torch.nan

    monkeypatch.setattr(EncoderWatch, "aggregate", spoil)
    with prune(model, PLAN), pytest.raises(ValueError, match=first_choice("audio", 0)):
        model(**batch.inputs)


def test_a_choice_that_looks_at_nothing_is_not_stopped(model, batch):
    """Random tokens need no scores: NaN in the middle of the model is the model's own matter, as it
    is without pruning."""
    with spoilt(model, 1, NAN):
        assert model(**batch.inputs).logits.isnan().any()
        with prune(model, METHODS["random"](PLAN)):
            assert model(**batch.inputs).logits.isnan().any()
