"""The probe against a naive one: a plain loop over all layers for every layer, condition and
choice."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import naive
import numpy as np
import pytest
import tiny
import torch
from test_undo import state

from seats_analysis import adapter_for, encode, load_profile, probe_dependency
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.provenance import sample_rows
from seats_analysis.models.scoring import score_choices
from seats_analysis.storage.provenance import digest
from seats_analysis.storage.schemas import save_profile

LAYERS = 3
KINDS = {name: (code,) for name, code in Modality.CODES.items()}
KINDS["both"] = tuple(Modality.CODES.values())


@pytest.fixture(scope="module")
def model():
    return tiny.thinker("qwen2.5-omni", LAYERS)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen2.5-omni")


@pytest.fixture(scope="module")
def samples():
    "Different lengths, with and without letters, answers of one to three tokens, silent, text."
    return [s for s in tiny.probed() if s.id in ("open", "letters", "silent", "text")]


@pytest.fixture(scope="module")
def ask(model, processor):
    return partial(probe_dependency, model, processor, progress=False)


@pytest.fixture(scope="module")
def profile(ask, samples):
    return ask(samples)


@pytest.fixture(scope="module")
def by_force(model, processor, samples):
    @cache
    @torch.no_grad()
    def found(i, layer, kinds):
        "Log-probabilities per token of each choice, and those at the answer position."
        rows = []
        for text in samples[i].answer_texts:
            e = encode(model, processor, [samples[i]], answers=[text])
            n = e.answer_length.item()
            logp = naive.removed(model, e, layer, kinds).log_softmax(-1)
            rows.append(logp[-n - 1 : -1][torch.arange(n), e.inputs["input_ids"][0, -n:]])
        return rows, logp[-n - 1]

    return found


@pytest.mark.parametrize("removed", KINDS)
def test_equals_the_naive_probe(by_force, samples, profile, removed):
    for i, s in enumerate(samples):
        _, full = by_force(i, LAYERS, ())
        for layer in range(LAYERS + 1):
            rows, answer = by_force(i, layer, KINDS[removed])
            got = profile.isel(sample=i).sel(removed=removed, layer=layer)
            mean = [r.mean().item() for r in rows]
            margin = mean.pop(s.answer) - max(mean)
            kl = (full.exp() * (full - answer)).sum().item()
            expected = -rows[s.answer].sum().item(), margin, kl
            found = [got[name].item() for name in ("nll", "margin", "kl")]
            assert found == pytest.approx(expected, abs=2e-5)
            if abs(margin) > 1e-4:
                assert got.correct.item() == (margin > 0)
            first = [r[0].item() for r in rows]
            letter = float(first.index(max(first)) == s.answer) if s.lettered else np.nan
            np.testing.assert_equal(got.correct_letter.item(), letter)


def test_removal_matters_and_ends_at_the_full_model(profile):
    "Otherwise the comparison above would prove nothing."
    assert (profile.kl.sel(sample="open", layer=0) > 1e-3).all()
    assert (profile.kl.sel(layer=LAYERS) == 0).all()
    assert (profile.kl.sel(sample="text") < 1e-6).all()
    assert (profile.kl.sel(sample="silent", removed="audio") < 1e-6).all()


def test_a_layer_left_out_changes_what_it_changes_in_the_stock_model(
    model, processor, samples, profile
):
    layers = adapter_for(model).layers(model)

    def answers():
        return [score_choices(model, encode(model, processor, [s])).best.item() for s in samples]

    full = answers()
    found = profile["bypass_changes"].sel(sample=[s.id for s in samples])
    for i, layer in enumerate(layers):
        handle = layer.register_forward_hook(
            lambda m, args, out: args[0] if torch.is_tensor(out) else (args[0], *out[1:])
        )
        changed = [a != b for a, b in zip(answers(), full)]
        handle.remove()
        assert found.sel(layer=i).values.tolist() == changed
    assert 0 < found.mean() < 1 and not found.sel(layer=LAYERS).any()


def test_batching_and_order_change_nothing(ask, samples, profile):
    other = ask(samples[::-1], max_branch_tokens=1).sel(sample=profile.sample)
    for name in ("nll", "margin", "kl"):
        np.testing.assert_allclose(other[name], profile[name], atol=2e-5, rtol=5e-6)
    assert (other.correct == profile.correct).all()


def test_deterministic_and_the_model_is_left_alone(model, ask, samples, profile):
    before = state(model)
    assert profile.identical(ask(samples)) and state(model) == before


def test_coordinates_and_attributes(model, samples, profile):
    listed = {name: x.values.tolist() for name, x in profile.coords.items()}
    assert profile.nll.dims == ("sample", "removed", "layer")
    assert listed == dict(
        sample=["open", "letters", "silent", "text"],
        removed=list(KINDS),
        layer=list(range(LAYERS + 1)),
        family=["a", "a", "b", "c"],
        clip=["c0", "c0", "c1", ""],
        split=["derive", "derive", "test", "test"],
        n_choices=[4, 3, 2, 2],
    )
    assert profile.correct.dtype == bool and profile.nll.attrs["units"] == "nats"
    attrs = profile.attrs
    assert attrs["weights_sha256"] == adapter_for(model).hash_weights(model)
    assert attrs["data_sha256"] == digest(sample_rows(samples))
    said = "model revision prompt_sha256 seed versions threads max_branch_tokens needs"
    assert set(said.split()) <= set(attrs)


def test_hashes_notice_changes(model, samples):
    adapter, other = adapter_for(model), deepcopy(model)
    with torch.no_grad():
        adapter.lm_head(other).weight[0, 0] += 1
    assert adapter.hash_weights(other) != adapter.hash_weights(model)
    rows = lambda **change: sample_rows([replace(samples[0], **change)])
    clip = lambda seed: tiny.clip(seed, 3, size=(112, 112))
    assert rows(answer=0) != rows() != rows(video=clip(9)) and rows() == rows(video=clip(0))


def test_files(profile, tmp_path):
    path = save_profile(profile, tmp_path / "sub" / "p.nc")
    assert profile.identical(load_profile(path))
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not a dependency profile"):
        save_profile(profile.assign_attrs(schema="x"), path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["p.nc"]


def test_twice_the_same_question_is_refused(ask, samples):
    with pytest.raises(ValueError, match="'open' occurs more than once"):
        ask(samples[:1] * 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(samples=[]), "at least one sample"),
        (dict(model=torch.nn.Linear(1, 1).eval()), "names no token"),
        (dict(removed="smell"), "not one of visual"),
        (dict(removed=()), "at least one condition"),
        (dict(layers=[LAYERS + 1]), f"outside 0..{LAYERS}"),
        (dict(answers="guess"), "'guess' is not known"),
        (dict(layers="all"), "in 'all' is outside"),
        (dict(shard=(0, 2)), "need a checkpoint"),
    ],
)
def test_bad_arguments(model, processor, samples, change, message):
    with pytest.raises(ValueError, match=message):
        probe_dependency(**dict(model=model, processor=processor, samples=samples) | change)


def test_a_model_in_training_is_refused(model, ask, samples):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            ask(samples)
    finally:
        model.eval()
