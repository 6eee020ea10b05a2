"""Encoded once is as good as every time, costs match, runs go on, outcomes say what happened."""

import json
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from conftest import ROOT
import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from seats_analysis import (
    METHODS,
    Schedule,
    adapter_for,
    compare_methods,
    comparison_table,
    encode,
    evaluate,
    load_profile,
    load_testbed,
    prefill_flops,
    prune,
    testbed_samples,
)
from seats_analysis.baselines.registry import ABLATIONS
from seats_analysis.evaluation import evaluate as module, prepared
from seats_analysis.evaluation.compare import (
    _LATE as LATE,
    TOLERANCE,
    clips_needed,
    match_cost,
    method_names,
    method_runs,
    outcome_rows,
    significantly_better,
)
from seats_analysis.evaluation.prepared import Answering, DataShape, MethodRun, PreparedBatch
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.timing import Timings
from seats_analysis.schedules.cost import text_dims
from seats_analysis.statistics.intervals import mcnemar
from seats_analysis.testbed.load import TESTBEDS, build_model, build_processor, fresh_samples

L = tiny.LAYERS
PLAN = tiny.schedule(drop_layers=(1, 3), keep_ratios=dict(visual=(0.8, 0.6), audio=(0.8, 0.6)))
NAMES = *tiny.PRUNERS, *ABLATIONS, "fastv-om+late"


def method_of(name):
    "Any method at visual 40 % and audio 50 %; SEATS with its schedule."
    if name in ("full", "seats"):
        return None if name == "full" else Seats(PLAN)
    cls = (METHODS | ABLATIONS)[name.removesuffix("+late")]
    own = dict(like=PLAN) if issubclass(cls, Seats) else {}
    method = cls.for_trr(L, 0.4, 0.5, 24, 40, **own)
    return method.leaving(PLAN) if name.endswith("+late") else method


def run_of(*names):
    return [MethodRun(name, name, trr=30, plans=(method_of(name),)) for name in names]


@pytest.fixture(scope="module")
def samples():
    "Two questions on each of four clips, one silent and one only heard; one without any."
    clips = (
        tiny.clip(0),
        tiny.clip(1, 3, sound=False),
        tiny.clip(2, 2.7, sight=False),
        tiny.clip(3, 3.0),
    )
    asked = "what colour is the circle ?", "where is the red object ?"
    return [
        tiny.ask(f"{k}-{q}", clip, text, lettered=k == 2, family=f"f{q}")
        for k, clip in enumerate(clips)
        for q, text in enumerate(asked)
    ] + [tiny.ask("4-0", None, family="f0")]


def answered(models, samples, runs=None, **options):
    "What `runs`, by default the full model and SEATS, answer to each question."
    runs = run_of("full", "seats") if runs is None else runs
    return Answering(*models, samples, runs, **options).answer_all()


# ---------------------------------------------------------------- encoded once


@pytest.fixture(scope="module")
def batches(model, processor, samples):
    "Four questions for which every method has noted what it asks, and the same from `encode`."
    some = [s for s in samples if s.clip in ("c0", "c3")]  # some methods need both modalities
    methods = [method_of(n) for n in ("full", *NAMES)]
    return PreparedBatch.of(model, processor, some, methods), encode(model, processor, some)


@pytest.mark.parametrize("name", ("full", *NAMES))
def test_answers_are_those_of_the_uncached_run(model, batches, name):
    "Every method, both families: DeepStack, merging, keys and windows of a method's own."
    batch, whole = batches
    method = method_of(name)
    with batch.prune(method) as (run, given):
        cached = score_choices(model, given)
    with prune(model, method) as plain:
        fresh = score_choices(model, whole)
    torch.testing.assert_close(cached.total, fresh.total, atol=2e-5, rtol=0, equal_nan=True)
    assert (run.tokens_per_layer == plain.tokens_per_layer).all()
    assert kept_lists(run) == kept_lists(plain)
    assert run.timings.calls["encoders"] == 0 < plain.timings.calls["encoders"]
    if method is not None and min(method.schedule.entering.values()) < 1:
        assert run.kept


def kept_lists(run):
    return {stage: [row.tolist() for row in rows] for stage, rows in run.kept.items()}


def test_towers_run_once_per_clip(model, processor, samples):
    "However many runs and questions."
    adapter = adapter_for(model)
    towers = dict(visual=adapter.visual(model), audio=adapter.audio_tower(model))
    calls = []
    with ExitStack() as stack:
        for name, tower in towers.items():
            note = partial(lambda name, *args: calls.append(name), name)
            stack.callback(tower.register_forward_hook(note).remove)
        answered((model, processor), samples, batch_size=2)
    assert sorted(calls) == ["audio"] * 3 + ["visual"] * 3


def test_frame_limit_holds_for_files(small):
    "Counts and answers are those of `encode` under the same limit."
    some = testbed_samples(split="test", limit=4)
    limit = dict(max_frames=4)
    batch = encode(*small, some, **limit)
    counted = batch.layout.counts()["visual"].double().mean()
    assert DataShape.of(*small, some, **limit).mean("visual") == counted
    assert DataShape.of(*small, some).mean("visual") > counted
    found = answered(small, some, run_of("full"), limits=limit)
    scores = score_choices(small[0], batch)
    wanted = [-scores.total[i, s.answer].item() for i, s in enumerate(some)]
    np.testing.assert_allclose([row[0]["nll"] for row in found], wanted, atol=2e-5)


@pytest.mark.parametrize("part", (0.0, 0.5, 1.0))
def test_downsampling_spends_what_was_planned(model, processor, part):
    "Tokens of the decoder, and FLOPs of the towers as torch counts them on the clip as encoded."

    def towers(encoded):
        with FlopCounterMode(display=False) as counter:
            prepared.encode_clip(model, encoded)
        return counter.get_total_flops()

    wide = tiny.ask("w", tiny.clip(0, size=(168, 112)))
    for sample in wide, tiny.ask("o", tiny.clip(3, 4.7)), tiny.ask("h", tiny.clip(2, sight=False)):
        shape = DataShape.of(model, processor, [sample])
        whole = encode(model, processor, [sample])
        full = prefill_flops(whole.shape[1:] * L, shape.dims)
        for left in (1.0, 0.7, 0.3, 0.05):
            plan = Schedule(L, entering=tiny.ratios(left, 1.0))
            method = METHODS["downsample"](plan, pixels=part)
            seen = encode(model, processor, method.shown(processor, [sample]))
            saved = (towers(seen) - towers(whole)) / full
            decoder = prefill_flops(seen.shape[1:] * L, shape.dims) / full
            assert shape.selection(method) == pytest.approx(saved, rel=1e-9)
            assert shape.cost(method) == pytest.approx(decoder + saved, rel=1e-9)
            text = (seen.layout.modality == 0).sum() == (whole.layout.modality == 0).sum()
            assert text and seen.layout.counts()["audio"] == whole.layout.counts()["audio"]


def test_downsampling_is_a_clip_with_fewer_frames(model, processor, samples):
    "Every second frame at half the rate, made by hand; `prune` alone would do nothing and refuses."
    method = METHODS["downsample"](Schedule(L, entering=tiny.ratios(0.5, 1.0)), pixels=0.0)
    some = [s for s in samples if s.clip in ("c0", "c2")] + samples[-1:]
    by_hand = [
        replace(s, video=replace(s.video, frames=s.video.frames[::2], fps=s.video.fps / 2))
        if s.clip == "c0"
        else s
        for s in some
    ]
    run = MethodRun("less", method.name, 30, (method,))
    found = answered((model, processor), some, [*run_of("full"), run], batch_size=3)
    given = evaluate(model, processor, some, method, batch_size=2)
    wanted = evaluate(model, processor, by_hand, batch_size=5)
    np.testing.assert_allclose(given.nll, wanted.nll, atol=2e-5)
    np.testing.assert_allclose([row[1]["nll"] for row in found], wanted.nll, atol=2e-5)
    flops = [
        prefill_flops(encode(model, processor, [s]).shape[1:] * L, text_dims(model.config))
        for s in by_hand
    ]
    assert [row[1]["flops_causal"] for row in found] == pytest.approx(flops)
    with prune(model, method), pytest.raises(ValueError, match="changes what is encoded"):
        model(**encode(model, processor, some[:1]).inputs)


def test_outcomes_are_those_of_evaluate(model, processor, samples):
    drawn = METHODS["random"].for_trr(L, 0.4, 0.5, 24, 40, seed=3)
    runs = [*run_of("full", "seats"), MethodRun("random", "random", 30, (drawn,))]
    some = samples[:1] + samples[3:6] + samples[-1:]
    found = answered((model, processor), some, runs, batch_size=3)
    for k, r in enumerate(runs):
        frame = evaluate(model, processor, some, r.plans[0], batch_size=len(some))
        for name in ("correct", "nll", "margin"):
            np.testing.assert_allclose([row[k][name] for row in found], frame[name], atol=2e-5)


# ---------------------------------------------------------------- the same cost


@pytest.fixture(scope="module")
def shape():
    "Counts of the testbed: 192 visual, 40 audio and the text tokens, 16 layers."
    model = build_model().eval()
    return DataShape.of(model, build_processor(), fresh_samples(8, seed=4, per_clip=2))


PLANS = {t: Schedule.load(f"testbed/{t}") for t in (35, 10)}


@pytest.fixture(scope="module")
def runs(shape):
    return method_runs(method_names("all,late,ablations"), PLANS, shape)


def test_costs_match_or_are_floors(shape, runs):
    assert len(runs) == 1 + len(PLANS) * (len(METHODS | ABLATIONS) + len(LATE))
    target = {e.trr: shape.cost(e.plans[0]) for e in runs if e.label == "seats"}
    for e in runs[1:]:
        away = e.mean([shape.cost(p) for p in e.plans]) / target[e.trr] - 1
        dear = "lowest setting" if away > 0 else "highest setting"
        assert e.setting == ("matched" if abs(away) <= TOLERANCE else dear), (e.label, e.trr)


def test_floors_are_marked_in_every_column(runs):
    "A rule that keeps as much at its lowest setting is at its floor, whatever chance does beside."
    at = {(e.label, e.trr): e for e in runs}
    # its first two layers see everything, which is more than SEATS spends at 10 %
    assert [at["fastv-om", trr].setting for trr in PLANS] == ["matched", "lowest setting"]
    for trr in PLANS:
        for name in ("visionzip", "dycoke"):  # they pay with audio that they have no rule for
            assert at[name, trr].floor == (("visual",) if trr == 10 else ())
        for name in ("seats", "random", "uniform", "divprune-om"):
            assert at[name, trr].floor == ()
    for e in runs:
        if e.setting == "lowest setting" and hasattr(e.plans[0], "prunes"):
            assert e.floor, (e.label, e.trr)


def test_late_removal_is_where_seats_has_it(runs, shape):
    for e in runs:
        if e.label.endswith("+late"):
            tokens = shape.plans(e.plans[0])
            for m in ("visual", "audio"):
                assert (tokens[m][:, PLANS[e.trr].late(m) :] == 0).all()
            assert e.plans[0].stages != (3,)
    assert {n.removesuffix("+late") for n in LATE} == {*tiny.PRUNERS} - {"seats", "vtw"}
    with pytest.raises(ValueError, match="unknown method 'vtw.late'"):
        method_names("vtw+late")


def test_the_nearest_of_a_tuned_chain_is_brought_to_the_same_cost(shape):
    chain = [Seats.for_trr(16, t, t, 192, 40, like=PLANS[10]) for t in (0.3, 0.2, 0.07)]
    whole = [METHODS["vtw"].for_trr(16, 0.9, 0.9)]  # has no knob
    anchors = [METHODS["visionzip-om"].for_trr(16, 0.03, 0.5, 192, 40)]  # one in each window
    tuned = dict(seats=chain, vtw=whole, visionzip=anchors)
    at = {(e.label, e.trr): e for e in method_runs(("seats",), PLANS, shape, tuned=tuned)}
    for trr, near in ((35, chain[0]), (10, chain[2])):
        found = at["seats+tuned", trr]
        cost = found.mean([shape.cost(p) for p in found.plans])
        assert found.setting == "matched"
        assert cost == pytest.approx(shape.cost(at["seats", trr].plans[0]), rel=TOLERANCE)
        assert found.plans[0].schedule.late_start == near.schedule.late_start
    assert at["vtw+tuned", 10].setting == "lowest setting"  # dearer
    assert at["seats+tuned", 10].floor == ()
    assert at["visionzip+tuned", 10].floor == ("visual",)


@contextmanager
def counted_selection():
    "FLOPs that torch counts while tokens are chosen."
    total = [0]
    real = Timings.time

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


@tiny.by_turns(NAMES)
def test_tokens_and_flops_are_as_planned(model, processor, samples, name):
    "For every method: what layers process, and the closed form against torch's counter."
    some = [s for s in samples if s.id == "3-0"]
    method = method_of(name)
    shape = DataShape.of(model, processor, some)
    with counted_selection() as counted, torch.no_grad(), prune(model, method) as run:
        model(**encode(model, processor, some).inputs)
    planned = sum(shape.plans(method).values())[0].tolist()
    assert planned == run.tokens_per_layer[0].tolist()
    full = prefill_flops(sum(shape.full.values())[0].tolist(), shape.dims, "causal")
    assert shape.selection(method) * full == pytest.approx(counted[0], rel=0.02)
    spent = prefill_flops(planned, shape.dims, "causal") + counted[0]
    assert shape.cost(method) == pytest.approx(spent / full, rel=0.02)


def test_matching_against_a_plain_search():
    "On random staircases: within the tolerance whatever the steps, and an honest floor."
    rng = np.random.default_rng(0)
    for i in range(50):
        edges = np.sort(rng.random(8))
        costs = np.sort(rng.random(9))

        def stairs(knob):
            return float(costs[np.searchsorted(edges, knob)])

        floor, top = stairs(1e-4), stairs(1.0)
        target = rng.random()
        if i % 5 == 0:  # floors a little too dear, and tops a little too cheap
            target = floor * rng.uniform(1 - TOLERANCE, 1 - TOLERANCE / 2)
        if i % 5 == 1:
            target = top * rng.uniform(1 + TOLERANCE / 2, 1 + TOLERANCE)
        found = MethodRun("x", "x", 10, **match_cost(stairs, lambda x: x, target, 1.0))
        assert 0 <= found.share <= 1
        setting = "matched"
        if floor > target * (1 + TOLERANCE):
            setting = "lowest setting"
        elif top < target * (1 - TOLERANCE):
            setting = "highest setting"
        else:
            assert abs(found.mean(found.plans) / target - 1) <= TOLERANCE
        assert found.setting == setting


@pytest.mark.parametrize("options", [dict(seconds=0.5), dict(grids=2), dict(grids=2, seconds=0.5)])
def test_windows_of_a_method_s_own(model, processor, samples, options):
    "Beside the same method with other windows: each finds what it asked for, and runs as planned."
    build = METHODS["visionzip-om"].for_trr
    other, method = (build(L, 0.4, 0.5, 24, 40, **o) for o in ({}, options))
    with torch.no_grad(), prune(model, method) as plain:
        model(**encode(model, processor, samples[:1]).inputs)
    for order in ([other, method], [method, other]):
        with PreparedBatch.of(model, processor, samples[:1], order).prune(method) as (run, given):
            model(**given.inputs)
        assert kept_lists(run)["stage1"] == kept_lists(plain)["stage1"]
    planned = sum(DataShape.of(model, processor, samples[:1]).plans(method).values())
    assert planned.tolist() == plain.tokens_per_layer.tolist()


# ---------------------------------------------------------------- interrupted, shared


@pytest.fixture(scope="module")
def small():
    return tiny.thinker(tiny.FAMILIES[0]), tiny.processor(tiny.FAMILIES[0])


def without_times(rows):
    return [{k: v for k, v in r.items() if not k.startswith("ms")} for r in rows]


def test_interrupted_runs_go_on(small, samples, tmp_path, monkeypatch):
    asked = []
    stop_after = [2]  # units
    real = Answering.answer_unit

    def noted(self, batch, number, first, runs):
        if len(runs) > 2:  # no warm-up
            if len(asked) == stop_after[0]:
                raise KeyboardInterrupt
            asked.append([q.sample.id for q in batch.questions])
        return real(self, batch, number, first, runs)

    def compared(name):
        given = {30: PLAN}, ("seats", "random"), tmp_path / name
        return compare_methods(*small, samples[:6], *given, batch_size=2)["rows"]

    monkeypatch.setattr(Answering, "answer_unit", noted)
    folder = tmp_path / "cut.json.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        compared("cut.json")
    assert not (tmp_path / "cut.json").exists()
    assert len(list(folder.glob("[0-9]*.json"))) == len(sum(asked, []))
    stop_after[0] = None
    again = compared("cut.json")
    assert sorted(sum(asked, [])) == sorted(s.id for s in samples[:6])  # each once
    assert without_times(again) == without_times(compared("whole.json"))
    assert not folder.exists()


def test_checkpoint_of_another_run_is_refused(small, samples, tmp_path):
    def begin(plan=PLAN, other="random", about={}, **kw):
        runs = [MethodRun("seats", "seats", 30, (Seats(plan),)), *run_of(other)]
        asked = Answering(*small, samples[:2], runs, batch_size=2, **kw)
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
    "One without questions leaves nothing."
    few, asked = (
        Answering(*small, some, run_of("full", "random"), batch_size=2)
        for some in (samples[:2], samples)
    )
    assert few.answer_all(tmp_path / "none", shard=(3, 4)) is None
    assert not (tmp_path / "none").exists()
    assert asked.answer_all(tmp_path / "j", shard=(1, 2)) is None
    assert 0 < len(list((tmp_path / "j").glob("[0-9]*.json"))) < len(samples)
    shared = asked.answer_all(tmp_path / "j", shard=(0, 2))
    assert [*map(without_times, shared)] == [*map(without_times, asked.answer_all())]


def test_units_keep_clips_together(samples):
    order = samples[::-1] + [replace(samples[0], id="late")]
    units = Answering(None, None, order, (), batch_size=3).units()
    assert sorted(sum(units, [])) == list(range(len(order)))
    assert max(map(len, units)) <= 3
    clips = [{order[i].clip for i in unit} for unit in units]
    assert sum(map(len, clips)) == len(set().union(*clips))


# ---------------------------------------------------------------- what became of it


def test_columns_say_what_happened(shape):
    "Four questions, one of them a control: SEATS is right where the other one is wrong."
    plan = Schedule(
        16,
        drop_layers=(8,),
        late_start=14,
        entering=tiny.ratios(0.25, 0.5),
        keep_ratios=tiny.ratios((0.5,), (0.5,)),
    )
    chance = METHODS["random"].for_trr(16, 0.5, 0.4, 192, 40)
    choosing = shape.selection(plan)
    runs = [
        MethodRun("full", "full", 100, (None,), setting="full"),
        MethodRun("seats", "seats", 25, (Seats(plan),), knob=(1.0,)),
        MethodRun("random", "random", 25, (chance,), knob=(1.0,)),
    ]
    flops = 100.0, 30.0, 30.0 + 100 * choosing
    right = dict(where0="110", where1="110", what="101", control="010")  # full, SEATS, random
    asked = [tiny.ask(n, tiny.clip(i), family=n.rstrip("01")) for i, n in enumerate(right)]
    cell = dict(pick=0, ms=[1.0, 2.0, 3.0])
    answers = [
        [cell | dict(correct=c == "1", flops_causal=f) for c, f in zip(row, flops)]
        for row in right.values()
    ]
    rows = outcome_rows(answers, asked, runs, shape)
    # choosing costs SEATS something and chance nothing, so that chance gets more of the decoder;
    # 4 windows of 48 and of 10 tokens: 48 + 20 enter, half of them stay from layer 8 to 14;
    # 96 + 16 are drawn once
    wanted = dict(
        n=(3, 3, 3),
        clips=(3, 3, 3),
        accuracy=(1, 2 / 3, 1 / 3),
        diff_full=(0, -1 / 3, -2 / 3),
        diff_seats=(None, 0, -1 / 3),
        ms=(6, 6, 6),
        retention_entry=(1, 68 / 232, 112 / 232),
        retention_layers=(1, (8 * 68 + 6 * 34) / 16 / 232, 112 / 232),
        retention_visual=(1, (8 * 48 + 6 * 24) / 16 / 192, 96 / 192),
        retention_audio=(1, (8 * 20 + 6 * 10) / 16 / 40, 16 / 40),
        flops_fraction_causal_without_selection=(1, 0.3, 0.3 + choosing),
        flops_fraction_causal_with_selection=(1, 0.3 + choosing, 0.3 + choosing),
    )
    for name, values in wanted.items():
        assert [r[name] for r in rows] == pytest.approx(list(values)), name
    families = rows[2]["families"]
    assert [families[f]["accuracy"] for f in ("where", "what")] == [0, 1]
    assert [rows[1]["families"][f]["accuracy"] for f in ("where", "what")] == [1, 0]
    assert families["control"]["full_accuracy"] == 0
    assert rows[2]["ranked"]


def test_easy_is_what_the_strongest_downsampling_answers(shape):
    "Two of three questions; controls count in neither part."
    less = METHODS["downsample"]
    runs = [MethodRun("full", "full", 100, plans=(None,), setting="full")]
    for trr in (35, 10):
        runs.append(MethodRun("seats", "seats", trr, (Seats(PLANS[trr]),), knob=(1.0,)))
        plan = Schedule(16, entering=tiny.ratios(trr / 100, 1.0))
        runs.append(MethodRun("downsample", "downsample", trr, (less(plan),), knob=(1.0,)))
    right = dict(a0="11101", a1="10011", a2="11010", control="00001")
    asked = [tiny.ask(n, tiny.clip(i), family=n.rstrip("012")) for i, n in enumerate(right)]
    cell = dict(pick=0, ms=[1.0, 2.0, 3.0], flops_causal=1.0)
    answers = [[cell | dict(correct=c == "1") for c in row] for row in right.values()]
    rows = outcome_rows(answers, asked, runs, shape)
    got = [[r[part][k] for part in ("easy", "hard") for k in ("n", "accuracy")] for r in rows]
    assert got == [[2, 1, 1, 1], [2, 0.5, 1, 1], [2, 0.5, 1, 0], [2, 0.5, 1, 1], [2, 1, 1, 0]]
    table = comparison_table(rows)
    assert sorted(table.easy) == [50, 50, 50, 100, 100] and sorted(table.hard)[:2] == [0, 0]
    apart = outcome_rows([row[:2] for row in answers], asked, runs[:2], shape)
    assert "easy" not in apart[0] and "easy" not in comparison_table(apart)


def test_unparsable_is_wrong_and_counted(small, samples, monkeypatch):
    says = iter(["red", "hm", "blue or red", "blue"] * 2)  # once to warm up
    real = module.write_answers
    monkeypatch.setattr(module, "write_answers", lambda *args: [next(says) for _ in real(*args)])
    some = [replace(s, lettered=False) for s in samples[:4]]
    runs = run_of("full")
    found = answered(small, some, runs, batch_size=8, answers="generate")
    (row,) = outcome_rows(found, some, runs, DataShape.of(*small, some))
    picks = [r[0]["pick"] for r in found]
    assert row["unparsable"] == picks.count(None) == 2
    assert row["accuracy"] == np.mean([p == s.answer for p, s in zip(picks, some)])


@pytest.mark.parametrize("others", (1, 4, 50))
def test_few_clips_conclude_nothing(others):
    "Below the number at which an exact test could ever be significant, whatever it says."
    names = ["seats", *map(str, range(others))]
    about = dict(equal_cost=True, mcnemar_p_seats=0.0, diff_seats_low=1)
    rows = lambda n: [dict(about, label=name, clips=n) for name in names]
    needed = clips_needed(rows(1))
    assert mcnemar([1] * needed, [0.5] * needed) * others < 0.05  # also of shares
    assert mcnemar([1] * (needed - 1), [0] * (needed - 1)) * others >= 0.05
    assert not significantly_better(rows(needed - 1))
    assert len(significantly_better(rows(needed))) == others
    assert clips_needed(rows(needed)) == 0


# ---------------------------------------------------------------- the stored results


@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
def test_stored_comparison(name):
    "SEATS is never below chance or stride, and nothing significantly above its tuned schedule."
    found = json.loads((ROOT / "data" / "results" / f"eval_{name}.json").read_text())
    assert any(r["label"] == "seats+tuned" for r in found["rows"])
    assert not significantly_better(found["rows"], "tuned")  # README and results/01 say so
    known = {r["method"] for r in found["rows"]}
    assert found["clips"] >= 300 and known >= {"full", *tiny.PRUNERS}
    for r in found["rows"]:
        if r["ranked"] and r["method"] in ("random", "uniform"):
            assert r["diff_seats_low"] <= 0, (r["label"], r["trr"])


@pytest.mark.parametrize("name", TESTBEDS)
def test_what_is_stored_is_of_the_shipped_weights(name):
    model, _ = load_testbed(TESTBEDS[name])
    shipped = adapter_for(model).hash_weights(model)
    assert load_profile(name).attrs["weights_sha256"] == shipped
    for path in sorted((ROOT / "data").glob("*/*.json")):
        found = json.loads(path.read_text())
        hashed = found.get("weights_sha256") or found.get("evidence", {}).get("weights_sha256")
        assert found.get("model") != name or hashed in (None, shipped), path
