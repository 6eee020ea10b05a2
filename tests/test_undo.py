"""What a pruned block does to a model is undone, wherever it ends; nothing is held back; models and
threads keep out of each other's way."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Barrier, Event, Thread

import pytest
import tiny
import torch

from seats_analysis import Schedule, adapter_for, encode, prune
from seats_analysis.pruning import cache as cache_module, encoders, prefill, seats, session
from seats_analysis.pruning.cache import Slots
from seats_analysis.pruning.prefill import Prefill

LAYERS, PLAN = tiny.LAYERS, tiny.PLANS["together"]
BEAMS = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=2)


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny.thinker("qwen2.5-omni")


@pytest.fixture(scope="module")
def other():
    return tiny.thinker("qwen2.5-omni", seed=1)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen2.5-omni")


@pytest.fixture(scope="module")
def batch(model, processor):
    samples = [
        tiny.ask("both", tiny.clip(0)),
        tiny.ask("heard", tiny.clip(1, 5, sight=False), "what pitch is heard first ?"),
        tiny.ask("both too", tiny.clip(2, 3), "where is the red object ?"),
    ]
    return encode(model, processor, samples)


pytestmark = pytest.mark.usefixtures("no_grad")


def generate(model, batch, **options):
    return model.generate(**batch.inputs, **BEAMS | options)[:, batch.shape[1] :]


def last(model, batch):
    return model(**batch.inputs, use_cache=False).logits[:, -1]


# ---------------------------------------------------------------- what can be told about a model


def state(model):
    """Hooks and attributes of all modules (by identity), their classes' methods, weights; all but
    `rope_deltas`, which stock calls write."""

    def same(d):
        return [(k, id(v)) for k, v in d.items() if k != "rope_deltas"]

    out = {}
    for name, m in model.named_modules():
        parts = {k: same(v) for k, v in vars(m).items() if isinstance(v, dict)}
        classes = [dict(same(vars(c))) for c in type(m).__mro__]
        out[name] = dict(same(vars(m))), parts, classes, m.training
    weights = *model.parameters(), *model.buffers()
    out["weights"] = [(p.data_ptr(), p._version, p.requires_grad) for p in weights]
    configs = model.config.to_dict(), model.generation_config.to_dict()
    out["configs"] = *configs, model.config._attn_implementation
    return out


def tensors(x):
    "All tensors in what a module returned."
    if isinstance(x, torch.Tensor):
        yield x
    elif hasattr(x, "values"):
        yield from tensors(tuple(x.values()))
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors(y)


@contextmanager
def listening(model, note):  # note(module name, output)
    with ExitStack() as stack:
        for name, m in model.named_modules():
            handle = m.register_forward_hook(lambda m, a, out, name=name: note(name, out))
            stack.callback(handle.remove)
        yield


def everything(model, batch):
    "What every module returns in a forward pass, and what `generate` gives."
    seen = []
    with listening(model, lambda name, out: seen.append((name, [t.clone() for t in tensors(out)]))):
        last(model, batch)
    return [*seen, ("generate", [generate(model, batch)])]


def equal(a, b):
    return len(a) == len(b) and all(
        n == m and len(x) == len(y) and all(map(torch.equal, x, y)) for (n, x), (m, y) in zip(a, b)
    )


def test_the_snapshot_sees(model, other, batch):
    "Hooks, attributes, methods, weights and outputs: a change of any of them shows."
    before, outputs = state(model), everything(model, batch)
    assert state(model) == before and equal(everything(model, batch), outputs)
    assert not equal(everything(other, batch), outputs)
    with prune(model, PLAN):
        assert len({n for n, s in state(model).items() if s != before.get(n)}) >= LAYERS + 6
    changed = copy.deepcopy(model)
    layer = adapter_for(changed).layers(changed)[1]
    for place, name, value in ((layer, "x", 1), (layer, "training", True), (type(layer), "y", 1)):
        before = state(changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, value, raising=False)
            assert state(changed) != before
        assert state(changed) == before
    next(changed.parameters()).mul_(1)
    assert state(changed) != before


# ---------------------------------------------------------------- undone, wherever it ends


def always(*args):
    return True


FUNCTIONS = dict(
    planning=(session, "layout_of", always),
    statistics=(encoders, "attention_received", always),
    stage1=(seats, "select_in_clip", always),
    scores=(Prefill, "scores", always),
    stage2=(seats, "select_in_chunks", always),
    stage3=(Prefill, "choose", lambda s, step, *a: step.stage == 3),
    eviction=(cache_module, "shorten_cache", always),
    masks=(prefill, "stock_mask", always),
    label=(Slots, "label", always),
    copies=(encoders.EncoderWatch, "repeat_media", always),
    beams=(Slots, "rows", always),
    decode_masks=(Slots, "mask", always),
    positions=(Slots, "go_on", always),
)
MODULES = dict(
    vision=lambda ad, m: ad.visual(m).blocks[0],
    audio_end=lambda ad, m: ad.audio_tower(m),
    middle=lambda ad, m: ad.layers(m)[2].self_attn,
    late=lambda ad, m: ad.layers(m)[5].mlp,
    head=lambda ad, m: ad.lm_head(m),
    decode_layer=lambda ad, m: ad.layers(m)[3],
)


@contextmanager
def fault(model, where, monkeypatch):
    "Something that raises `Broken` while a prompt is pruned and continued."
    handle, fails = None, always
    with monkeypatch.context() as patch:
        if where in FUNCTIONS:
            place, name, fails = FUNCTIONS[where]
            stock = getattr(place, name)

            def broken(*args, **kwargs):
                if fails(*args):
                    raise Broken
                return stock(*args, **kwargs)

            patch.setattr(place, name, broken)
        else:
            # the prompt passes a layer of a decode step, the next token does not
            decode = where == "decode_layer"

            def broken(m, args):
                if not decode or args[0].shape[1] == 1:
                    raise Broken

            module = MODULES[where](adapter_for(model), model)
            handle = module.register_forward_pre_hook(broken)
        yield
        if handle is not None:
            handle.remove()


@pytest.fixture(scope="module")
def untouched(model, batch):
    "State and outputs of the model, and its outputs in a block, before any fault."
    with torch.no_grad():
        before, outputs = state(model), everything(model, batch)
        with prune(model, PLAN, kv="evict"):
            return before, outputs, everything(model, batch)


@pytest.mark.parametrize("where", [*FUNCTIONS, *MODULES])
def test_undone_after_an_exception(model, batch, where, monkeypatch, untouched):
    """The same fault, once leaving the block and once caught inside; then everything is as before,
    and pruning works as before."""
    before, outputs, want = untouched
    with fault(model, where, monkeypatch), pytest.raises(Broken):
        with prune(model, PLAN, kv="evict"):
            generate(model, batch)
    assert state(model) == before
    with prune(model, PLAN, kv="evict"):
        with fault(model, where, monkeypatch), pytest.raises(Broken):
            generate(model, batch)
        assert equal(everything(model, batch), want)
    assert state(model) == before and equal(everything(model, batch), outputs)


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_undone_after_the_body_raises(model, batch, error):
    before = state(model)
    # a generator cannot hand on the last of them as it is
    with pytest.raises((error, RuntimeError)), prune(model, PLAN):
        generate(model, batch)
        raise error
    assert state(model) == before


def test_undone_after_leaving_early(model, batch):
    "return, break, and a block that is entered by hand and forgotten."
    before, outputs = state(model), everything(model, batch)

    def leave():
        with prune(model, PLAN):
            return last(model, batch)

    leave()
    for _ in range(2):
        with prune(model, PLAN):
            break
    block = prune(model, PLAN)
    block.__enter__()
    assert state(model) != before
    del block
    gc.collect()
    assert state(model) == before and equal(everything(model, batch), outputs)


def test_what_others_did_stays(model, batch):
    "Hooks of the caller, set before or within, and an expansion of its own, are still there."
    before, calls, name = state(model), [], "_expand_inputs_for_generation"
    stock, layer = getattr(model, name), adapter_for(model).layers(model)[1]

    def mine(**kwargs):
        calls.append("expanded")
        return stock(**kwargs)

    def hook(when):
        return layer.register_forward_hook(lambda *a: calls.append(when))

    setattr(model, name, mine)
    handles = [hook("before")]
    with prune(model, PLAN):
        handles.append(hook("within"))
        generate(model, batch)
    assert {"before", "within", "expanded"} <= set(calls)
    assert vars(model)[name] is mine and len(layer._forward_hooks) == 2
    delattr(model, name)
    for handle in handles:
        handle.remove()
    assert state(model) == before


# ---------------------------------------------------------------- rope_deltas


def deltas(model):
    return {n: vars(m)["rope_deltas"] for n, m in model.named_modules() if "rope_deltas" in vars(m)}


def call(model, one, how):
    stock = {**one.inputs, "use_audio_in_video": True}
    del stock["position_ids"]
    if how == "forward":
        return model(**stock)
    if how == "given positions":
        return model.generate(**one.inputs, **BEAMS)
    if how == "steps":
        cache = model(**stock, use_cache=True).past_key_values
        return model(
            input_ids=torch.tensor([[20]]),
            position_ids=one.position_ids[..., -1:] + 1,
            past_key_values=cache,
            attention_mask=torch.nn.functional.pad(stock["attention_mask"], (0, 1), value=1),
        )
    return model.generate(**stock, **BEAMS | dict(num_beams=2 if how == "beams" else 1))


@pytest.mark.parametrize("how", ["forward", "steps", "generate", "beams", "given positions"])
def test_rope_deltas_are_those_of_an_unpruned_call(model, processor, batch, how):
    one = encode(model, processor, batch.samples[:1])
    model = copy.deepcopy(model)
    found = []
    for plan in (None, PLAN):
        for n in deltas(model):
            model.get_submodule(n).rope_deltas = None
        with prune(model, plan) if plan else nullcontext():
            call(model, one, how)
        found.append(deltas(model))
    plain, pruned = found
    assert plain and list(pruned) == list(plain)
    for n, want in plain.items():
        assert pruned[n] is None if want is None else torch.equal(pruned[n], want)
    assert any(d is not None for d in plain.values()) or how == "given positions"


# ---------------------------------------------------------------- nothing is held back


def float_storages(model):
    "Storages of all floating point tensors that are alive, but the model's own."
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
    found = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in alive}
    for t in (*model.parameters(), *model.buffers()):
        found.pop(t.untyped_storage().data_ptr(), None)
    return found


def new_storages(model, before):
    return [shape for p, shape in float_storages(model).items() if p not in before]


def one_call(model, batch, where, monkeypatch):
    "A call that ends well or badly, and leaves its caller nothing."
    if where is None:
        generate(model, batch)
        return
    with fault(model, where, monkeypatch):
        try:
            generate(model, batch)
        except Broken:
            return
    pytest.fail("the fault did not show")


@pytest.mark.parametrize(
    "where, kv",
    [
        (None, "evict"),
        ("stage2", "retain"),
        ("stage3", "evict"),
        ("late", "evict"),
        ("decode_layer", "retain"),
    ],
)
def test_no_hidden_state_survives(model, batch, where, kv, monkeypatch):
    """Weak references to all that modules returned die with the call, in the open block and with
    its run still there; afterwards no new tensor is left."""
    generate(model, batch)  # what is made once and kept, such as tables
    refs, before = [], float_storages(model)

    def note(name, out):
        refs.extend((name, weakref.ref(t)) for t in tensors(out))

    with prune(model, PLAN, kv=kv) as run:
        with listening(model, note):
            one_call(model, batch, where, monkeypatch)
        gc.collect()
        assert len(refs) > 50 and not {name for name, r in refs if r() is not None}
        hidden = model.config.get_text_config().hidden_size
        assert not [shape for shape in new_storages(model, before) if shape[-1:] == (hidden,)]
    assert not new_storages(model, before) and run.layout is not None


def test_the_search_for_survivors_finds_them(model, batch):
    before, kept = float_storages(model), []
    with listening(model, lambda name, out: kept.extend(tensors(out))):
        last(model, batch)
    assert any(shape[-1:] == (128,) for shape in new_storages(model, before))


# ---------------------------------------------------------------- several models, several threads


def test_one_block_at_a_time(model, batch):
    before = state(model)
    with prune(model, PLAN) as run:
        within, want = state(model), generate(model, batch)
        for plan in (PLAN, None):
            with pytest.raises(ValueError, match="being pruned already") as error:
                with prune(model, plan):
                    raise AssertionError("a second block was entered")
            assert "\n" not in str(error.value)
        assert state(model) == within and torch.equal(generate(model, batch), want) and run.kept
    assert state(model) == before
    with prune(model, PLAN):
        assert torch.equal(generate(model, batch), want)


def together(*jobs):
    "Run functions in threads that start at the same moment; what they returned."
    gate = Barrier(len(jobs))

    def work(job):
        gate.wait()
        with torch.no_grad():
            return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(work, jobs))


def test_threads_on_two_models(model, other, batch):
    """Two models are pruned at once, each by its own plan, while their answers stay what they are
    alone."""
    early = Schedule(num_layers=LAYERS, late_start=2, entering=dict(visual=0.2, audio=0.3))

    def job(m, plan, kv):
        out = []
        for _ in range(6):
            with prune(m, plan, kv=kv) as run:
                tokens = generate(m, batch).tolist()
                out.append((tokens, run.tokens_per_layer.tolist(), run.timings.calls))
        return out

    jobs = [lambda: job(model, PLAN, "retain"), lambda: job(other, early, "evict")]
    before, wants = [state(m) for m in (model, other)], [j() for j in jobs]
    assert together(*jobs) == wants
    assert [state(m) for m in (model, other)] == before


def test_threads_on_one_model(model):
    "Of many threads that want to prune one model at the same moment, one may."
    before, leave = state(model), Barrier(8)

    def job():
        try:
            with prune(model, PLAN):
                leave.wait()
                return "entered"
        except ValueError as e:
            leave.wait()
            return str(e)

    for _ in range(5):
        got = together(*[job] * 8)
        assert got.count("entered") == 1 and sum("being pruned already" in g for g in got) == 7
        assert state(model) == before


# ---------------------------------------------------------------- leaving while a thread generates


def told_too_late(model, batch, told, **options):
    "A thread that generates, and notes why it was stopped."

    def work():
        with torch.no_grad():
            try:
                generate(model, batch, num_beams=1, **options)
            except ValueError as refused:
                told.append(str(refused))

    return Thread(target=work)


LEFT = "left while a thread was generating"
HOLDS = dict(  # where the thread is when the block is left -> the module, the call of it
    vision=(lambda ad, m: ad.visual(m), 1),
    prefill=(lambda ad, m: ad.layers(m)[3], 1),
    step=(lambda ad, m: ad.layers(m)[3], 2),
)


@pytest.mark.parametrize("where, family", [(w, f) for w in HOLDS for f in tiny.FAMILIES])
def test_leaving_waits_for_the_pass_under_way(where, family, monkeypatch):
    """It ends pruned as a whole; the generation is refused the next one, and both sides are
    told."""
    model = tiny.thinker(family)
    one = encode(model, tiny.processor(family), [tiny.ask("both", tiny.clip(0, 2))])
    before = state(model)
    find, count = HOLDS[where]
    at, go, told, calls = Event(), Event(), [], []
    stock = encoders.Hooks.leave
    # the pass goes on only when the block is being left
    monkeypatch.setattr(encoders.Hooks, "leave", lambda *a: go.set() or stock(*a))

    def hold(module, args):
        calls.append(1)
        if len(calls) == count:
            at.set()
            assert go.wait(60)

    handle = find(adapter_for(model), model).register_forward_pre_hook(hold)
    thread = told_too_late(model, one, told)
    with pytest.raises(ValueError, match=LEFT) as error, prune(model, PLAN) as run:
        thread.start()
        assert at.wait(60)
    thread.join(60)
    handle.remove()
    assert "\n" not in str(error.value) and told == [str(error.value)]
    assert run.samples == len(run.kept.get("late5", ())) >= (where != "vision")
    assert len(calls) == count and state(model) == before


def test_a_block_without_a_prompt_says_so(model, batch, recwarn):
    with pytest.warns(UserWarning, match="no prompt was read in this `prune` block") as seen:
        with prune(model, PLAN):
            pass
    assert seen[0].filename == __file__ and "\n" not in str(seen[0].message)
    recwarn.clear()
    with pytest.raises(Broken), prune(model, PLAN):
        raise Broken
    with prune(model, PLAN):
        last(model, batch)
    assert not [w for w in recwarn if "no prompt was read" in str(w.message)]
