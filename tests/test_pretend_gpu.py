"""Everything that would run on a GPU, on one that is pretended (`pretend.py`): devices are not
mixed, our hooks do not wait, streams are waited for."""

import copy
import pytest, torch
import tiny
from seats_analysis.pruning import prefill
from pretend import Wait, no_waits, pretend_gpu
from test_hot_path import PLANS
from seats_analysis.lab import bench
from seats_analysis.pruning import encoders, session
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.scoring import score_choices
from seats_analysis.baselines.registry import METHODS
from seats_analysis.pruning.cache import follow_up
from seats_analysis.pruning.prefill import Prefill
from seats_analysis.pruning.session import Session, prune
from seats_analysis.probing.run import probe_dependency

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real one: `pytest -m cuda`"
)
HOT = (
    (Prefill, "stage1"),
    (Session, "before_layer"),
    (Session, "after_layer"),
    (Session, "decode_step"),
    (session, "evict"),
    (encoders.EncoderWatch, "aggregate"),
)
SAMPLES = tiny.three()


@pytest.fixture(scope="module")
def batches(model):
    return {
        n: encode(model, tiny.processor(adapter_for(model).family), SAMPLES[:n]) for n in (1, 3)
    }


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


def answered(model, batch, plan, options, **how):
    "Tokens that are generated, and what was left of the prompt at every stage."
    how = dict(max_new_tokens=3, min_new_tokens=3) | how
    with prune(model, plan, **options) as run:
        ids = model.generate(**batch.inputs, **how)
    return (
        ids.tolist(),
        run.tokens_per_layer.tolist(),
        {k: [x.tolist() for x in v] for k, v in run.kept.items()},
        run.timings,
    )


def same(model, there, batch, plan, options=None, **how):
    "The same on both devices, the timings aside."
    here, pretended = (
        answered(m, b, plan, options or {}, **how)
        for m, b in ((model, batch), (there, batch.to("cuda")))
    )
    assert here[:3] == pretended[:3]
    assert pretended[3].ms["prefill"] > 0 and pretended[3].calls == here[3].calls


@pytest.mark.parametrize(
    "n, name, kv",
    [(1, "together", "evict"), (3, "together", "retain"), *((3, name, "evict") for name in PLANS)],
)
def test_pruned_answers(model, there, batches, strict, n, name, kv):
    same(model, there, batches[n], PLANS[name], dict(kv=kv))


@tiny.by_turns(METHODS)
def test_methods(model, there, batches, strict, name):
    same(
        model,
        there,
        batches[3],
        METHODS[name].for_trr(tiny.LAYERS, 0.5, 0.6, 18, 30),
        max_new_tokens=1,
        min_new_tokens=1,
    )


@pytest.mark.parametrize("how", [dict(num_beams=2), dict(num_beams=2, num_return_sequences=2)])
def test_beams(model, there, batches, strict, how):
    same(model, there, batches[3], PLANS["together"], **how)


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
    def told(model, batch):
        with prune(model, PLANS["together"], kv="retain"):
            out = model(**batch.inputs, use_cache=True)
            more = torch.cat([batch.inputs["input_ids"], batch.inputs["input_ids"][:, -4:]], 1)
            return model(**follow_up(out.past_key_values, more)).logits.cpu()

    torch.testing.assert_close(
        told(model, batches[1]), told(there, batches[1].to("cuda")), rtol=0, atol=0
    )


def test_scores_of_choices(model, there, batches):
    here, pretended = (
        score_choices(m, b) for m, b in ((model, batches[3]), (there, batches[3].to("cuda")))
    )
    torch.testing.assert_close(here.total, pretended.total, rtol=0, atol=0)


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


# ---------------------------------------------------------------- what `seats bench` does there


@pytest.mark.parametrize(
    "config, width",
    [
        pytest.param("qwen2.5-omni-7b", 64, marks=pytest.mark.nightly),
        ("testbed", None),
        pytest.param("qwen3-omni-30b-a3b", 64, marks=pytest.mark.nightly),
    ],
)
def test_bench(gpu, tmp_path, config, width):
    "Weights made on the device, in bfloat16; times from events, memory from the allocator."
    jobs = [
        bench.Job(config, bench.Request(4, 2.0), width, plans=(("full", 100.0), ("seats", 40.0)))
    ]
    setup = bench.BenchSetup("cuda", torch.bfloat16, steps=1)
    bench.BenchFile(tmp_path / "b.json", setup).run(jobs, repeats=1)
    rows = bench.load_json(tmp_path / "b.json", "bench")["rows"]
    assert len(rows) == 2 and all(
        r["error"] is None and r["ttft_ms"] > 0 and r["decode_ms_per_token"] > 0 for r in rows
    )
    assert [r["method"] for r in rows if r["selection_ms"] > 0] == ["seats"]


# ---------------------------------------------------------------- the pretended one can tell


def test_mixed_devices_are_found(there, batches, monkeypatch):
    whole = prefill.query_scores
    monkeypatch.setattr(prefill, "query_scores", lambda *args: whole(*args) + torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="same device"), prune(there, PLANS["together"]):
        there(**batches[1].to("cuda").inputs)


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.repeat_interleave(x.long().flatten()),
    ],
)
def test_waits_are_found(there, batches, strict, monkeypatch, planted):
    whole = Prefill.scores

    def asks(*args):
        scores = whole(*args)
        planted(scores)
        return scores

    monkeypatch.setattr(Prefill, "scores", asks)
    with pytest.raises(Wait), prune(there, PLANS["together"]):
        there(**batches[1].to("cuda").inputs)
