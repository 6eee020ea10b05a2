"`seats bench`: models of real sizes, rows that add up, a file that survives interruptions."

import json
from collections import Counter
from functools import partial

from conftest import ROOT
import pytest
import torch
from pretend import pretend_gpu
from test_cli import seats

from seats_analysis import METHODS, adapter_for, encode, prune
from seats_analysis.lab import bench, bench_command, paper
from seats_analysis.lab.bench import BenchSetup, Job, Workload
from seats_analysis.lab.bench_rows import TIMES, compared
from seats_analysis.lab.workloads import SIZES, Request, bench_inputs, bench_processor, build_model
from seats_analysis.storage.schemas import load_json

SHORT = Request(4, 2, 30)
seats = partial(seats, "bench")


@pytest.fixture(scope="module")
def workload():
    "The depth of the 7B at width 32, and a short request."
    model = build_model("qwen2.5-omni-7b", 32)
    inputs = bench_inputs(model, bench_processor("qwen2.5-omni-7b"), SHORT)
    return Workload(model, inputs, steps=1)


JOB = Job("qwen2.5-omni-7b", SHORT)


@pytest.fixture(scope="module")
def method():
    return JOB.method("seats", 10)


# ---------------------------------------------------------------- models and requests

# Of the language models as published with Qwen2.5-7B, Qwen2.5-3B (its head not tied here) and
# Qwen3-30B-A3B (128 more rows in embedding and head).
WEIGHTS = {
    "qwen2.5-omni-7b": 7_615_616_512,
    "qwen2.5-omni-3b": 3_085_938_688 + 151_936 * 2048,
    "qwen3-omni-30b-a3b": 30_532_122_624 + 2 * 128 * 2048,
}


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes(name):
    model = build_model(name, device="meta")
    parts = adapter_for(model).decoder(model), model.lm_head
    assert sum(p.numel() for part in parts for p in part.parameters()) == WEIGHTS[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_preset_has_the_tokens_that_the_adapter_finds(workload):
    name, request = "qwen2.5-omni-7b", Request.of("daily-omni")
    processor = bench_processor(name)
    layout = encode(workload.model, processor, [request.sample(processor)]).layout
    found = {k: int(n) for k, n in layout.counts().items() if k != "image"}
    assert found == request.tokens(name) == dict(visual=9216, audio=1500, text=150)
    # audio lies between the frames, chunk by chunk
    assert layout.window.max() >= 29 and layout.chunk.max() >= 29


def test_rows_repeat_one_sample(workload):
    model, name = workload.model, "qwen2.5-omni-7b"
    both, n = bench_inputs(model, bench_processor(name), SHORT, 2), sum(SHORT.tokens(name).values())
    assert both["input_ids"].shape == (2, n) and both["position_ids"].shape == (3, 2, n)
    with torch.no_grad():
        one, two = (model(**x).logits[:, -1] for x in (workload.inputs, both))
    torch.testing.assert_close(two, one.expand(2, -1), atol=1e-4, rtol=1e-4)


def test_every_method_can_be_timed(workload, monkeypatch):
    monkeypatch.setattr(bench, "peak_bytes", lambda model, inputs, body: (body(), 0))
    flops = lambda m: workload.facts(m)["flops"]["causal"]
    full = flops(None)
    lean = {name: flops(JOB.method(name, 10)) for name in METHODS if "downsample" not in name}
    assert max(lean.values()) < full, lean
    for name in ("seats", "random"):
        assert lean[name] < flops(JOB.method(name, 35)) < full


# ---------------------------------------------------------------- one request


def test_the_full_model_runs_as_it_is(workload, method, monkeypatch):
    "No hook of `prune`, and logits of the last position on both sides."
    seen, entered = [], []
    monkeypatch.setattr(bench, "prune", lambda *a, **k: entered.append(a) or prune(*a, **k))
    handle = workload.model.lm_head.register_forward_hook(
        lambda m, args, out: seen.append(tuple(args[0].shape[:2]))
    )
    try:
        workload.time()
        assert not entered
        workload.time(method)
    finally:
        handle.remove()
    assert len(entered) == 1 and seen == [(1, 1)] * 4


def test_time_is_charged_where_it_is_spent(workload, method, monkeypatch):
    """A slower tower is encoder time, a slower choice selection, a slower head prefill.

    The best of two timings each: neighbours only add."""
    import time

    model, slow = workload.model, lambda *a: time.sleep(0.3)

    def best():
        runs = [workload.time(method) for _ in range(2)]
        return {k: min(r[k] for r in runs) for k in ("encoder_ms", "selection_ms", "prefill_ms")}

    before = best()
    for part, module in (
        ("encoder_ms", adapter_for(model).visual(model).merger),
        ("prefill_ms", adapter_for(model).layers(model)[3].mlp),
    ):
        handle = module.register_forward_pre_hook(slow)
        try:
            after = best()
        finally:
            handle.remove()
        grown = {k: after[k] - before[k] for k in before}
        assert max(grown, key=grown.get) == part and grown[part] > 200
    real = type(method).select
    monkeypatch.setattr(type(method), "select", lambda self, inputs: slow() or real(self, inputs))
    assert workload.time(method)["selection_ms"] > before["selection_ms"] + 200


# ---------------------------------------------------------------- rows and the file


def row(method, trr, encoder, selection, prefill, causal, **more):
    "A row with one timing."
    times = dict(zip(TIMES, (encoder, selection, prefill, encoder + selection + prefill, 20.0)))
    return dict(
        config="testbed",
        width=None,
        batch=1,
        frames=4,
        seconds=2.0,
        method=method,
        trr=trr,
        encoders="",
        tokens=458,
        flops=dict(causal=causal, counter=causal),
        samples=[times],
        **more,
    )


@pytest.fixture
def clock(monkeypatch):
    "Replaces what takes time; counts timings and facts, and interrupts before timing `stop_at`."

    class Clock:
        calls, stop_at, facts, full = 0, None, 0, True

    clock = Clock()

    def time(self, method):
        if clock.calls == clock.stop_at:
            clock.stop_at = None
            raise KeyboardInterrupt
        clock.calls += 1
        spent = (1.0, 0.0, 9.0, 10.0, 1.0) if method is None else (1.0, 1.0, 2.0, 4.0, 1.0)
        return dict(zip(TIMES, spent))

    def facts(self, method):
        clock.facts += 1
        if method is None and not clock.full:
            raise torch.OutOfMemoryError
        flops = 1.0 if method else 4.0
        return dict(
            flops=dict(causal=flops, counter=flops), kv_bytes=1, peak_bytes=2, layer_tokens=[1]
        )

    monkeypatch.setattr(BenchSetup, "build", lambda self, config, width: "model")
    monkeypatch.setattr(BenchSetup, "workload", lambda self, job, model: Workload(model, {}))
    monkeypatch.setattr(Workload, "time", time)
    monkeypatch.setattr(Workload, "facts", facts)
    return clock


SHAPE = "--config testbed --frames 4 --seconds 2".split()
ASKED = *SHAPE, *"--methods seats,random --trr 35,10 --repeats 3".split()
ONE = "--methods seats --trr 10 --repeats 1".split()


@pytest.fixture
def ask(clock, tmp_path):
    "Runs the command, always into one file."
    return lambda *words: seats(*words, "--out", tmp_path / "b.json")


def rows_in(folder):
    return load_json(folder / "b.json", "bench")["rows"]


def test_file(ask, tmp_path):
    assert ask(*ASKED).exit_code == 0
    asked = [("full", 100), *((m, trr) for m in ("seats", "random") for trr in (35, 10))]
    assert [(r["method"], r["trr"]) for r in rows_in(tmp_path)] == asked
    stored = json.loads((tmp_path / "b.json").read_text())
    known = "schema model revision seed device versions threads command"
    assert set(known.split()) <= set(stored)
    assert [len(r["samples"]) for r in stored["rows"]] == [3] * 5


def test_ctrl_c_keeps_timings_and_the_same_command_goes_on(ask, clock, tmp_path):
    clock.stop_at = 7  # in the second of three rounds of five
    stopped = ask(*ASKED)
    assert stopped.exit_code == 130 and "goes on from there" in stopped.stderr
    stored = rows_in(tmp_path)
    assert Counter(len(r["samples"]) for r in stored) == {2: 2, 1: 3}
    assert ask(*ASKED).exit_code == 0
    assert clock.calls == 15 + 5 and clock.facts == 5  # a warm-up each in the new process
    assert {len(r["samples"]) for r in rows_in(tmp_path)} == {3}
    whole = ask(*ASKED)
    assert whole.exit_code == 0 and clock.calls == 20 and "5 rows are in" in whole.stderr
    ask(*ASKED[:-1], 4)  # a repeat more
    assert clock.calls == 20 + 5 + 5
    assert not [p for p in tmp_path.iterdir() if p.name != "b.json"]


def test_rows_of_other_circumstances_are_not_lost(ask, clock, tmp_path, monkeypatch):
    "Options, kernels and code; and files that are no benchmark."
    ask(*ASKED)
    before = (tmp_path / "b.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setenv("SEATS_TRITON", "1")
        said = ask(*ASKED).stderr
        assert "kernels torch, now triton" in said and "--again" in said
    with monkeypatch.context() as patch:
        patch.setattr(bench, "hash_code", lambda: "changed")
        assert "made with code_sha256" in ask(*ASKED).stderr
    assert (tmp_path / "b.json").read_bytes() == before and clock.calls == 15
    assert ask(*ASKED, "--again").exit_code == 0 and clock.calls == 30
    (tmp_path / "b.json").write_text('{"rows": []}')
    assert "not a benchmark" in ask(*ASKED).stderr
    assert (tmp_path / "b.json").read_text() == '{"rows": []}'


def test_what_does_not_fit_is_said(ask, clock, tmp_path):
    "The full model runs out of memory: the pruned rows stand alone."
    clock.full = False
    said = ask(*ASKED)
    assert "out of memory" in said.stdout
    rows = [r for r in compared(rows_in(tmp_path)) if r["samples"]]
    assert [r["method"] for r in rows] == ["seats", "seats", "random", "random"] and {
        r["speedup"] for r in rows
    } == {None}


@pytest.mark.parametrize(
    "where, error",
    [
        ("build", torch.OutOfMemoryError()),
        ("workload", MemoryError()),
        ("time", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ],
    ids=("build", "workload", "time"),
)
def test_no_step_out_of_memory_ends_the_run(ask, tmp_path, monkeypatch, where, error):
    "Rows that do not fit are named, all others are there, and the next call tries again."
    place = Workload if where == "time" else BenchSetup
    real = getattr(place, where)
    asked = *SHAPE, *ONE, "--batch", "1,4"

    def fails_once(*args, **kw):
        monkeypatch.setattr(place, where, real)
        raise error

    monkeypatch.setattr(place, where, fails_once)
    assert ask(*asked).exit_code == 0
    rows = rows_in(tmp_path)
    lost = {"build": 2, "workload": 2, "time": 1}[where]
    assert [r.get("error") for r in rows] == ["out of memory"] * lost + [None] * (4 - lost) and all(
        r["samples"] for r in rows[lost:]
    )
    ask(*asked)
    assert all(len(r["samples"]) == 1 and not r.get("error") for r in rows_in(tmp_path))


def test_batches_cost_in_proportion():
    "Four times the prompts take four times as long, four times the tokens sixteen times."
    short = dict(row("full", 100, 0, 0, 10.0, 1.0), tokens=1000)
    file = bench.BenchFile("nowhere.json", BenchSetup())
    # many short prompts say nothing about a long one
    file.rows = {1: short, 2: dict(short, tokens=100, batch=16)}
    longer = lambda limit, **more: file._takes_longer(short | more, limit)
    assert longer(0.039, batch=4) and not longer(0.041, batch=4)
    assert longer(0.159, tokens=4000) and not longer(0.161, tokens=4000)


def test_what_takes_too_long_is_left_out(ask, clock, tmp_path, monkeypatch):
    "The full model takes 10 ms, pruned 4; of twice the tokens four times as much is expected."
    asked = *"--config testbed --scaling 8192".split(), *ONE
    left = lambda: [r["method"] for r in rows_in(tmp_path) if r.get("error")]
    monkeypatch.setattr(bench_command, "MAX_SECONDS", 0.03)  # doubling the tokens: 40 and 16 ms
    said = ask(*asked)
    assert (
        "left out: longer than 0.03 s" in said.stdout
        and left() == ["full"] * 3
        and clock.calls == 5
    )
    monkeypatch.setattr(bench_command, "MAX_SECONDS", 1)  # asked again with more patience
    ask(*asked)
    assert left() == [] and clock.calls == 8


def test_figures_of_a_stored_benchmark(clock, tmp_path):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "bench_x.json"
    asked = "--config testbed --scaling 4096 --methods seats --trr 35,10 --repeats 1"
    seats(*asked.split(), "--out", path)
    jobs = paper.figure_jobs(tmp_path)
    assert list(jobs) == ["bench_x_timings", "bench_x_speedup", "bench_x_scaling"]
    for draw in jobs.values():
        assert draw().axes


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data" / "results").glob("bench_*.json")), ids=lambda p: p.stem
)
def test_committed_benchmark(path):
    "Committed rows are whole, follow from their timings, and keep what the project promises."
    stored = bench.load_json(path, "bench")
    rows = [r for r in compared(stored["rows"]) if not r.get("error")]
    assert rows and compared(stored["rows"]) == stored["rows"]
    assert min(r["repeats"] for r in rows) >= 3
    for r in rows:
        assert r["encoder_ms"] > 0 and r["kv_bytes"] > 0
        if r["speedup"]:
            assert r["realised_fraction"] == pytest.approx(
                r["speedup"] * r["flops_fraction_causal_without_selection"]
            )
    if "testbed" in stored["model"]:
        assert (
            max(
                r["realised_fraction"]
                for r in rows
                if r["config"] == "testbed"
                and r["method"] == "seats"
                and r["trr"] == 10
                and r["tokens"] >= 4000
            )
            >= 0.6
        )


# ---------------------------------------------------------------- the promise, and a GPU


@pytest.fixture
def gpu():
    with torch.no_grad(), pretend_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize(
    "config, width",
    [
        pytest.param("qwen2.5-omni-7b", 64, marks=pytest.mark.nightly),
        ("testbed", None),
        pytest.param("qwen3-omni-30b-a3b", 64, marks=pytest.mark.nightly),
    ],
)
def test_on_a_pretended_gpu(gpu, tmp_path, config, width):
    "Weights made on the device, in bfloat16; times from events, memory from the allocator."
    jobs = [
        bench.Job(config, bench.Request(4, 2.0), width, plans=(("full", 100.0), ("seats", 40.0)))
    ]
    setup = bench.BenchSetup("cuda", torch.bfloat16, steps=1)
    bench.BenchFile(tmp_path / "b.json", setup).run(jobs, repeats=1)
    rows = rows_in(tmp_path)
    assert len(rows) == 2 and all(
        r["error"] is None and r["ttft_ms"] > 0 and r["decode_ms_per_token"] > 0 for r in rows
    )
    assert [r["method"] for r in rows if r["selection_ms"] > 0] == ["seats"]
