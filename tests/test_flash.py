"""Flash attention, by stock code with its two kernels written out: lengths in place of masks,
padding taken out, causality from the end."""

import copy

import pytest
import tiny
import torch
from tiny import PLANS, close

from seats_analysis import adapter_for, encode, probe_dependency, prune
from seats_analysis.models.scoring import score_choices

flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
SAMPLES = tiny.three()


def one_length(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    "q (B, n, heads, d), k and v (B, m, KV heads, d): the last query sees all keys."
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[1] - q.shape[1])
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=True
    ).transpose(1, 2)


def many_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how):
    "Sequences one behind the other."
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    ends = cu_seqlens_q, cu_seqlens_k, cu_seqlens_k
    parts = [x.split(end.diff().tolist()) for x, end in zip((q, k, v), ends)]
    return torch.cat([one_length(*(x[None] for x in qkv), **how)[0] for qkv in zip(*parts)])


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def models(request):
    "The same weights with sdpa, and with flash attention everywhere."
    plain = tiny.thinker(request.param)
    quick = copy.deepcopy(plain)
    for m in quick.modules():
        if hasattr(m, "config"):
            m.config._attn_implementation_internal = "flash_attention_2"
    return plain, quick


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    found = dict(
        _loaded_implementation="flash_attention_2",
        _flash_fn=one_length,
        _flash_varlen_fn=many_lengths,
        _pad_fn=flash._pad_input,
        _unpad_fn=flash._unpad_input,
        _process_flash_kwargs_fn=flash._lazy_define_process_function(many_lengths),
    )
    for name, value in found.items():
        monkeypatch.setattr(flash, name, value)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def batches(models):
    return {
        n: encode(models[0], tiny.processor(adapter_for(models[0]).family), SAMPLES[:n])
        for n in (1, 3)
    }


def test_it_is_flash_attention(models, batches, monkeypatch):
    "The towers and the decoder call the two kernels, the padded batch the one for many lengths."
    called = []
    monkeypatch.setattr(
        flash,
        "_flash_varlen_fn",
        lambda q, *a, **k: called.append(k["causal"]) or many_lengths(q, *a, **k),
    )
    with prune(models[1], PLANS["together"]):
        models[1](**batches[3].inputs)
    assert called.count(True) == tiny.LAYERS and called.count(False) > 2


def same(models, batch, plan, kv="evict", **options):
    (told, logits, _), (other, quick, _) = (
        tiny.answered(m, batch, plan, kv, **options) for m in models
    )
    assert told == other
    close(logits, quick)


@pytest.mark.parametrize("n, name, kv, options", tiny.ANSWERS)
def test_pruned_answers(models, batches, n, name, kv, options):
    same(models, batches[n], PLANS[name], kv, **options)


@pytest.mark.parametrize("name", tiny.PRUNERS)
def test_methods(models, batches, name):
    method = tiny.PRUNERS[name].for_trr(tiny.LAYERS, 0.5, 0.6, 18, 30)
    same(models, batches[3], method, max_new_tokens=1, min_new_tokens=1)


@pytest.mark.parametrize("n", [1, 3])
def test_the_next_turn(models, batches, n):
    close(*(tiny.next_turn(m, batches[n]) for m in models))


def test_scores_of_choices(models, batches):
    close(*(score_choices(m, batches[3]).total for m in models))


def test_the_probe_wants_masks_and_says_so(models):
    with pytest.raises(ValueError, match='"sdpa" or "eager"'):
        probe_dependency(
            models[1], tiny.processor(adapter_for(models[1]).family), SAMPLES[:1], progress=False
        )
