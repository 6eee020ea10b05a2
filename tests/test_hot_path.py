"""Between the first layer and the last nothing is done twice, little is launched, and the cost of
choosing grows as the tokens do. That nothing waits for the device is in test_pretend_gpu.py, and
here for a real one."""

import copy
import itertools
import time
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from plain import stage2
from test_pretend_gpu import HOT
from tiny import PLANS

from seats_analysis import adapter_for, encode, prune
from seats_analysis.models.attention import TowerAttention
from seats_analysis.pruning import cache as cache_module
from seats_analysis.pruning.base import stage1_counts
from seats_analysis.pruning.received import attention_received
from seats_analysis.pruning.select import select_in_clip

pytestmark = pytest.mark.usefixtures("no_grad")


# ---------------------------------------------------------------- seen by the profiler


def operations(model, batch, plan, *ranges):
    "How often each operation is called within our ranges, during one `generate`."

    def inside(event):
        while event is not None and event.name not in ranges:
            event = event.cpu_parent
        return event is not None

    with (
        prune(model, plan),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        model.generate(**batch.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return Counter(e.name for e in seen.events() if e.name.startswith("aten::") and inside(e))


def test_kernels_do_not_grow_with_the_clip(model):
    """A clip of 4 times the length needs no more launches for stages II and III, and for stage I
    those of its statistic's windows only."""
    processor = tiny.processor(adapter_for(model).family)
    plan = tiny.schedule(entering=tiny.ratios(1.0, 1.0))
    clips = [[tiny.ask("x", tiny.clip(0, seconds))] for seconds in (4.0, 16.0)]
    counts = [
        operations(model, encode(model, processor, clip), plan, "seats::selection").total()
        for clip in clips
    ]
    assert counts[0] == counts[1]


# ---------------------------------------------------------------- nothing twice


def test_towers_project_once(model, batches):
    "The statistic takes queries and keys from the tower's own projections."
    calls, handles = Counter(), []
    for modality in ("visual", "audio"):
        for module in TowerAttention(model, modality).projections:
            handles.append(module.register_forward_hook(lambda m, *_: calls.update([m])))
    try:
        with prune(model, PLANS["together"]) as run:
            model(**batches[1].inputs)
    finally:
        for h in handles:
            h.remove()
    assert set(calls.values()) == {1} and len(run.kept["stage1"][0]) < batches[1].shape[1]


def test_caches_are_written_once(model, batches, monkeypatch):
    """Each layer's cache that a cut shortens is written once, at its final length, with nothing of
    the longer one behind it."""
    written, whole = [], cache_module.shorten_cache

    def shorten(layer, index, start):
        written.append(id(layer))
        whole(layer, index, start)

    monkeypatch.setattr(cache_module, "shorten_cache", shorten)
    for batch in batches.values():
        written.clear()
        with prune(model, PLANS["together"], kv="evict") as run:
            cache = model(**batch.inputs, use_cache=True).past_key_values
        lengths = run.tokens_per_layer[0]
        assert len(written) == len(set(written)) == int((lengths > lengths[-1]).sum())
        for x in (x for layer in cache.layers[:5] for x in (layer.keys, layer.values)):
            assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes


# ---------------------------------------------------------------- growth


def choose(tokens):
    """All of the selection for so many tokens, windows of 96 visual and 32 audio tokens: statistic,
    stage I, one step of stage II."""
    windows = tokens // 128
    sizes = [96] * windows + [32] * windows
    n = stage1_counts(sizes, 0.1)
    features = torch.randn(tokens, 32)
    qk = torch.randn(tokens, 1, 16)
    scores = torch.randn(1, tokens)
    modality = torch.tensor([[1] * 96 + [2] * 32]).repeat(1, windows)
    window = torch.arange(windows).repeat_interleave(128)[None]

    def call():
        stat = attention_received(qk, qk, sizes)
        select_in_clip(features, stat, sizes, n)
        stage2(scores, modality, window, windows, [48 * windows], [16 * windows], ratio=0.5)

    return call


def slope(xs, ys):
    "Of the least-squares line through the logarithms."
    return np.polyfit(np.log(xs), np.log(ys), 1)[0]


def test_selection_grows_as_the_tokens_do():
    tokens = [2**i * 1024 for i in range(7)]  # 1k to 64k
    times = [np.inf] * len(tokens)
    for _ in range(16):  # another process can only make it slower: the best of some passes counts
        for i, n in enumerate(tokens):
            call = choose(n)
            start = time.process_time()
            call()
            times[i] = min(times[i], time.process_time() - start)
        # the second: nor does a fixed cost of small inputs hide it
        slopes = slope(tokens, times), slope(tokens[3:], times[3:])
        if max(slopes) <= 1.15:
            break
    assert max(slopes) <= 1.15, (slopes, dict(zip(tokens, times)))
    assert slope([1, 2, 4], [1, 4, 16]) == pytest.approx(2)  # and the measure can tell


# ---------------------------------------------------------------- on a GPU


@pytest.mark.cuda
def test_no_hook_waits_on_a_gpu(model, batches, monkeypatch):
    "Every wait raises while our hooks run; what stock code does in between is its own business."

    def strict(whole):
        def run(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return whole(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    for place, name in HOT:
        monkeypatch.setattr(place, name, strict(getattr(place, name)))
    there = copy.deepcopy(model).cuda()
    methods = [m.for_trr(tiny.LAYERS, 0.5, 0.6, 18, 30) for m in tiny.PRUNERS.values()]
    for batch, plan in itertools.product(batches.values(), (PLANS["together"], *methods)):
        with prune(there, plan) as run:
            there.generate(**batch.to("cuda").inputs, max_new_tokens=3, min_new_tokens=3)
        with prune(model, plan) as here:
            model.generate(**batch.inputs, max_new_tokens=3, min_new_tokens=3)
        assert run.tokens_per_layer.tolist() == here.tokens_per_layer.tolist()


@pytest.mark.cuda
def test_a_wait_on_a_gpu_would_be_seen():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(3, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
