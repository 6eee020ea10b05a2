"""Everything that would run on a GPU, on one that is pretended (`pretend.py`): devices are not
mixed, our hooks do not wait."""

import copy
from dataclasses import replace
import pytest, torch
import tiny
from pretend import Wait, no_waits, pretend_gpu
from tiny import PLANS
from seats_analysis import adapter_for, encode, probe_dependency, prune
from seats_analysis.baselines.registry import ABLATIONS
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning import base, cache, encoders, prefill, seats
from seats_analysis.pruning.cache import Slots
from seats_analysis.pruning.prefill import Check, Prefill
from seats_analysis.pruning.session import Session

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real one: `pytest -m cuda`"
)
HOT = (
    (Prefill, "stage1"),
    (Session, "before_layer"),
    (Session, "after_layer"),
    (Session, "before_decoder"),
    (Prefill, "held"),
    (Slots, "evict"),
    (encoders.EncoderWatch, "aggregate"),
)
SAMPLES = tiny.three()


@pytest.fixture
def gpu():
    with torch.no_grad(), pretend_gpu() as gpu:
        yield gpu


@pytest.fixture
def there(model, gpu):
    return copy.deepcopy(model).cuda()


@pytest.fixture
def strict(gpu, monkeypatch):
    "No hook of ours may wait between the first layer and the last, nor in a decode step."

    def guarded(whole):
        def run(*args, **kwargs):
            with no_waits(gpu):
                return whole(*args, **kwargs)

        return run

    for place, name in HOT:
        monkeypatch.setattr(place, name, guarded(getattr(place, name)))


def on_both(model, there, batch, call):
    "What a call gives on the host and on the device, which is the same."
    here, pretended = call(model, batch), call(there, batch.to("cuda"))
    torch.testing.assert_close(here, pretended, rtol=0, atol=0)


def same(model, there, batch, plan, kv="evict", **options):
    "The same answers, the times aside."
    (told, _, here), (other, _, pretended) = (
        tiny.answered(m, b, plan, kv, **options)
        for m, b in ((model, batch), (there, batch.to("cuda")))
    )
    assert told == other and here.calls == pretended.calls and pretended.ms["prefill"] > 0


@pytest.mark.parametrize("n, name, kv, options", tiny.ANSWERS)
def test_pruned_answers(model, there, batches, strict, n, name, kv, options):
    same(model, there, batches[n], PLANS[name], kv, **options)


def test_layers_that_keep_no_media(model, there, batches, strict):
    plan = replace(PLANS["together"], cache=dict(visual=(2, 4), audio=(1, 5)))
    same(model, there, batches[3], plan, "retain")


@tiny.by_turns(tiny.PRUNERS | ABLATIONS)
def test_methods(model, there, batches, strict, name):
    method = (tiny.PRUNERS | ABLATIONS)[name].for_trr(tiny.LAYERS, 0.5, 0.6, 18, 30)
    same(model, there, batches[3], method, max_new_tokens=1, min_new_tokens=1)


def test_a_longer_clip_does_not_wait_more(model, there, gpu):
    """What our own code asks the device for is all asked before the first layer, or after the last,
    and as often for 2 s as for 12 s."""
    found = []
    for seconds in (2.0, 12.0):
        batch = encode(
            model, tiny.processor(adapter_for(model).family), [tiny.ask("x", tiny.clip(0, seconds))]
        ).to("cuda")
        gpu.waits.clear()
        with prune(there, PLANS["together"]):
            there(**batch.inputs)
        found.append([w for w in gpu.waits if w.ours])
    assert [w.why for w in found[0]] == [w.why for w in found[1]] and 0 < len(found[0]) <= 9


def test_the_next_turn(model, there, batches, strict):
    on_both(model, there, batches[1], tiny.next_turn)


def test_scores_of_choices(model, there, batches):
    on_both(model, there, batches[3], lambda m, batch: score_choices(m, batch).total)


def test_the_probe(model, there):
    processor = tiny.processor(adapter_for(model).family)
    here, pretended = (
        probe_dependency(m, processor, SAMPLES[:1], removed=("visual", "both"), progress=False)
        for m in (model, there)
    )
    assert here.equals(pretended)


# ---------------------------------------------------------------- more than one device


@pytest.mark.parametrize(
    "moved, devices",
    [
        ("late layers", "cpu and cuda:0"),
        ("towers", "cpu and cuda:0"),
        ("offloaded", "cpu and meta"),
        ("all", "meta"),
    ],
)
def test_spread_over_devices(model, gpu, moved, devices):
    "Refused where something would be pruned, before anything runs; measured all the same."
    spread, ad = copy.deepcopy(model), adapter_for(model)
    parts = {
        "late layers": ad.layers(spread)[2:],
        "towers": [ad.visual(spread)],
        "offloaded": ad.layers(spread)[4:],
        "all": [spread],
    }[moved]
    for part in parts:
        part.to("meta" if "meta" in devices else "cuda")
    with (
        pytest.raises(ValueError, match=f"one device.*{devices}") as error,
        prune(spread, PLANS["together"]),
    ):
        raise AssertionError("entered")
    assert "\n" not in str(error.value)
    with prune(spread, None):
        pass


# ---------------------------------------------------------------- the pretended one can tell


def test_mixed_devices_are_found(there, batches, monkeypatch):
    whole = prefill.query_scores
    monkeypatch.setattr(prefill, "query_scores", lambda *args: whole(*args) + torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="same device"), prune(there, PLANS["together"]):
        there(**batches[1].to("cuda").inputs)


ASKING = dict(
    mask=lambda x: x[x > 0],
    item=lambda x: x.sum().item(),
    cpu=lambda x: x.cpu(),
    tolist=lambda x: x.tolist(),
    bool=lambda x: bool(x.any()),
    nonzero=lambda x: x.nonzero(),
    tensor=lambda x: torch.tensor([1, 2], device=x.device),
    repeats=lambda x: x.repeat_interleave(x.long()),
)
BODIES = dict(
    statistic=(encoders, "attention_received"),
    stage1=(seats, "select_in_clip"),
    cut=(base, "right_align"),
    scores=(Prefill, "scores"),
    stage2=(seats, "select_in_chunks"),
    masks=(prefill, "stock_mask"),
    caches=(cache, "shorten_cache"),
    decoding=(Slots, "mask"),
    features=(Check, "of_inputs"),
    checks=(Check, "of_scores"),
    counts=(Check, "of_counts"),
)


@pytest.mark.parametrize(
    "body, how", [*((body, "mask") for body in BODIES), *(("scores", how) for how in ASKING)]
)
def test_waits_are_found(there, batches, strict, monkeypatch, body, how):
    "Anywhere in them."
    place, name = BODIES[body]
    whole = getattr(place, name)

    def asks(*args, **kwargs):
        ASKING[how](torch.ones(3, device="cuda"))
        return whole(*args, **kwargs)

    monkeypatch.setattr(place, name, asks)
    with pytest.raises(Wait), prune(there, PLANS["together"], kv="evict"):
        there.generate(**batches[3].to("cuda").inputs, max_new_tokens=2, min_new_tokens=2)
