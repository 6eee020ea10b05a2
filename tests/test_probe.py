"""The probe against a naive one: a complete stock forward for every layer, condition and choice."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tiny
import torch

from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.decoder import Decoder
from seats_analysis.inputs.layout import Modality
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.storage.schemas import load_profile, save_profile
from seats_analysis.models.provenance import sample_rows
from seats_analysis.probing.run import PROBE_METHODS, probe_dependency
from seats_analysis.storage.provenance import digest

VISUAL, AUDIO = Modality.CODES.values()

LAYERS = 3
KINDS = {"visual": (VISUAL,), "audio": (AUDIO,), "both": (VISUAL, AUDIO)}


def make_clip(seconds, seed, sound=True):
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(int(16000 * seconds), "float32") * 0.1 if sound else None
    return Clip(
        f"clip{seed}",
        rng.integers(0, 255, (int(2 * seconds), 112, 112, 3), dtype="uint8"),
        2.0,
        wave,
        16000,
    )


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration
    from seats_analysis.testbed.load import build_config

    torch.manual_seed(0)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(
        build_config(layers=LAYERS, tower=32)
    ).eval()
    for p in thinker.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(
                p, std=2 * p[0].numel() ** -0.5
            )  # loud enough that removal matters
    return thinker


@pytest.fixture(scope="module")
def processor():
    return tiny.tight_processor()


@pytest.fixture(scope="module")
def samples():
    "Different lengths, with and without letters, answers of one to three tokens, silent, text."
    words = ("red", "green circle", "blue", "upper-left red square")
    return [
        Sample("open", make_clip(3, 0), "what colour is the circle ?", words, 3, "a", "derive"),
        Sample(
            "letters", make_clip(2, 1), "what is it ?", words[:3], 1, "a", "test", lettered=True
        ),
        Sample(
            "silent",
            make_clip(2, 2, sound=False),
            "where is the red object ?",
            words[:2],
            0,
            "b",
            "test",
        ),
        Sample(
            "text", None, "what day comes after monday ?", ("tuesday", "friday"), 0, "c", "test"
        ),
    ]


@pytest.fixture(scope="module")
def profiles(model, processor, samples):
    return {
        method: probe_dependency(model, processor, samples, method=method, progress=False)
        for method in PROBE_METHODS
    }


@pytest.fixture(scope="module", params=PROBE_METHODS)
def profile(profiles, request):
    return profiles[request.param]


class Remover:
    "Hooks on a stock model: positions leave before one layer, later ones get shorter tables."

    def __init__(self, model, layout, layer, kinds):
        gone = torch.zeros(layout.shape, dtype=torch.bool)
        for k in kinds:
            gone |= layout.modality == k
        self.keep, self.layer = (~gone)[0].nonzero()[:, 0], layer
        self.hooks = [
            m.register_forward_pre_hook(self.hook(i), with_kwargs=True)
            for i, m in enumerate(adapter_for(model).layers(model))
            if i >= layer
        ]

    def hook(self, i):
        def before(module, args, kwargs):
            hidden = args[0][:, self.keep] if i == self.layer else args[0]
            rotary = tuple(t[:, self.keep] for t in kwargs["position_embeddings"])
            return (hidden, *args[1:]), dict(
                kwargs, position_embeddings=rotary, attention_mask=None
            )

        return before

    def __enter__(self):
        return self

    def __exit__(self, *error):
        [h.remove() for h in self.hooks]


@torch.no_grad()
def naive(model, processor, sample, layer, kinds):
    "Log-probabilities per token of each choice, and those at the answer position."
    rows = []
    for text in sample.answer_texts:
        e = encode(model, processor, [sample], answers=[text])
        n = e.answer_length.item()
        with Remover(model, e.layout, layer, kinds):
            logp = model(**e.inputs, use_cache=False).logits[0].log_softmax(-1)
        target = e.inputs["input_ids"][0, -n:]
        rows.append(logp[-n - 1 : -1][torch.arange(n), target])
    return rows, logp[-n - 1]


@pytest.fixture(scope="module")
def by_force(model, processor, samples):
    return cache(lambda i, layer, kinds: naive(model, processor, samples[i], layer, kinds))


@pytest.mark.parametrize("removed", KINDS)
def test_equals_the_naive_probe(by_force, samples, profile, removed):
    for i, s in enumerate(samples):
        _, full = by_force(i, LAYERS, ())
        for layer in range(LAYERS + 1):
            rows, answer = by_force(i, layer, KINDS[removed])
            rows = list(rows)
            mean, got = (
                [r.mean().item() for r in rows],
                profile.isel(sample=i).sel(removed=removed, layer=layer),
            )
            right = mean.pop(s.answer)
            assert got.nll.item() == pytest.approx(-rows[s.answer].sum().item(), abs=2e-5)
            assert got.margin.item() == pytest.approx(right - max(mean), abs=2e-5)
            assert got.kl.item() == pytest.approx(
                (full.exp() * (full - answer)).sum().item(), abs=2e-5
            )
            if abs(right - max(mean)) > 1e-4:
                assert got.correct.item() == (right > max(mean))
            first = [r[0].item() for r in rows]
            letter = float(first.index(max(first)) == s.answer) if s.lettered else np.nan
            np.testing.assert_equal(got.correct_letter.item(), letter)


def test_removal_matters_and_ends_at_the_full_model(profile):
    "Otherwise the comparison above would prove nothing."
    assert (profile.kl.sel(sample="open", layer=0) > 1e-3).all()
    assert (profile.kl.sel(layer=LAYERS) == 0).all()
    assert (profile.kl.sel(sample="text") < 1e-6).all()
    assert (profile.kl.sel(sample="silent", removed="audio") < 1e-6).all()


def test_removing_both_before_layer_0_is_text_only_input(model, processor, samples, profile):
    "The decoder on the text embeddings alone, at their positions in the full sequence."
    s = samples[1]
    e = encode(model, processor, [s], answers=[s.answer_texts[s.answer]])
    text, n = e.layout.text[0], e.answer_length.item()
    with torch.no_grad():
        embeds = Decoder(model).inputs(e.inputs)["inputs_embeds"][:, text]
        hidden = (
            adapter_for(model)
            .decoder(model)(
                inputs_embeds=embeds, position_ids=e.position_ids[..., text], use_cache=False
            )
            .last_hidden_state
        )
        logp = adapter_for(model).lm_head(model)(hidden)[0].log_softmax(-1)
    nll = -logp[-n - 1 : -1][torch.arange(n), e.inputs["input_ids"][0, -n:]].sum()
    assert profile.nll.sel(sample="letters", removed="both", layer=0).item() == pytest.approx(
        nll.item(), abs=2e-5
    )


def test_batching_and_order_change_nothing(model, processor, samples, profile):
    for size in (1, 3):
        other = probe_dependency(
            model, processor, samples[::-1], method="plain", batch_size=size, progress=False
        ).sel(sample=profile.sample)
        for name in ("nll", "margin", "kl"):
            np.testing.assert_allclose(other[name], profile[name], atol=2e-5, rtol=5e-6)
        assert (other.correct == profile.correct).all()


def test_deterministic(model, processor, samples, profile):
    assert profile.identical(
        probe_dependency(model, processor, samples, method=profile.attrs["method"], progress=False)
    )


def test_some_layers_one_condition(model, processor, samples, profile):
    part = probe_dependency(model, processor, samples, removed="both", layers=[2], progress=False)
    assert part.layer.values.tolist() == [2, LAYERS] and part.removed.values.tolist() == ["both"]
    np.testing.assert_allclose(
        part.nll.sel(layer=2, removed="both"), profile.nll.sel(layer=2, removed="both"), atol=2e-5
    )


def test_coordinates_and_attributes(model, samples, profile):
    assert profile.nll.dims == ("sample", "removed", "layer")
    assert profile.layer.values.tolist() == list(range(LAYERS + 1))
    assert (
        profile.family.values.tolist() == ["a", "a", "b", "c"]
        and profile.split.values.tolist()[0] == "derive"
    )
    assert profile["clip"].values.tolist() == ["clip0", "clip1", "clip2", ""]
    assert profile.correct.dtype == bool and profile.nll.attrs["units"] == "nats"
    assert profile.attrs["weights_sha256"] == adapter_for(model).hash_weights(
        model
    ) and profile.attrs["data_sha256"] == digest(sample_rows(samples))
    assert {
        "model",
        "revision",
        "prompt_sha256",
        "seed",
        "versions",
        "threads",
        "method",
        "needs",
    } <= set(profile.attrs)


def test_hashes_notice_changes(model, samples):
    adapter = adapter_for(model)
    before = adapter.hash_weights(model)
    weight = adapter.lm_head(model).weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1
    changed = adapter.hash_weights(model)
    with torch.no_grad():
        weight[0, 0] = kept  # subtracting again would leave a rounding error
    assert changed != before
    assert sample_rows([replace(samples[0], answer=0)]) != sample_rows(samples[:1])
    assert sample_rows([replace(samples[0], video=make_clip(3, 9))]) != sample_rows(samples[:1])
    assert sample_rows([replace(samples[0], video=make_clip(3, 0))]) == sample_rows(samples[:1])


def test_model_is_left_alone(model, processor, samples):
    def state():
        return {
            n: (sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks), m.training)
            for n, m in model.named_modules()
        }

    deltas = [m for m in model.modules() if "rope_deltas" in vars(m)]
    for m in deltas:
        m.rope_deltas = "untouched"
    before = state()
    probe_dependency(model, processor, samples[:2], layers=[1], progress=False)
    assert state() == before and all(m.rope_deltas == "untouched" for m in deltas) and deltas
    for m in deltas:
        m.rope_deltas = None


def test_eager_attention(model, processor, samples, profile):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    eager = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        deepcopy(model.config), attn_implementation="eager"
    ).eval()
    eager.load_state_dict(model.state_dict())
    other = probe_dependency(
        eager, processor, samples, removed="both", method=profile.attrs["method"], progress=False
    )
    np.testing.assert_allclose(
        other.nll.sel(removed="both"), profile.nll.sel(removed="both"), atol=1e-4
    )


def test_files(profile, tmp_path):
    path = save_profile(profile, tmp_path / "sub" / "p.nc")
    assert profile.identical(load_profile(path))
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not a dependency profile"):
        save_profile(profile.assign_attrs(schema="x"), path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["p.nc"]
    path.write_bytes(old[: len(old) // 2])
    with pytest.raises(ValueError, match="p.nc: not a readable NetCDF"):
        load_profile(path)
    with pytest.raises(ValueError, match="no such file"):
        load_profile(tmp_path / "none.nc")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(removed="smell"), "not one of visual"),
        (dict(removed=()), "once"),
        (dict(layers=[LAYERS + 1]), f"outside 0..{LAYERS}"),
        (dict(method="guess"), "'guess' is not known"),
        (dict(layers="all"), "'all' is not known"),
        (dict(max_branch_tokens=0), "at least 1"),
        (dict(shard=(2, 2)), "below the number"),
        (dict(shard=(0, 2)), "need a checkpoint"),
    ],
)
def test_bad_arguments(model, processor, samples, change, message):
    with pytest.raises(ValueError, match=message):
        probe_dependency(model, processor, samples, progress=False, **change)


def test_bad_samples_and_models(model, processor, samples):
    with pytest.raises(ValueError, match="at least one sample"):
        probe_dependency(model, processor, [])
    with pytest.raises(ValueError, match="'open' occurs more than once"):
        probe_dependency(model, processor, samples[:1] * 2)
    with pytest.raises(ValueError, match="known families"):
        probe_dependency(torch.nn.Linear(1, 1).eval(), processor, samples)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            probe_dependency(model, processor, samples)
    finally:
        model.eval()
