"""NaN and infinity: whatever a choice would be made from is refused with the stage and the layer,
never chosen from silently."""

import numpy as np, pytest, torch
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.baselines.registry import METHODS
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.testbed.load import build_processor, build_model

LAYERS, DROPS = 5, (2, 3)
PLAN = Schedule(
    num_layers=LAYERS,
    drop_layers=DROPS,
    late_start=4,
    entering=dict(visual=0.4, audio=0.5),
    keep_ratios=dict(visual=(0.8, 0.5), audio=(0.9, 0.6)),
)


@pytest.fixture(scope="module")
def model():

    model = build_model(layers=LAYERS, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def batch(model):
    rng = np.random.default_rng(0)
    clips = [
        Clip(
            id=str(i),
            frames=rng.integers(0, 255, (2 * n, 56, 84, 3), dtype="uint8"),
            fps=2.0,
            sample_rate=16000,
            waveform=(rng.standard_normal(16000 * n) * 0.1).astype("float32"),
        )
        for i, n in enumerate((4, 3))
    ]
    return encode(
        model,
        build_processor(),
        [
            Sample(id=c.id, video=c, question=q, choices=("red", "blue"), answer=0)
            for c, q in zip(clips, ("what colour is the circle ?", "where is the red object ?"))
        ],
    )


pytestmark = pytest.mark.usefixtures("no_grad")


def module(model, place):
    ad = adapter_for(model)
    return {
        "visual": ad.visual(model).merger,
        "audio": ad.audio_tower(model).proj,
        **{i: ad.layers(model)[i].mlp for i in range(LAYERS)},
    }[place]


class spoilt:
    """Inside, a module's output has one bad value in it: at every position of the given rows, or of
    all."""

    def __init__(self, module, value, rows=slice(None)):
        self.module, self.value, self.rows = module, value, rows

    def __enter__(self):
        def spoil(module, args, output):
            output = output.clone()
            output[self.rows, ..., 0] = self.value
            return output

        self.handle = self.module.register_forward_hook(spoil)

    def __exit__(self, *_):
        self.handle.remove()


bad = pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))


@bad
@pytest.mark.parametrize(
    "place, where",
    [
        (
            "visual",
            "stage I, before layer 0: the visual features of sample 0, the visual "
            "features of sample 1 hold",
        ),
        (
            "audio",
            "stage I, before layer 0: the audio features of sample 0, the audio features "
            "of sample 1 hold",
        ),
        (
            0,
            f"stage II, before layer {DROPS[0]}: the scores of sample 0, the scores of "
            "sample 1 hold",
        ),
        (
            1,
            f"stage II, before layer {DROPS[0]}: the scores of sample 0, the scores of "
            "sample 1 hold",
        ),
        (
            2,
            f"stage II, before layer {DROPS[1]}: the scores of sample 0, the scores of "
            "sample 1 hold",
        ),
    ],
)
def test_the_first_choice_from_it_is_named(model, batch, place, where, value):
    with spoilt(module(model, place), value), prune(model, PLAN) as run:
        with pytest.raises(ValueError, match=where):
            model(**batch.inputs)
        assert run.kept == {}  # nothing is reported as kept
        with pytest.raises(ValueError, match=where):
            model.generate(**batch.inputs, max_new_tokens=2)


@bad
@pytest.mark.parametrize("row", (0, 1))
def test_only_the_broken_sample_is_named(model, batch, row, value):
    with spoilt(module(model, 1), value, rows=row), prune(model, PLAN):
        with pytest.raises(
            ValueError, match=f"stage II, before layer {DROPS[0]}: the scores of sample {row} hold"
        ):
            model(**batch.inputs)


def test_one_bad_token_is_enough(model, batch):
    "A single visual token of the second sample."

    def spoil(module, args, output):
        output = output.clone()
        output[-1, 3] = torch.inf
        return output

    handle = adapter_for(model).visual(model).merger.register_forward_hook(spoil)
    try:
        with (
            prune(model, PLAN),
            pytest.raises(
                ValueError, match="stage I, before layer 0: the visual features of sample 1 hold"
            ),
        ):
            model(**batch.inputs)
    finally:
        handle.remove()


def test_broken_attention_is_noticed(model, batch, monkeypatch):
    "The features may be fine, and the attention that weighs them not."
    from seats_analysis.pruning.encoders import EncoderWatch

    whole = EncoderWatch.aggregate

    def spoil(watch, modality, call, q, k):
        whole(watch, modality, call, q, k)
        if modality == "audio":
            call.received[0] = torch.nan

    monkeypatch.setattr(EncoderWatch, "aggregate", spoil)
    with (
        prune(model, PLAN),
        pytest.raises(
            ValueError, match="stage I, before layer 0: the audio features of sample 0 hold"
        ),
    ):
        model(**batch.inputs)


def test_overflow_in_half_precision(model, batch):
    "What happens in practice: an activation beyond the range of float16."
    half = adapter_for(model).layers(model)[1].mlp
    handle = half.register_forward_hook(lambda m, args, out: (out * 1e6).half().float())
    try:
        with (
            prune(model, PLAN),
            pytest.raises(ValueError, match=f"stage II, before layer {DROPS[0]}.*float16"),
        ):
            model(**batch.inputs)
    finally:
        handle.remove()


def test_the_next_pass_is_fine(model, batch):
    with prune(model, PLAN):
        good = model(**batch.inputs).logits
    with prune(model, PLAN) as run:
        with spoilt(module(model, 1), float("nan")), pytest.raises(ValueError):
            model(**batch.inputs)
        assert torch.equal(model(**batch.inputs).logits, good) and run.kept
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_choice_that_looks_at_nothing_is_not_stopped(model, batch):
    """Random tokens need no scores: NaN in the middle of the model is the model's own matter, as it
    is without pruning."""
    with spoilt(module(model, 1), float("nan")):
        assert model(**batch.inputs).logits.isnan().any()
        with prune(model, METHODS["random"](PLAN)):
            assert model(**batch.inputs).logits.isnan().any()
