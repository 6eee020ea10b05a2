"""Between the first layer and the last nothing waits for the device, nothing is done twice, and the
cost of choosing grows as the tokens do."""

import copy, math, time
from collections import Counter
import pytest, torch
import tiny
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import DynamicCache
from types import SimpleNamespace
from plain import stage2
from seats_analysis.pruning import base, encoders, prefill, seats, session
from seats_analysis.pruning import cache as cache_module
from seats_analysis.pruning.cache import Slots, slots_of
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.attention import TowerAttention
from seats_analysis.baselines.registry import METHODS
from seats_analysis.pruning.base import Pruner
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.session import Session, prune
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.pruning.base import stage1_counts
from seats_analysis.pruning.prefill import Check, Prefill
from seats_analysis.pruning.received import attention_received
from seats_analysis.pruning.select import select_in_clip

LAYERS, schedule = tiny.LAYERS, tiny.schedule


PLANS = dict(
    together=schedule(),
    apart=schedule(late_start=dict(visual=4, audio=5)),
    both_at_once=schedule(drop_layers=(2, 5)),
    from_the_start=Schedule(num_layers=LAYERS, late_start=0),
)


@pytest.fixture(scope="module")
def batches(model):
    "One sample, and three of unequal length; the same for every test."
    family = adapter_for(model).family
    samples = tiny.three()
    return {n: encode(model, tiny.processor(family), samples[:n]) for n in (1, 3)}


pytestmark = pytest.mark.usefixtures("no_grad")


# -------------------- every hook body, on tensors that have no values


def towers(s, batch):
    """What the hooks on the towers do: calls are noted on the host, the attention is taken on
    tensors without values."""
    given, w, adapter = batch.inputs, s.encoders, adapter_for(s.model)
    visual, audio = adapter.visual(s.model), adapter.audio_tower(s.model)
    pixels, grid = given["pixel_values_videos"], given["video_grid_thw"]
    w.before_visual(visual, (pixels,), dict(grid_thw=grid))
    w.before_audio(audio, (), dict(feature_lens=given["feature_attention_mask"].sum(-1)))
    s.timings.stop()
    rows = dict(
        visual=len(pixels), audio=sum(adapter.tower_rows(s.model, w.calls["audio"][0].shape))
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for modality, attention in w.attention.items():
            first, *_ = modules = attention.projections
            hidden = torch.randn(rows[modality], first.in_features)
            head = (
                first.out_features // attention.module.num_heads // (3 if len(modules) == 1 else 1)
            )
            rotary = tuple(torch.randn(2, len(hidden), head)) if modality == "visual" else None
            w.before_attention(attention.module, (hidden,), dict(position_embeddings=rotary))
            for module in modules:
                w.on_projection(modality, module, (), module(hidden))


def layers(s, batch, cache, deepstack):
    "What the hooks in the decoder do, from its first layer to its last."
    B, S = batch.shape
    config, heads = s.decoder.config, s.layers[0].self_attn
    size = lambda n, *more: torch.randn(B, *more, n, heads.head_dim)
    kwargs = dict(
        inputs_embeds=torch.randn(B, S, config.hidden_size),
        position_ids=torch.zeros(3, B, S, dtype=torch.long),
        attention_mask=torch.ones(B, S),
        **deepstack,
    )
    kwargs = s.prefill.stage1(kwargs, s.encoders)
    hidden = kwargs["inputs_embeds"]
    given = dict(
        position_embeddings=(size(hidden.shape[1]),) * 2, past_key_values=cache, attention_mask=None
    )
    for i in range(len(s.layers)):
        new = s.before_layer(i, s.layers[i], (hidden,), given)
        if new is not None:
            (hidden,), more = new
        if new is not None:
            assert more["position_embeddings"][0].shape[1] == hidden.shape[1]
        cache.update(
            size(hidden.shape[1], config.num_key_value_heads),
            size(hidden.shape[1], config.num_key_value_heads),
            i,
        )
        if s.prefill.deep is not None:
            hidden = s.after_layer(i, s.layers[i], (), hidden)


def without_values(model, batch, plan, kv="evict"):
    "All hook bodies of one prefill and one step after it."
    method = plan if isinstance(plan, Pruner) else Seats(plan)
    s, cache = Session(model, method, kv), DynamicCache()
    s.plan(batch.inputs, None, 1)  # on the host, before the first layer
    towers(s, batch)
    n, family = int(batch.layout.visual.sum()), adapter_for(model).family
    here = batch.layout.visual
    with FakeTensorMode(allow_non_fake_inputs=True):
        deepstack = (
            dict(
                visual_pos_masks=here & True,
                deepstack_visual_embeds=[torch.randn(n, s.decoder.config.hidden_size)] * 2,
            )
            if family == "qwen3-omni"
            else {}
        )
        layers(s, batch, cache, deepstack)
        with pytest.MonkeyPatch.context() as patch:
            # the one look at the device, after the last layer
            patch.setattr(Check, "read", lambda checks: None)
            s.after_decoder(None, (), SimpleNamespace(past_key_values=cache))
        ones = torch.ones(len(batch), batch.shape[1] + 1)
        embeds = torch.randn(len(batch), 1, s.decoder.config.hidden_size)
        s.decode_step(dict(inputs_embeds=embeds, attention_mask=ones), slots_of(cache), cache)
    return cache


@pytest.mark.parametrize(
    "n, name, kv",
    [(1, "together", "evict"), (3, "apart", "retain"), *((3, name, "evict") for name in PLANS)],
)
def test_no_hook_needs_a_value_from_the_device(model, batches, n, name, kv):
    cache = without_values(model, batches[n], PLANS[name], kv=kv)
    with prune(model, PLANS[name], kv=kv):
        out = model(**batches[n].inputs, use_cache=True)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [
        tuple(layer.keys.shape) for layer in out.past_key_values.layers
    ]  # it was this pass


@tiny.by_turns(METHODS)
def test_no_method_needs_one_either(model, batches, name):
    without_values(model, batches[3], METHODS[name].for_trr(tiny.LAYERS, 0.5, 0.6, 18, 30))


BODIES = dict(
    statistic=(encoders, "attention_received"),
    stage1=(seats, "select_in_clip"),
    cut=(base, "right_align"),
    scores=(Prefill, "scores"),
    stage2=(seats, "select_in_chunks"),
    masks=(prefill, "stock_mask"),
    caches=(cache_module, "shorten_cache"),
    decoding=(Slots, "mask"),
    features=(Check, "of_inputs"),
    checks=(Check, "of_scores"),
    counts=(Check, "of_counts"),
)


@pytest.mark.parametrize("body", BODIES)
def test_a_planted_mask_is_found(model, batches, body, monkeypatch):
    "`x[mask]` anywhere in them makes the test above fail."
    place, name = BODIES[body]
    whole = getattr(place, name)

    def planted(*args, **kwargs):
        x = torch.rand(8)
        x[x > 0.5]
        return whole(*args, **kwargs)

    monkeypatch.setattr(place, name, planted)
    with pytest.raises(DynamicOutputShapeException):
        without_values(model, batches[3], PLANS["together"])


# ---------------------------------------------------------------- the same, seen by the profiler

WAITS = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
}


def inside(event, names):
    "Whether an event lies in a range of one of these names."
    while event is not None and event.name not in names:
        event = event.cpu_parent
    return event is not None


def operations(model, batch, plan, *ranges, **options):
    "How often each operation is called within our ranges, during one `generate`."
    with (
        prune(model, plan, **options),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        model.generate(**batch.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return Counter(
        e.name for e in seen.events() if e.name.startswith("aten::") and inside(e, ranges)
    )


def test_the_profiler_sees_no_wait(model, batches):
    found = operations(model, batches[3], PLANS["together"], "seats::selection")
    assert sum(found.values()) > 100 and not WAITS & set(found), found
    assert WAITS & set(
        operations(model, batches[3], PLANS["together"], "seats::plan")
    )  # on the host, before the first layer, it does ask


def test_kernels_do_not_grow_with_the_clip(model):
    """A clip of 4 times the length needs no more launches for stages II and III, and for stage I
    those of its statistic's windows only."""
    processor, plan = (
        tiny.processor(adapter_for(model).family),
        schedule(entering=dict(visual=1.0, audio=1.0)),
    )
    counts = [
        sum(
            operations(
                model,
                encode(model, processor, [tiny.ask("x", tiny.clip(0, s))]),
                plan,
                "seats::selection",
            ).values()
        )
        for s in (4.0, 16.0)
    ]
    assert counts[0] == counts[1]


# ---------------------------------------------------------------- nothing twice


def test_towers_project_once(model, batches):
    "The statistic takes queries and keys from the tower's own projections."
    towers, calls, handles = [TowerAttention(model, m) for m in ("visual", "audio")], Counter(), []
    for module in (m for t in towers for m in t.projections):
        handles.append(module.register_forward_hook(lambda m, *_: calls.update([m])))
    try:
        with prune(model, PLANS["together"]) as run:
            model(**batches[1].inputs)
    finally:
        for h in handles:
            h.remove()
    assert set(calls.values()) == {1} and len(run.kept["stage1"][0]) < batches[1].shape[1]


@pytest.mark.parametrize("name", PLANS)
def test_tables_and_masks_are_cut_once_per_drop(model, batches, name):
    """All layers between two cuts are handed the same objects; one sample without padding has no
    mask at all."""
    seen, handles = [], []
    note = lambda m, a, k: seen.append(
        (a[0].shape[1], k["position_embeddings"][0], k["attention_mask"])
    )
    with prune(model, PLANS[name]) as run:
        for layer in adapter_for(model).layers(model):
            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))  # after ours
        try:
            model(**batches[1].inputs)
        finally:
            for h in handles:
                h.remove()
    cuts = {0, *PLANS[name].drop_layers, *(PLANS[name].late(m) for m in ("visual", "audio"))}
    assert (
        len(seen) == LAYERS
        and len({id(table) for _, table, _ in seen}) == len(cuts)
        and len(run.kept) >= len(cuts) - 1
    )
    if name != "apart":
        assert all(mask is None for *_, mask in seen)


def test_caches_are_written_once(model, batches, monkeypatch):
    """Each layer's cache that a cut shortens is written once, at its final length, with nothing of
    the longer one behind it."""
    written, whole = [], cache_module.shorten_cache
    monkeypatch.setattr(
        cache_module,
        "shorten_cache",
        lambda layers, index: written.extend(map(id, layers)) or whole(layers, index),
    )
    for n in batches:
        written.clear()
        with prune(model, PLANS["together"]) as run:
            cache = model(**batches[n].inputs, use_cache=True).past_key_values
        lengths, final = run.tokens_per_layer[0], run.tokens_per_layer[0, -1]
        assert len(written) == len(set(written)) == int((lengths > final).sum())
        for x in (x for layer in cache.layers[:5] for x in (layer.keys, layer.values)):
            assert (
                x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
            )


# ---------------------------------------------------------------- growth


def seconds(call, repeats=3):
    "Processor time of one call, the least of several."

    def once():
        start = time.process_time()
        call()
        return time.process_time() - start

    once()
    return min(once() for _ in range(repeats))


def choose(tokens):
    """All of the selection for so many tokens, windows of 96 visual and 32 audio tokens: statistic,
    stage I, one step of stage II."""
    windows = tokens // 128
    sizes = [96] * windows + [32] * windows
    n = stage1_counts(sizes, 0.1)
    g = torch.Generator().manual_seed(0)
    features, qk, scores = (
        torch.randn(shape, generator=g) for shape in ((tokens, 32), (tokens, 1, 16), (1, tokens))
    )
    modality, window = (
        torch.tensor([[1] * 96 + [2] * 32]).repeat(1, windows),
        torch.arange(windows).repeat_interleave(128)[None],
    )
    half = [48 * windows], [16 * windows]

    def call():
        stat = attention_received(qk, qk, sizes)
        select_in_clip(features, stat, sizes, n)
        stage2(scores, modality, window, windows, *half, ratio=0.5)

    return call


def slope(xs, ys):
    "Of the least-squares line through the logarithms."
    x, y = ([math.log(v) for v in values] for values in (xs, ys))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def test_selection_grows_as_the_tokens_do():
    tokens = [2**i * 1024 for i in range(7)]  # 1k to 64k
    times = [math.inf] * len(tokens)
    for _ in range(5):  # another process can only make it slower: the best of some passes counts
        times = [min(t, seconds(choose(n))) for n, t in zip(tokens, times)]
        slopes = (
            slope(tokens, times),
            slope(tokens[3:], times[3:]),
        )  # the second: nor does a fixed cost of small inputs hide it
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

    for place, name in (
        (Prefill, "stage1"),
        (Session, "before_layer"),
        (Session, "after_layer"),
        (Session, "decode_step"),
        (session, "evict"),
        (encoders.EncoderWatch, "aggregate"),
    ):
        monkeypatch.setattr(place, name, strict(getattr(place, name)))
    there = copy.deepcopy(model).cuda()
    for batch in batches.values():
        with prune(there, PLANS["together"]) as run:
            there.generate(**batch.to("cuda").inputs, max_new_tokens=3, min_new_tokens=3)
        with prune(model, PLANS["together"]) as here:
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
