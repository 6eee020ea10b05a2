"""Encoded once is as good as every time, costs match, runs go on, differences are paired."""

import itertools
import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from seats_analysis.evaluation import compare, table
from seats_analysis.models.families import adapter_for, hash_weights
from seats_analysis.models.encode import encode
from seats_analysis.models.scoring import score_choices
from seats_analysis.baselines.registry import ABLATIONS, METHODS
from seats_analysis.statistics.intervals import mcnemar
from seats_analysis.evaluation.compare import (
    TOLERANCE,
    Answering,
    MethodRun,
    Outcomes,
    compare_methods,
    match_cost,
    method_names,
    method_runs,
)
from seats_analysis.evaluation.evaluate import (
    accuracy_interval,
    evaluate,
    paired_difference,
    parse_answer,
)
from seats_analysis.evaluation.prepared import DataShape, PreparedBatch, prepare_questions
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.session import prune
from seats_analysis.pruning.timing import Timings
from seats_analysis.schedules.cost import prefill_flops
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.storage.schemas import load_profile
from seats_analysis.testbed.load import TESTBEDS, load_testbed

ROOT = Path(__file__).resolve().parents[1]
L = tiny.LAYERS
PLAN = Schedule(
    L,
    drop_layers=(1, 3),
    late_start=5,
    entering=dict(visual=0.3, audio=0.5),
    keep_ratios=dict(visual=(0.8, 0.6), audio=(0.8, 0.6)),
)


@pytest.fixture(scope="module")
def samples():
    "Two questions on each of four clips, one silent and one only heard, and one without any."
    clips = [
        tiny.clip(0),
        tiny.clip(1, 3, sound=False),
        tiny.clip(2, 2.7, sight=False),
        tiny.clip(3, 3.0),
        None,
    ]
    out = [
        tiny.ask(
            f"{k}-{q}",
            c,
            ("what colour is the circle ?", "where is the red object ?")[q],
            lettered=k == 2,
            family=f"f{q}",
        )
        for k, c in enumerate(clips)
        for q in range(2)
    ]
    return out[:-1]


# ---------------------------------------------------------------- encoded once


def prepared(model, processor, samples, methods=()):
    return PreparedBatch.of(model, processor, prepare_questions(model, processor, samples, methods))


def method_of(name):
    "Any method at visual 40 % and audio 50 %; SEATS with its schedule."
    if name in ("full", "seats"):
        return None if name == "full" else METHODS["seats"](PLAN)
    cls = (METHODS | ABLATIONS)[name.removesuffix("+late")]
    own = dict(like=PLAN) if issubclass(cls, METHODS["seats"]) else {}
    method = cls.for_trr(L, 0.4, 0.5, 24, 40, **own)
    return method.leaving(PLAN) if name.endswith("+late") else method


def run_of(name, trr=30):
    return MethodRun(name, name, trr, (method_of(name),))


def test_inputs_are_those_of_encode(model, processor, samples):
    ours = prepared(model, processor, samples).encoded
    theirs = encode(model, processor, samples)
    names = "input_ids", "attention_mask", "position_ids"
    for key in (*names, "video_grid_thw", "feature_attention_mask"):
        assert torch.equal(ours.inputs[key], theirs.inputs[key].to(ours.inputs[key].dtype)), key
    for key in ("modality", "window", "chunk"):
        assert torch.equal(getattr(ours.layout, key), getattr(theirs.layout, key)), key
    assert ours.choice_ids == theirs.choice_ids
    assert torch.equal(ours.rope_deltas.float(), theirs.rope_deltas.float())
    assert not {"pixel_values_videos", "input_features"} & set(ours.inputs)


LATE = compare._LATE
NAMES = "full", *METHODS, *ABLATIONS, "fastv-om+late"


@pytest.fixture(scope="module")
def batches(model, processor, samples):
    "Four questions for which every method has noted what it asks, and the same from `encode`."
    some = [s for s in samples if s.clip in ("c0", "c3")]  # some methods need both modalities
    ours = prepared(model, processor, some, [method_of(n) for n in NAMES])
    return ours, encode(model, processor, some)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_uncached_run(model, batches, name):
    "Every method, both families: DeepStack, merging, keys and windows of a method's own."
    method, (batch, whole) = method_of(name), batches
    with batch.prune(method) as (run, given):
        cached = score_choices(model, given)
    with prune(model, method) as plain:
        fresh = score_choices(model, whole)
    torch.testing.assert_close(cached.total, fresh.total, atol=2e-5, rtol=0, equal_nan=True)
    assert (run.tokens_per_layer == plain.tokens_per_layer).all()
    assert {k: [p.tolist() for p in v] for k, v in run.kept.items()} == {
        k: [p.tolist() for p in v] for k, v in plain.kept.items()
    }
    assert run.timings.calls["encoders"] == 0 < plain.timings.calls["encoders"]
    if method is not None and min(method.schedule.entering.values()) < 1:
        assert run.kept


def test_towers_run_once_per_clip(model, processor, samples):
    "However many runs and questions."
    calls, parts = [], dict(visual=adapter_for(model).visual, audio=adapter_for(model).audio_tower)
    handles = [
        part(model).register_forward_hook(lambda m, a, out, n=name: calls.append(n))
        for name, part in parts.items()
    ]
    runs = [run_of("full"), run_of("seats")]
    try:
        Answering(model, processor, samples, runs, batch_size=2).answer_all()
    finally:
        [h.remove() for h in handles]
    assert sorted(calls) == ["audio"] * 3 + ["visual"] * 3


def test_frame_limit_holds_for_files(small):
    "Counts and answers are those of `encode` under the same limit."
    from seats_analysis.testbed.load import testbed_samples

    some, limit = testbed_samples(split="test", limit=4), dict(max_frames=4)
    batch = encode(*small, some, **limit)
    every, few = (DataShape.of(*small, some, **kw) for kw in ({}, limit))
    counted = batch.layout.counts()["visual"].double().mean()
    assert few.mean("visual") == counted < every.mean("visual")
    found = Answering(*small, some, [run_of("full")], limits=limit).answer_all()
    scores = score_choices(small[0], batch)
    np.testing.assert_allclose(
        [row[0]["nll"] for row in found],
        [-scores.total[i, s.answer].item() for i, s in enumerate(some)],
        atol=2e-5,
    )


def test_outcomes_are_those_of_evaluate(model, processor, samples):
    drawn = METHODS["random"].for_trr(L, 0.4, 0.5, 24, 40, seed=3)
    runs = [run_of("full"), run_of("seats"), MethodRun("random", "random", 30, (drawn,))]
    some = samples[:1] + samples[3:6] + samples[-1:]
    found = Answering(model, processor, some, runs, batch_size=3).answer_all()
    for k, r in enumerate(runs):
        frame = evaluate(model, processor, some, r.plans[0], batch_size=len(some))
        assert [row[k]["correct"] for row in found] == frame.correct.tolist()
        np.testing.assert_allclose([row[k]["nll"] for row in found], frame.nll, atol=2e-5)
        np.testing.assert_allclose([row[k]["margin"] for row in found], frame.margin, atol=2e-5)


# ---------------------------------------------------------------- the same cost


@pytest.fixture(scope="module")
def shape():
    "Counts of the testbed: 192 visual, 40 audio and the text tokens, 20 layers."
    from seats_analysis.testbed.load import build_model, build_processor, fresh_samples

    model = build_model().eval()
    return DataShape.of(model, build_processor(), fresh_samples(8, seed=4, per_clip=2))


PLANS = {t: Schedule.load(ROOT / "data" / "schedules" / f"testbed_trr{t}.json") for t in (35, 10)}


@pytest.fixture(scope="module")
def runs(shape):
    return method_runs(method_names("all,late,ablations"), PLANS, shape)


def test_costs_match_or_are_floors(shape, runs):
    cost_of = lambda r: r.mean([shape.cost(p) for p in r.plans])
    target = {e.trr: cost_of(e) for e in runs if e.label == "seats"}
    assert len(runs) == 1 + len(PLANS) * (len(METHODS | ABLATIONS) + len(LATE))
    for e in runs[1:]:
        cost = cost_of(e)
        if e.setting == "matched":
            assert abs(cost / target[e.trr] - 1) <= TOLERANCE, (e.label, e.trr)
        elif e.setting == "lowest setting":
            assert cost > target[e.trr] * (1 + TOLERANCE), (e.label, e.trr)
        else:
            assert e.setting == "highest setting" and cost < target[e.trr] * (1 - TOLERANCE), (
                e.label,
                e.trr,
            )


def test_fastv_has_a_floor(runs):
    "Its first two layers see everything, which is more than SEATS spends at 10 %."
    settings = {e.trr: e.setting for e in runs if e.label == "fastv-om"}
    assert settings[10] == "lowest setting" and settings[35] == "matched"


def test_floors_are_marked_in_every_column(runs, shape):
    "A rule that keeps as much at its lowest setting is at its floor, whatever chance does beside."
    floors = {(e.label, e.trr): e.floor for e in runs}
    for trr in PLANS:
        for name in ("visionzip", "dycoke"):  # they pay with audio that they have no rule for
            assert floors[name, trr] == (("visual",) if trr == 10 else ())
        for name in ("seats", "random", "uniform", "divprune-om", "visionzip-om-wide"):
            assert floors[name, trr] == ()
    for e in runs:
        if e.setting == "lowest setting" and hasattr(e.plans[0], "prunes"):
            assert e.floor, (e.label, e.trr)


def test_late_removal_is_where_seats_has_it(runs, shape):
    for e in runs:
        if e.label.endswith("+late"):
            plan, tokens = PLANS[e.trr], shape.plans(e.plans[0])
            assert all((tokens[m][:, plan.late(m) :] == 0).all() for m in ("visual", "audio"))
            assert not e.plans[0].stages == (3,)
    own = {n for n, m in METHODS.items() if 1 in m.stages or 2 in m.stages} - {"seats"}
    assert {n.removesuffix("+late") for n in LATE} == own == {*METHODS} - {"seats", "vtw"}
    with pytest.raises(ValueError, match="unknown method 'vtw.late'"):
        method_names("vtw+late")


def test_the_nearest_of_a_tuned_chain_is_brought_to_the_same_cost(shape):
    chain = [Seats.for_trr(16, t, t, 192, 40, like=PLANS[10]) for t in (0.3, 0.2, 0.07)]
    whole = [METHODS["vtw"].for_trr(16, 0.9, 0.9)]  # has no knob
    anchors = [METHODS["visionzip-om"].for_trr(16, 0.03, 0.5, 192, 40)]  # one in each window
    tuned = dict(seats=chain, vtw=whole, visionzip=anchors)
    found = method_runs(("seats",), PLANS, shape, tuned=tuned)
    at = {(e.label, e.trr): e for e in found}
    for trr, near in zip((35, 10), (chain[0], chain[2])):
        tuned, target = at["seats+tuned", trr], shape.cost(at["seats", trr].plans[0])
        assert tuned.setting == "matched"
        assert tuned.mean([*map(shape.cost, tuned.plans)]) == pytest.approx(target, rel=TOLERANCE)
        assert tuned.plans[0].schedule.late_start == near.schedule.late_start
    assert at["vtw+tuned", 10].setting == "lowest setting"  # dearer
    floors = [at[f"{name}+tuned", 10].floor for name in ("seats", "visionzip")]
    assert floors == [(), ("visual",)]


@contextmanager
def counted_selection():
    "FLOPs that torch counts while tokens are chosen."
    total, real = [0], Timings.time

    @contextmanager
    def time(self, section, name=None):
        choosing = section == "selection"
        counter = FlopCounterMode(display=False) if choosing else nullcontext()
        with real(self, section, name), counter:
            yield self
        total[0] += counter.get_total_flops() if choosing else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timings, "time", time)
        yield total


@tiny.by_turns([*METHODS, *ABLATIONS, "fastv-om+late"])
def test_selection_flops_are_those_that_torch_counts(model, processor, samples, name):
    "Closed form against the counter, for every method and in both families."
    (some,) = [s for s in samples if s.id == "3-0"]
    method, shape = method_of(name), DataShape.of(model, processor, [some])
    with counted_selection() as counted, torch.no_grad(), prune(model, method):
        model(**encode(model, processor, [some]).inputs)
    dims, full = shape.dims, sum(shape.full.values())[0].tolist()
    planned = shape.selection(method) * prefill_flops(full, dims, "causal")
    assert planned == pytest.approx(counted[0], rel=0.02)
    decoder = prefill_flops(sum(shape.plans(method).values())[0].tolist(), dims, "causal")
    whole = (decoder + counted[0]) / prefill_flops(full, dims, "causal")
    assert shape.cost(method) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
def test_shares_are_even(share):
    e = MethodRun("x", "x", 10, ("a", "b"), share=share)
    drawn = [e.plan_for(i) == "b" for i in range(200)]
    assert max(abs(sum(drawn[:n]) - share * n) for n in range(1, 201)) <= 0.5 + 1e-9


def test_matching_against_a_plain_search():
    "On random staircases: within the tolerance whatever the steps, and an honest floor."
    rng = np.random.default_rng(0)
    for i in range(50):
        edges, costs = np.sort(rng.random(8)), np.sort(rng.random(9))
        stairs, target = (lambda k: float(costs[np.searchsorted(edges, k)])), rng.random()
        if i % 5 == 0:
            target = stairs(1e-4) * rng.uniform(
                1 - TOLERANCE, 1 - TOLERANCE / 2
            )  # floors a little too dear, and tops a little too cheap
        if i % 5 == 1:
            target = stairs(1.0) * rng.uniform(1 + TOLERANCE / 2, 1 + TOLERANCE)
        found = match_cost(stairs, lambda x: x, target, 1.0)
        assert 0 <= found.get("share", 0) <= 1
        cost = (
            found["plans"][0]
            if len(found["plans"]) == 1
            else (1 - found["share"]) * found["plans"][0] + found["share"] * found["plans"][1]
        )
        setting = found.get("setting", "matched")
        floor, top = stairs(1e-4), costs[8] if edges[-1] < 1 else costs[7]
        expected = (
            "lowest setting"
            if floor > target * (1 + TOLERANCE)
            else "highest setting"
            if top < target * (1 - TOLERANCE)
            else "matched"
        )
        assert setting == expected
        if expected == "matched":
            assert abs(cost / target - 1) <= TOLERANCE


@pytest.mark.parametrize("options", [dict(seconds=0.5), dict(grids=2), dict(grids=2, seconds=0.5)])
def test_windows_of_a_method_s_own(model, processor, samples, options):
    "Beside the same method with other windows: each finds what it asked for, and runs as planned."
    some = [s for s in samples if s.clip == "c0"][:1]
    other, method = (
        METHODS["visionzip-om"].for_trr(L, 0.4, 0.5, 24, 40, **o) for o in ({}, options)
    )
    for order in ([other, method], [method, other]):
        with prepared(model, processor, some, order).prune(method) as (run, given):
            model(**given.inputs)
        with prune(model, method) as plain:
            model(**encode(model, processor, some).inputs)
        assert run.kept["stage1"][0].tolist() == plain.kept["stage1"][0].tolist()
        (planned,) = sum(DataShape.of(model, processor, some).plans(method).values())
        assert planned.tolist() == plain.tokens_per_layer[0].tolist()


def test_a_modality_that_no_layer_sees(shape):
    "SEATS may withdraw one modality at once; the others are matched to what that costs."
    plan = Schedule(16, late_start=dict(visual=0, audio=12), entering=dict(visual=1.0, audio=0.5))
    found = method_runs(method_names("all"), {10: plan}, shape)
    assert len(found) == 1 + len(METHODS)
    assert any(e.setting == "matched" for e in found[2:])


def test_plans_are_what_runs(model, processor, samples, batches):
    "Planned counts of every method are the tokens that layers then process."
    some = [s for s in samples if s.clip == "c0"]
    shape = DataShape.of(model, processor, some)
    for name in METHODS:
        with batches[0].prune(method_of(name)) as (run, given), torch.no_grad():
            model(**given.inputs)
        planned = sum(shape.plans(method_of(name)).values())
        assert planned[0].tolist() == run.tokens_per_layer[0].tolist(), name


# ---------------------------------------------------------------- interrupted, shared

NAMED = ("seats", "random")


@pytest.fixture(scope="module")
def small():
    from seats_analysis.testbed.load import build_processor

    return tiny.thinker("qwen2.5-omni", layers=L), build_processor()


def without_times(result):
    rows = [{k: v for k, v in r.items() if not k.startswith("ms")} for r in result["rows"]]
    return json.dumps(rows, sort_keys=True)


def test_ablations_of_a_plan_that_goes_by_distance(small, samples, tmp_path):
    plans, names = {30: replace(PLAN, weighted=False)}, method_names("ablations")
    result = compare_methods(*small, samples[:2], plans, names, tmp_path / "eval", n_boot=50)
    assert {r["label"] for r in result["rows"]} >= set(ABLATIONS)


def test_interrupted_runs_go_on(small, samples, tmp_path, monkeypatch):
    some = samples[:6]
    compared = lambda name: compare_methods(
        *small, some, {30: PLAN}, NAMED, tmp_path / name, n_boot=50, batch_size=2
    )
    asked, real = [], Answering.answer_unit

    def noted(self, questions, number, first, runs, *tick):
        if len(runs) > 2:  # no warm-up
            if len(asked) == 2 and not stopped:
                raise KeyboardInterrupt
            asked.append([q.sample.id for q in questions])
        return real(self, questions, number, first, runs, *tick)

    monkeypatch.setattr(Answering, "answer_unit", noted)
    stopped, path = [], tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        compared("cut.json")
    stopped.append(True)
    assert not path.exists()
    finished = list(Path(f"{path}.checkpoint").glob("[0-9]*.json"))
    assert len(finished) == sum(map(len, asked))
    again = compared("cut.json")
    assert len({i for ids in asked for i in ids}) == sum(map(len, asked)) == len(some)
    assert without_times(again) == without_times(compared("whole.json"))
    assert not Path(f"{path}.checkpoint").exists()


def test_a_process_without_questions_leaves_nothing(small, samples, tmp_path):
    asked = Answering(*small, samples[:2], [run_of("full")], batch_size=2)
    assert asked.answer_all(tmp_path / "j", shard=(3, 4)) is None and not (tmp_path / "j").exists()


def test_checkpoint_of_another_run_is_refused(small, samples, tmp_path):
    def begin(plan=PLAN, other="random", about={}, **kw):
        seats = MethodRun("seats", "seats", 30, (METHODS["seats"](plan),))
        asked = Answering(*small, samples[:2], [seats, run_of(other)], batch_size=2, **kw)
        return asked.answer_all(tmp_path / "j", dict(data_sha256="d") | about)

    begin()
    begin()
    for changed in (
        dict(plan=replace(PLAN, temperature=0.3)),
        dict(other="uniform"),
        dict(answers="generate"),
        dict(limits=dict(max_frames=4)),
        dict(about=dict(code_sha256="other")),
        dict(about=dict(data_sha256="other")),
    ):
        with pytest.raises(ValueError, match="cannot be continued"):
            begin(**changed)


def test_processes_share(small, samples, tmp_path):
    asked = Answering(*small, samples, [run_of("full"), run_of("random")], batch_size=2)
    assert asked.answer_all(tmp_path / "j", shard=(1, 2)) is None
    assert 0 < len(list((tmp_path / "j").glob("[0-9]*.json"))) < len(samples)
    shared = asked.answer_all(tmp_path / "j", shard=(0, 2))
    strip = lambda rows: [[{k: v for k, v in o.items() if k != "ms"} for o in row] for row in rows]
    assert strip(shared) == strip(asked.answer_all())


def test_units_keep_clips_together(samples):
    order = samples[::-1] + [replace(samples[0], id="late")]
    units = Answering(None, None, order, (), batch_size=3).units()
    assert sorted(sum(units, [])) == list(range(len(order)))
    where = {}
    for k, unit in enumerate(units):
        for i in unit:
            where.setdefault(order[i].clip, set()).add(k)
    assert all(len(k) == 1 for k in where.values())
    assert max(map(len, units)) <= 3


# ---------------------------------------------------------------- statistics and answers


def test_mcnemar_counts_coins():
    rng = np.random.default_rng(0)
    for n in range(12):
        a, b = rng.random((2, 20)) < 0.5
        wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
        d, k = wins + losses, min(wins, losses)
        tail = sum(math.comb(d, i) for i in range(k + 1)) / 2**d if d else 0.5
        assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_clips_widen_the_interval():
    "Six alike answers per clip say no more than one."
    a, b = np.repeat(np.arange(30) % 3 > 0, 6), np.repeat(np.arange(30) % 5 > 0, 6)
    clustered, loose = (
        paired_difference(a, b, c) for c in (np.repeat(np.arange(30), 6), np.arange(180))
    )
    assert clustered["diff"] == loose["diff"] and clustered["high"] - clustered["low"] > 2 * (
        loose["high"] - loose["low"]
    )


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.7
    other, clips = base & (rng.random(400) < 0.97), np.arange(400) // 2
    width = lambda i: i[1] - i[0]
    found = paired_difference(other, base, clips)
    assert (
        found["high"] - found["low"] < width(accuracy_interval(base, clips)) and found["high"] < 0
    )


def test_parsing_never_guesses():
    "Text that names no choice, or two, is unparsable; only what names one is taken."
    choices = ("red", "green circle", "blue")
    words = ("red", "green circle", "blue", "A", "B.", "(C)", "D", "or", "not")
    for n in (1, 2, 3):
        for said in itertools.product(words, repeat=n):
            text = " ".join(said)
            for lettered in (False, True):
                named = {choices.index(w) for w in said if w in choices} | (
                    {"ABC".index(w.strip("(.)")) for w in said if w.strip("(.)") in "ABC"}
                    if lettered
                    else set()
                )
                pick = parse_answer(text, choices, lettered)
                assert pick is None or named == {pick}, (text, pick)


def test_columns_say_what_happened(shape):
    "Four questions, one of them a control: SEATS is right where the other one is wrong."
    plan = Schedule(
        16,
        drop_layers=(8,),
        late_start=14,
        entering=dict(visual=0.25, audio=0.5),
        keep_ratios=dict(visual=(0.5,), audio=(0.5,)),
    )
    seats, other = METHODS["seats"](plan), METHODS["random"].for_trr(16, 0.5, 0.4, 192, 40)
    runs = [
        MethodRun("full", "full", 100, (None,), setting="full"),
        MethodRun("seats", "seats", 25, (seats,), knob=(1.0,)),
        MethodRun("random", "random", 25, (other,), knob=(1.0,)),
    ]
    asked = [
        tiny.ask(str(i), tiny.clip(i), family=f)
        for i, f in enumerate(("where", "where", "what", "control"))
    ]
    right = [(1, 1, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0)]  # full, SEATS, random
    answers = [
        [
            dict(pick=0, correct=bool(c), ms=[1.0, 2.0, 3.0], flops_causal=f)
            for c, f in zip(row, (100.0, 30.0, 30.0 + 100 * shape.selection(seats)))
        ]
        for row in right
    ]
    full, ours, theirs = Outcomes(answers, asked, runs, shape, n_boot=50).rows()
    assert [(r["n"], r["clips"], r["accuracy"]) for r in (full, ours, theirs)] == [
        (3, 3, 1),
        (3, 3, pytest.approx(2 / 3)),
        (3, 3, pytest.approx(1 / 3)),
    ]
    assert (
        theirs["diff_seats"] == pytest.approx(-1 / 3)
        and theirs["diff_full"] == pytest.approx(-2 / 3)
        and ours["diff_full"] == pytest.approx(-1 / 3)
    )
    assert (
        theirs["families"]["where"]["diff_seats"] == -1
        and theirs["families"]["what"]["diff_seats"] == 1
        and theirs["families"]["control"]["full_accuracy"] == 0
    )
    assert (
        full["diff_seats"] is None
        and ours["diff_seats"] == 0
        and ours["flops_fraction_causal_without_selection"] == 0.3
    )
    # choosing costs SEATS something and chance nothing, so that chance gets more of the decoder
    choosing = [
        r["flops_fraction_causal_with_selection"] - r["flops_fraction_causal_without_selection"]
        for r in (theirs, ours)
    ]
    assert choosing == [0, pytest.approx(shape.selection(seats))]
    assert (
        theirs["flops_fraction_causal_with_selection"]
        == pytest.approx(ours["flops_fraction_causal_with_selection"])
        and theirs["ranked"]
    )
    # 4 windows of 48 and of 10 tokens: 48 + 20 enter, half of them stay from layer 8 to 14;
    # 96 + 16 are drawn once
    assert ours["retention_entry"] == pytest.approx(68 / 232) and theirs[
        "retention_entry"
    ] == theirs["retention_layers"] == pytest.approx(112 / 232)
    assert ours["retention_layers"] == pytest.approx((8 * 68 + 6 * 34) / 16 / 232)
    assert [ours["retention_visual"], ours["retention_audio"]] == pytest.approx(
        [(8 * 48 + 6 * 24) / 16 / 192, (8 * 20 + 6 * 10) / 16 / 40]
    )


def test_unparsable_is_wrong_and_counted(small, samples, monkeypatch):
    says, real = iter(["red", "hm", "blue or red", "blue"] * 100), compare.write_answers
    monkeypatch.setattr(compare, "write_answers", lambda *args: [next(says) for _ in real(*args)])
    some = [replace(s, lettered=False) for s in samples[:4]]
    shape, runs = DataShape.of(*small, some), [MethodRun("full", "full", 100, (None,))]
    found = Answering(*small, some, runs, batch_size=8, answers="generate").answer_all()
    (row,) = Outcomes(found, some, runs, shape, n_boot=20).rows()
    picks = [r[0]["pick"] for r in found]
    assert row["unparsable"] == picks.count(None) == 2
    assert row["accuracy"] == np.mean([p == s.answer for p, s in zip(picks, some)])


def test_few_clips_conclude_nothing():
    "Below the number at which an exact test could ever be significant, whatever it says."
    row = lambda label, n: dict(
        label=label, equal_cost=True, clips=n, mcnemar_p_seats=0.0, diff_seats_low=1
    )
    for others in (1, 4, 50):
        rows = lambda n: [row("seats", n), *(row(f"m{i}", n) for i in range(others))]
        needed = table.clips_needed(rows(1))
        assert mcnemar([1] * needed, [0] * needed) * others < 0.05
        assert mcnemar([1] * (needed - 1), [0] * (needed - 1)) * others >= 0.05
        assert not table.significantly_better(rows(needed - 1))
        assert len(table.significantly_better(rows(needed))) == others
        assert table.clips_needed(rows(needed)) == 0


def test_progress_counts_every_run_of_a_unit(small, samples, capsys):
    "The bar moves before the first clip is done with all runs."
    model, processor = small
    asked = Answering(model, processor, samples, [run_of("full"), run_of("seats")], batch_size=1)
    asked.answer_all(progress=True)
    assert f"{2 * len(samples)}/{2 * len(samples)}" in capsys.readouterr().err


# ---------------------------------------------------------------- the stored results


@pytest.mark.parametrize("name", TESTBEDS)
def test_stored_comparison(name):
    "SEATS is never significantly below chance or stride, and nothing is above tuned SEATS."
    found = json.loads((ROOT / "data" / "results" / f"eval_{name}.json").read_text())
    assert any(r["label"] == "seats+tuned" for r in found["rows"])
    assert not table.significantly_better(found["rows"], "tuned")
    known = {r["method"] for r in found["rows"]}
    assert found["questions"] >= 1000 and known >= {"full", *METHODS} - {"visionzip-om-wide"}
    for r in found["rows"]:
        if r["ranked"] and r["method"] in ("random", "uniform"):
            assert r["diff_seats_low"] <= 0, (r["label"], r["trr"])


@pytest.mark.parametrize("name", TESTBEDS)
def test_what_is_stored_is_of_the_shipped_weights(name):
    shipped = hash_weights(load_testbed(TESTBEDS[name])[0])
    assert load_profile(name).attrs["weights_sha256"] == shipped
    for path in sorted((ROOT / "data").glob("*/*.json")):
        found = json.loads(path.read_text())
        hashed = found.get("weights_sha256") or found.get("evidence", {}).get("weights_sha256")
        assert found.get("model") != name or hashed in (None, shipped), path
