"""What an attack on `prune` and on the answers found: each case works or ends with one line, and
the model is always the stock model again, bit for bit."""

import copy
import pickle
import threading
import warnings
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import tiny
import torch
from test_undo import last, state
from tiny import spoilt

from seats_analysis import Schedule, adapter_for, compare_methods, encode, evaluate, prune
from seats_analysis.baselines.merging import OmniZip
from seats_analysis.baselines.registry import method_at
from seats_analysis.models.encode import Prompt
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning.encoders import Hooks
from seats_analysis.pruning.seats import Seats
from seats_analysis.serving.lmms import Answerer

FAMILY = "qwen2.5-omni"
LATE = 5  # no choice is made from what comes out of this layer


@pytest.fixture(scope="module")
def processor():
    return tiny.processor(FAMILY)


@pytest.fixture(scope="module")
def model():
    return tiny.thinker(FAMILY)


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, tiny.three())


@pytest.fixture
def unchanged(model):
    "The model of a test is as it was when the test is over."
    before = state(model)
    yield
    assert state(model) == before


# ---------------------------------------------------------------- logits that are not finite


PLANS = {20: tiny.schedule()}
ANSWERS = dict(
    evaluate=lambda *a: evaluate(*a, tiny.schedule()),
    full=evaluate,
    compare=lambda *a: compare_methods(*a, PLANS, "vtw"),
    written=lambda *a: compare_methods(*a, PLANS, "vtw", answers="generate"),
)


@pytest.mark.parametrize("how", ANSWERS)
def test_logits_that_are_not_finite(model, processor, how, unchanged):
    "They are no wrong answers: clip and precision are named."
    value = torch.inf if how == "full" else torch.nan
    line = r"clip c0, c1, c2: .* not finite \(float32\)"
    with spoilt(adapter_for(model).layers(model)[LATE].mlp, value):
        with pytest.raises(ValueError, match=line) as error:
            ANSWERS[how](model, processor, tiny.three())
    assert "\n" not in str(error.value)


def test_only_the_broken_clip_is_named(model, processor, batch, unchanged):
    ad = adapter_for(model)
    for module in (ad.layers(model)[3].mlp, ad.lm_head(model)):
        with spoilt(module, torch.nan, (1, ..., 0)):
            with pytest.raises(ValueError, match="^clip c1: .* not finite"):
                score_choices(model, batch)
    with spoilt(ad.audio_tower(model).proj, torch.nan):
        with pytest.raises(ValueError, match="^clip c0, c1: .* not finite"):
            score_choices(model, batch)


def test_a_later_step_is_watched_too(model, processor, unchanged):
    "The prompt passes, the next token does not; the answers of the lmms-eval plug-in likewise."

    def spoil(module, args, output):
        return output * torch.nan if output.shape[1] == 1 else output

    clip = tiny.clip(0)
    handle = adapter_for(model).layers(model)[LATE].mlp.register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match="not finite"):
            Answerer(model, processor, Seats(tiny.schedule()))([Prompt("p", (clip, "where ?"))], 3)
    finally:
        handle.remove()


def test_seats_run_prints_no_nan(model, processor, monkeypatch, unchanged):
    from typer.testing import CliRunner
    from seats_analysis.cli import app as shared
    from seats_analysis.cli.main import app
    from seats_analysis.storage.files import shipped_folder

    clip = sorted((shipped_folder("testbed") / "clips").glob("*.mp4"))[0]
    monkeypatch.setattr(shared, "load_model", lambda *a, **k: (model, processor))
    for more in ([], ["--choice", "red", "--choice", "blue"]):
        with spoilt(adapter_for(model).layers(model)[LATE].mlp, torch.nan):
            asked = ["run", str(clip), "--question", "where ?", "--max-tokens", "2", *more]
            result = CliRunner().invoke(app, asked)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith(f"seats: clip {clip.stem}: ")
        assert "not finite" in result.stderr and result.stderr.count("\n") == 1


def test_an_answer_has_a_token(model, processor):
    given = dict(answers="generate", max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        compare_methods(model, processor, tiny.three(), PLANS, "vtw", **given)
    assert Answerer(model, processor)([Prompt("p", ("where ?",))], 0) == [""]


# ---------------------------------------------------------------- torch.compile


def compiled(model, how):
    "What is called after a model was compiled in one of these ways."
    if how == "wrapped":
        return torch.compile(model, backend="eager")
    if how == "function":
        return torch.compile(lambda **given: model(**given), backend="eager")
    parts = dict(inner=model.model, decoder=adapter_for(model).decoder(model))
    module = parts.get(how.split("_")[0], model)
    if "forward" in how:
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        module.compile(backend="eager")
    return model


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo, about what it does not trace
        yield tiny.thinker(FAMILY, layers=3)
    torch._dynamo.reset()


SHORT = dict(num_layers=3, drop_layers=(1,), late_start=2)
SHORT |= dict(keep_ratios=dict(visual=(0.5,), audio=(0.5,)), entering=dict(visual=0.3, audio=0.5))


COMPILED = "whole function forward inner decoder decoder_forward".split()
AT_NIGHT = [
    pytest.param(h, w, marks=pytest.mark.nightly) for h in COMPILED for w in ("warm", "cold")
]


@pytest.mark.parametrize("how, when", [("wrapped", "inside"), *AT_NIGHT])
def test_compiled_as_a_whole(fresh, batch, how, when):
    plan, full = Schedule(**SHORT), last(fresh, batch)
    call = compiled(fresh, how) if when != "inside" else None
    if when == "warm":
        assert torch.allclose(last(call, batch), full, atol=1e-4)
    for _ in range(2):
        with pytest.raises(ValueError, match="compiled? .*one by one"), prune(fresh, plan):
            last(call or compiled(fresh, how), batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fresh.modules())
    if call is not None:
        assert torch.allclose(last(call, batch), full, atol=1e-4)  # no hook was traced


def test_what_was_compiled_before_is_noticed():
    "Its graph knows no hooks; a `forward` of their own makes the modules traced again."
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    call, x, hooks = torch.compile(module, backend="eager"), torch.ones(1, 2), Hooks()
    want = call(x)
    with ExitStack() as stack:
        hooks.before(stack, module[0], lambda m, args, kwargs: hooks.refuse_compiled(m))
        assert torch.equal(call(x), want)  # the hook is left out
        stack.enter_context(patch.object(module[0], "forward", module[0].forward))
        with pytest.raises(ValueError, match="one by one"):
            call(x)
        module(x)
    assert torch.equal(call(x), want) and not module[0]._forward_pre_hooks
    torch._dynamo.reset()


def test_a_compiled_layer_is_pruned(fresh, batch):
    "Called before, in and between blocks."
    full = last(fresh, batch)

    def pruned():
        with prune(fresh, Schedule(**SHORT)) as run:
            return last(fresh, batch), run.tokens_per_layer.tolist()

    want, counts = pruned()
    adapter_for(fresh).layers(fresh)[1].compile(backend="eager")
    for _ in range(2):
        assert torch.allclose(last(fresh, batch), full, atol=1e-4)
        got, tokens = pruned()
        assert torch.allclose(got, want, atol=1e-4) and tokens == counts


def test_a_decoder_that_is_passed_by(model, batch, unchanged):
    "Whatever keeps the hooks from being called: there is no output."
    module = adapter_for(model).decoder(model)
    layers = [copy.copy(layer) for layer in module.layers]  # their hooks are not called
    for layer in layers:
        vars(layer).update({k: type(v)() for k, v in vars(layer).items() if "hooks" in k})
    with torch.no_grad(), prune(model, tiny.schedule()):
        hooked, module.layers = module.layers, torch.nn.ModuleList(layers)
        with pytest.raises(ValueError, match="compile"):
            last(model, batch)
        module.layers = hooked
        with patch.object(model, "forward", lambda **given: torch.zeros(1)):
            with pytest.raises(ValueError, match="compile"):
                model(**batch.inputs)
        assert last(model, batch).isfinite().all()


# ---------------------------------------------------------------- copies and threads


def test_no_copy_takes_hooks_along(model, batch, unchanged):
    with torch.no_grad(), prune(model, tiny.schedule()) as run:
        want = last(model, batch)
        for part in (model, adapter_for(model).visual(model), adapter_for(model).layers(model)):
            for take in (copy.deepcopy, pickle.dumps):
                with pytest.raises(ValueError, match="being pruned and cannot be copied"):
                    take(part)
        assert torch.equal(last(model, batch), want) and run.samples == 6
    with torch.no_grad():
        assert torch.equal(last(copy.deepcopy(model), batch), last(model, batch))


def in_thread(job, started=None):
    "Run a function in a thread; what it returned or raised is in the list."
    out = []

    def work():
        if started is not None:
            started.wait()
        with torch.no_grad():
            try:
                out.append(job())
            except Exception as error:
                out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, out


def test_threads_from_before_the_block_are_refused(model, batch, unchanged):
    "Also in the middle of a pass that began without the block."
    layer, middle, go_on = adapter_for(model).layers(model)[1], threading.Event(), threading.Event()
    started = threading.Event()
    late, said = in_thread(lambda: last(model, batch), started)

    def wait(module, args):
        if threading.current_thread() is early:
            middle.set()
            go_on.wait(60)

    handle = layer.register_forward_pre_hook(wait)
    early, stopped = in_thread(lambda: last(model, batch))
    middle.wait(60)
    with torch.no_grad(), prune(model, tiny.schedule()) as run:
        want = last(model, batch)
        for event, thread in ((started, late), (go_on, early)):
            event.set()
            thread.join()
        assert torch.equal(last(model, batch), want) and run.samples == 6
    handle.remove()
    for (error,) in (said, stopped):
        assert isinstance(error, ValueError) and "another thread is pruning" in str(error)


def test_a_thread_of_the_block_waits_its_turn(model, batch, unchanged):
    "It is pruned, as the thread of a streamer is, but not while another pass is on its way."
    seen = []

    def meanwhile(module, args):
        handle.remove()
        thread, out = in_thread(lambda: last(model, batch))
        thread.join()
        seen.extend(out)

    with torch.no_grad(), prune(model, tiny.schedule()):
        want = last(model, batch)
        handle = adapter_for(model).layers(model)[3].register_forward_pre_hook(meanwhile)
        assert torch.equal(last(model, batch), want)
        assert isinstance(seen[0], ValueError) and "one at a time" in str(seen[0])
        with spoilt(adapter_for(model).layers(model)[1], torch.nan), pytest.raises(ValueError):
            last(model, batch)  # a pass that breaks leaves the block to others, too
        thread, out = in_thread(lambda: last(model, batch))
        thread.join()
        assert torch.equal(out[0], want)


# ---------------------------------------------------------------- autocast and gradients


@pytest.mark.parametrize("name", ["seats", "omnizip"])
def test_autocast(model, batch, name, unchanged):
    method = method_at(name, tiny.schedule(), (40.0, 40.0))
    with torch.no_grad(), prune(model, method) as run:
        want, exact = last(model, batch), run.tokens_per_layer.tolist()
        with torch.autocast("cpu", torch.bfloat16):
            got = last(model, batch)
    assert run.tokens_per_layer.tolist() == exact
    assert torch.allclose(got.float(), want, atol=0.1 * float(want.abs().max()))


def gradients(model, batch, method, inside=True):
    with torch.enable_grad(), ExitStack() as block:
        block.enter_context(prune(model, method))
        loss = last(model, batch).logsumexp(-1).sum()
        if not inside:
            block.close()
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["seats", "omnizip"])
def test_gradients_with_checkpoints(model, batch, name):
    "The same with and without, and whether the block is left before the backward pass or not."
    method = method_at(name, tiny.schedule(), (40.0, 40.0))
    want = gradients(model, batch, method)
    model.train()
    model.gradient_checkpointing_enable()
    try:
        for inside in (True, False):
            got = gradients(model, batch, method, inside)
            assert got.keys() == want.keys()
            assert all(torch.allclose(got[n], want[n], atol=1e-4) for n in want)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("name", ["omnizip", "visionzip-om"])
def test_merged_tokens_hand_gradients_on(model, batch, name):
    "To both encoders, as finite differences say."
    method = method_at(name, tiny.schedule(), (40.0, 40.0))
    got = gradients(model, batch, method)
    for tower in ("visual", "audio_tower"):
        part = getattr(adapter_for(model), tower)(model)
        module = [m for m in part.modules() if isinstance(m, torch.nn.Linear)][-1]
        (key,) = [n for n, p in model.named_parameters() if p is module.bias]
        ends, step = [], 1e-3 * got[key] / got[key].norm()
        for sign in (1, -1):
            with torch.no_grad(), prune(model, method):
                module.bias += sign * step
                ends.append(last(model, batch).double().logsumexp(-1).sum().item())
                module.bias -= sign * step
        slope = (ends[0] - ends[1]) / 2e-3
        assert slope == pytest.approx(float(got[key].norm()), rel=0.1)


def test_a_method_that_merges_without_gradients_says_so(model, batch):
    class Silent(OmniZip):
        merges = False

    method = Silent.for_trr(tiny.LAYERS, 0.5, 0.5, 40, 40)
    with prune(model, method), pytest.raises(ValueError, match="set `merges = True`"):
        model(**batch.inputs)
    with torch.no_grad(), prune(model, method):
        assert model(**batch.inputs).logits.isfinite().all()
