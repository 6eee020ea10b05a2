"""Every method against plain loops of its paper's pseudo-code, and inside a model.

There: exact counts, any batch, both families, bit-identical at 100 %, nothing left on exit.
"""

import random

import numpy as np
import plain_rivals as plain
import pytest
import tiny
import torch
import xarray as xr

from seats_analysis import METHODS, Schedule, adapter_for, encode, prune
from seats_analysis.baselines.attention import VTW
from seats_analysis.baselines.base import Uniform
from seats_analysis.baselines.merging import (
    DivPruneOm,
    DyCoke,
    OmniZip,
    audio_anchors,
    select_visionzip,
    visionzip_counts,
)
from seats_analysis.baselines.omnipack import OmniPack
from seats_analysis.baselines.registry import ABLATIONS, method_at
from seats_analysis.inputs.layout import TokenLayout, chunk_ids
from seats_analysis.models.encode import Prompt, layout_of
from seats_analysis.pruning.base import PruneStep, Stage1Inputs, Tokens, WindowBudget
from seats_analysis.pruning.seats import Seats

EVERY = tiny.PRUNERS | ABLATIONS
L = tiny.LAYERS
CODE = dict(visual=1, audio=2)
each = pytest.mark.parametrize("name", EVERY)
in_one_family = tiny.by_turns(EVERY)
in_both_families = pytest.mark.parametrize(
    "family, name",
    [(f, n) for f in tiny.FAMILIES for n in tiny.PRUNERS]
    + [(tiny.FAMILIES[0], n) for n in ABLATIONS],
    indirect=["family"],
    scope="session",
)
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=range(15))
def r(request):
    "A source of cases; torch's own is seeded too."
    torch.manual_seed(request.param)
    return random.Random(request.param)


def positions(keep):
    return keep.nonzero()[:, 0].tolist()


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), atol=tol, rtol=0)


def budgets(method, **sizes):
    "Of one sample, from the sizes of its windows."
    return tuple(WindowBudget(m, 0, *method.budget(m, tuple(n))) for m, n in sizes.items())


def mask_of(chosen):
    return chosen[0] if isinstance(chosen, tuple) else chosen


# ---------------------------------------------------------------- against the pseudo-code


def test_divprune(r):
    sizes = r.randint(1, 25), r.randint(1, 25)
    method = DivPruneOm.for_trr(L, r.uniform(0.05, 1), r.uniform(0.05, 1), *sizes)
    x = torch.randn(sum(sizes), 6) + r.choice([0, 1])
    parts = budgets(method, visual=sizes[:1], audio=sizes[1:])
    keep = method.select(Stage1Inputs(x, None, parts))
    for part, mine, features in zip(parts, keep.split(sizes), x.split(sizes)):
        want, slack = plain.divprune(features, part.keep[0])
        assert int(mine.sum()) == part.keep[0]
        assert positions(mine) == want or slack <= 1e-6


def test_visionzip(r):
    sizes = [r.randint(1, 29) for _ in range(r.randint(1, 4))]
    counts = [visionzip_counts(n, r.uniform(0.02, 0.95), r.choice([0, 0.05, 0.2])) for n in sizes]
    n = sum(sizes)
    x, attention, keys = torch.randn(n, 5), torch.rand(n), torch.randn(n, 4)
    keep, merged = select_visionzip(x, attention, keys, sizes, counts)
    want, out = plain.visionzip(x, attention, keys, sizes, counts)
    assert positions(keep) == want
    close(merged[keep], out[keep])


def test_dycoke(r):
    frames, P, ratio = r.randint(1, 9), r.randint(1, 13), r.uniform(0.25, 1)
    method = DyCoke(Schedule(L, entering=dict(visual=ratio, audio=1.0)))
    x = torch.randn(frames, P, 6)
    parts = budgets(method, visual=(P,) * frames)
    keep = method.pick(Stage1Inputs(x.flatten(0, 1), None, parts))
    assert positions(keep) == plain.dycoke(x, max((4 * ratio - 1) / 3, 0.0))
    assert int(keep.sum()) == sum(parts[0].keep)


def test_omnizip_audio(r):
    "Without anchors nothing changes; without video, sounds go by likeness to their anchor."
    n = r.randint(1, 29)
    contextual = r.randint(0, min(n, 4))
    counts = r.randint(0, n - contextual), contextual, r.randint(1, 4)
    given = torch.randn(n, 6), torch.randn(r.choice([0, 5, 20]), 6), torch.rand(n), *counts
    keep, merged = audio_anchors(*given)
    want, out = plain.omnizip_audio(*given)
    assert positions(keep) == want
    close(merged, out)


def test_omnizip(r):
    "The whole method on one sample."
    frames, P, windows, w = r.randint(1, 6), r.randint(4, 11), r.randint(1, 3), r.randint(5, 13)
    n, N = frames * P, windows * w
    method = OmniZip.for_trr(L, r.uniform(0.1, 0.9), r.uniform(0.1, 0.9), n, N)
    visual, audio = parts = budgets(method, visual=(P,) * frames, audio=(w,) * windows)
    x, attention = torch.randn(n + N, 6), torch.rand(n + N)
    keep, merged = method.select(Stage1Inputs(x, attention, parts))
    total = sum(audio.keep)
    anchors = min(round(0.05 * N), total)
    heard, out = plain.omnizip_audio(x[n:], x[:n], attention[n:], total - anchors, anchors, 3)
    groups = [min(2, frames - f) * P for f in range(0, frames, 2)]
    retained = [sum(i * w <= j < (i + 1) * w for j in heard) / w for i in range(windows)]
    retained = (retained + [None] * len(groups))[: len(groups)]
    shares = plain.omnizip_rates(retained, groups, sum(visual.keep), 0.35, 0.75)
    seen = plain.omnizip_visual(x[:n].view(frames, P, 6), shares)
    assert positions(keep[n:]) == heard
    assert positions(keep[:n]) == seen and len(seen) == sum(visual.keep)
    close(merged[n:][keep[n:]], out[keep[n:]])


def test_omnipack_before_the_decoder(r):
    "Frames that repeat one another and noise, and sounds."
    for kind, P in (("visual", r.randint(2, 7)), ("audio", 1)):
        frames = r.randint(2, 6) * (1 if kind == "visual" else 4)
        n = frames * P
        x = torch.randn(P, 6).repeat(frames, 1) + r.choice([0.1, 2]) * torch.randn(n, 6)
        attention, ratio = torch.rand(n), r.uniform(0.05, 0.9)
        at = torch.arange(n)
        places = torch.stack([at // P * 7 + 3, at % P + 5, at % P // 2])
        method = OmniPack(Schedule(L, entering=dict.fromkeys(CODE, ratio)))
        (part,) = budgets(method, **{kind: (P,) * frames})
        keep, merged = method.pick(Stage1Inputs(x, attention, (part,), places=places))
        sizes = P if kind == "visual" else None
        want, out = plain.omnipack_enter(x, attention, places.T, sum(part.keep), sizes, ratio)
        assert positions(keep) == want
        close(merged[keep], out[keep])


def test_omnipack_between_layers(r):
    kinds, tokens, _ = sequence(r)
    hidden = torch.randn(1, len(kinds), 6)
    aim = {m: r.randint(1, kinds.count(k)) for m, k in CODE.items()}
    keep, merged = drop(OmniPack(Schedule(L, **STAGES[2])), tokens, hidden, aim)
    want, out = plain.omnipack_drop(hidden[0], kinds, {CODE[m]: n for m, n in aim.items()})
    assert positions(keep[0]) == want
    close(merged[0][keep[0]], out[keep[0]])


def sequence(r, rows=1):
    "Kinds of the tokens of a made-up prompt, the tokens, and scores."
    kinds = [0, 0, *r.choices([1, 1, 2], k=r.randint(4, 19)), 1, 2, 0]
    modality = torch.tensor([kinds] * rows, dtype=torch.int8)
    column = torch.arange(len(kinds)).expand(modality.shape)
    tokens = Tokens(
        column=column,
        modality=modality,
        window=column * 0,
        chunk=column * 0,
        prompt=len(kinds),
        numbers=tuple(range(rows)),
        padded=False,
    )
    return kinds, tokens, torch.randint(0, 8, modality.shape).float()


def drop(method, tokens, scores, *n_keep):
    rows = len(n_keep)
    step = PruneStep("drop2", 2, 2, n_keep, (0,) * rows, (True,) * rows)
    return method.drop(tokens, scores, step, 1)


@pytest.mark.parametrize("name", ("fastv-om", "pyramiddrop", "seats-flat-budgets"))
def test_best_of_each_modality(r, name):
    kinds, tokens, scores = sequence(r)
    n = {m: kinds.count(k) for m, k in CODE.items()}
    aim = {m: r.randint(1, k) for m, k in n.items()}
    method = EVERY[name].for_trr(L, 0.9, 0.9, *n.values())
    wanted = plain.top_by_modality(scores[0].tolist(), kinds, {CODE[m]: k for m, k in aim.items()})
    assert positions(drop(method, tokens, scores, aim)[0]) == wanted


def test_uniform(r):
    "Every so-manieth of what is left of each modality, and the last."
    kinds, tokens, _ = sequence(r)
    aim = {m: r.randint(1, kinds.count(k)) for m, k in CODE.items()}
    method = Uniform(Schedule(L, **STAGES[2]))
    keep = set(positions(drop(method, tokens, None, aim)[0]))
    assert {i for i, k in enumerate(kinds) if k == 0} <= keep
    for m, k in CODE.items():
        mine = [i for i, kind in enumerate(kinds) if kind == k]
        ordinals = [o for o, i in enumerate(mine) if i in keep]
        step = len(mine) // aim[m]  # or one more
        assert set(np.diff([-1, *ordinals]).tolist()) <= {step, step + 1}
        assert len(ordinals) == aim[m] and ordinals[-1] == len(mine) - 1


@pytest.mark.parametrize(
    "name", [n for n, m in tiny.PRUNERS.items() if getattr(m, "prunes", None) == ("visual",)]
)
def test_audio_without_a_rule_goes_by_chance(name):
    "Not by anything that the method looks at; otherwise for every sample, alike for the same seed."
    method = METHODS[name].for_trr(L, 0.7, 0.7, 12, 30)
    other = type(method)(method.schedule, seed=1)
    kinds, tokens, scores = sequence(random.Random(3), rows=2)
    aim = dict(visual=2, audio=kinds.count(2) // 2)
    parts = [WindowBudget("visual", i, (12,), (6,)) for i in range(2)]
    parts += [WindowBudget("audio", i, (30,), (15,)) for i in range(2)]

    def draw(method):  # looks at other numbers each time
        if name == "fastv":
            keep = drop(method, tokens, torch.rand_like(scores), aim, aim)
            return keep[tokens.is_("audio")].view(2, -1)
        keys = dict(visual=torch.randn(24, 3), audio=torch.randn(60, 3))
        look = Stage1Inputs(torch.randn(84, 4), torch.rand(84), tuple(parts), keys)
        return mask_of(method.select(look))[24:].view(2, 30)

    first = draw(method)
    assert torch.equal(first, draw(method))
    assert not torch.equal(first, draw(other))
    assert not torch.equal(first[0], first[1])
    assert first[0].sum() == first[1].sum()


def test_vtw_takes_the_first_layer_under_the_threshold(r):
    kl = torch.rand(5, 2, 7).numpy() * np.linspace(1, 0, 7) ** 3
    names = dict(removed=["both", "visual"], layer=range(7))
    profile = xr.Dataset(dict(kl=(("sample", "removed", "layer"), kl)), names)
    threshold = r.uniform(0.001, 0.3)
    for i, removed in enumerate(names["removed"]):
        want = (kl[:, i].mean(0) < threshold).tolist().index(True)
        plan = VTW.from_profile(profile, 6, removed, threshold).schedule
        assert plan.late("visual") == want
        assert plan.late("audio") == (want if removed == "both" else 6)
    never = VTW.from_profile(profile + 1, 6, threshold=threshold).schedule
    assert never.late("visual") == never.late("audio") == 6


# ---------------------------------------------------------------- for a target of their own


@each
@pytest.mark.parametrize("layers", (3, 6, 28))
def test_no_target_fails(name, layers):
    "What is planned is what the schedule says: more for a higher target, all at 100 %."
    before = 0
    for t in (1e-9, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        schedule = EVERY[name].for_trr(layers, t, t, 128.0, 80.0).schedule
        trr = schedule.token_trr(128, 80)
        assert schedule.num_layers == layers and before - 0.02 <= trr <= 1
        before = trr
    assert schedule.keeps_all
    for pair in ((1.0, 0.05), (0.05, 1.0), (0.3, 0.6)):
        for n in ((128, 80), (9216, 1500), (100, 0), (0, 100), (1, 1)):
            EVERY[name].for_trr(layers, *pair, *n)


@pytest.mark.parametrize("name", [n for n, m in EVERY.items() if issubclass(m, Seats)])
def test_ablations_change_one_thing(name):
    "Scale, windows and temperature are the plan's; its ratios, too, where its stages are kept."
    own = dict(temperature=0.25, windows=dict(visual_grids=4, seconds=2.0))
    plan = Schedule.solve(20, (10, 12, 14), 18, 0.2, 0.3, scale=1.3, **own)
    got = EVERY[name].for_trr(20, 0.2, 0.3, 128, 80, like=plan).schedule
    same = ["temperature", "windows"]
    query = {"seats-last-query": "last", "seats-text-query": "text"}
    assert got.query == query.get(name, plan.query)
    if 1 in EVERY[name].stages and name != "seats-no-stage2":
        assert got.entering == pytest.approx(dict(visual=0.26, audio=0.39))
    if name in ("seats", "seats-flat-budgets", "seats-attention-only", "seats-diversity-only"):
        same += ["drop_layers", "late_start", "shallow_end"]
        for m in CODE:
            assert got.keep_ratios[m] == pytest.approx(plan.keep_ratios[m])
    assert [getattr(got, field) for field in same] == [getattr(plan, field) for field in same]


def test_the_scale_asked_for_holds_at_other_targets():
    "A plan at the limit still says what it wanted; a ratio set by hand counts more than that."

    def solved(requested, **own):
        evidence = dict(scale_requested=requested)
        return Schedule.solve(20, (10, 12), 18, audio=0.3, evidence=evidence, **own)

    tight = solved(1.6, visual=0.7, scale=1.6)
    assert tight.scale["visual"] < 1.43
    got = Seats.for_trr(20, 0.35, 0.3, like=tight).schedule
    assert got.entering["visual"] == pytest.approx(1.6 * 0.35)
    stated = solved(1.4, visual=0.3, entering=dict(visual=0.36, audio=0.39))
    wanted = dict(visual=0.2 * 1.2, audio=0.2 * 1.3)
    assert stated.nearest(0.2, 0.2).entering == pytest.approx(wanted)


@each
def test_a_modality_that_no_layer_sees(name):
    "A plan may withdraw one modality at once: its target is 0, and nothing divides by it."
    plan = Schedule(L, late_start=dict(visual=0, audio=4), entering=dict(visual=1.0, audio=0.5))
    own = dict(like=plan) if issubclass(EVERY[name], Seats) else {}
    got = EVERY[name].for_trr(L, plan.trr["visual"], plan.trr["audio"], 24, 40, **own).schedule
    if own:
        assert got.late("visual") == (0 if 3 in EVERY[name].stages else L)
    if name == "seats":
        assert got.levels("audio") == pytest.approx(plan.levels("audio")) and got.trr["visual"] == 0


@each
def test_every_sample_has_a_number_of_its_own(name):
    "By which chance goes: of both modalities, counted on over the batches of a `prune` block."
    kind = torch.tensor([[0] + [1] * 20 + [2] * 20 + [0]] * 3, dtype=torch.int8)
    layout = TokenLayout(kind, torch.zeros_like(kind, dtype=torch.int32), chunk_ids(kind))
    got = [(b.modality, b.number) for b in usual(name).window_budgets(layout, 5)]
    assert got == [(m, n) for m in CODE for n in (5, 6, 7)]


def test_every_entry_says_what_it_is():
    names = (
        "seats random uniform fastv fastv-om visionzip visionzip-om divprune "
        "divprune-om dycoke omnizip omnipack vtw pyramiddrop downsample"
    )
    assert list(METHODS) == names.split()
    for name, cls in EVERY.items():
        assert cls.name == name
        assert name in ("random", "uniform") or cls.paper.startswith("arXiv ")


def test_the_knob_for_audio():
    got = method_at("uniform", tiny.schedule(), (24, 40), knob=1.2, audio=0.5).schedule.trr
    plan = tiny.schedule().trr
    assert got == pytest.approx(dict(visual=1.2 * plan["visual"], audio=0.6 * plan["audio"]))


# ---------------------------------------------------------------- inside a model


@pytest.fixture(scope="module")
def samples():
    return [
        tiny.ask("both", tiny.clip(0)),
        tiny.ask("silent", tiny.clip(1, 3, sound=False), "where is the red object ?"),
        tiny.ask("heard", tiny.clip(2, 2.7, sight=False)),
        tiny.ask("odd", tiny.clip(3, 4.7)),
    ]


@pytest.fixture(scope="module")
def batch(model, processor, samples):
    return encode(model, processor, samples)


def usual(name, t=(0.55, 0.6)):
    return EVERY[name].for_trr(L, *t, 24, 40)


def last(model, encoded):
    return model(**encoded.inputs).logits[:, -1]


def planned_tokens(method, layout):
    "(B, L) tokens that every layer processes; an upper bound where the content decides."
    widths = np.repeat(layout.valid.sum(1).numpy()[:, None], L, 1)
    for step in method.plan(layout, method.window_budgets(layout, 0)):
        widths[:, step.layer :] = np.asarray(step.widths)[:, None]
    return widths


def check_batch(model, processor, method, samples, alone, **images):
    "Counts are as planned, text stays, and each sample of `alone` is as it is by itself."
    batch = encode(model, processor, samples)
    with prune(model, method, **images) as run:
        together = last(model, batch)
    kept = images.get("images", "keep")
    layout = layout_of(model, batch.inputs, kept, method.grids, method.seconds)
    bound = planned_tokens(method, layout)
    assert (run.tokens_per_layer <= bound).all()
    if not isinstance(method, Seats):
        assert (run.tokens_per_layer == bound).all()
    for i, kinds in enumerate(layout.modality):
        text = {p for p, k in enumerate(kinds[kinds != -1].tolist()) if k == 0}
        assert all(text <= set(rows[i].tolist()) for rows in run.kept.values())
    for i in alone:
        with prune(model, method, **images) as single:
            single.samples = i  # chance depends on the ordinal of a sample
            one = last(model, encode(model, processor, samples[i : i + 1]))
            close(together[i : i + 1], one, 2e-5)
        assert run.tokens_per_layer[i].tolist() == single.tokens_per_layer[0].tolist()
        for stage, (row,) in single.kept.items():
            assert run.kept[stage][i].tolist() == row.tolist()
    return run.tokens_per_layer, batch


@in_both_families
def test_batch_equals_singles_and_plan(name, model, processor, samples):
    tokens, batch = check_batch(model, processor, usual(name), samples, range(4))
    assert tokens.sum() < batch.layout.valid.sum() * L


@tiny.by_turns(tiny.PRUNERS)
def test_any_media(name, model, processor):
    "Images as visual tokens, clips of different size, one modality or none, in one batch."
    images = tiny.image(2), tiny.clip(14, 2), "or", tiny.image(3, (28, 56)), "what ?"
    silent = tiny.clip(9, 2, sound=False, size=(84, 56))
    clips = tiny.clip(8, 2), silent, "where ?", tiny.clip(10, 1, sight=False), "when ?"
    mixed = [
        Prompt("mixed", images),
        tiny.ask("heard", tiny.clip(2, 2.5, sight=False)),
        Prompt("clips", clips),
        tiny.ask("text", None),
    ]
    method = usual(name, (0.5, 0.5))
    tokens, batch = check_batch(model, processor, method, mixed, (0, 2), images="prune")
    assert (tokens[:3, -1] < batch.layout.valid.sum(1).numpy()[:3]).all()


@in_one_family
def test_a_plan_that_goes_by_distance(name, model, batch):
    "Stage I without attention is the plan's; who goes by attention gets it all the same."
    kept = []
    for weighted in (True, False):
        with prune(model, method_at(name, tiny.schedule(weighted=weighted), (24, 40))) as run:
            assert last(model, batch).isfinite().all()
        kept.append([row.tolist() for row in run.kept.get("stage1", ())])
    same = "seats-no-stage1", "seats-attention-only", "seats-diversity-only"
    assert (kept[0] != kept[1]) == (issubclass(EVERY[name], Seats) and name not in same)


OPTIONS = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)


@in_one_family
def test_generate_and_undo(name, model, batch):
    "Keeping all changes no bit, and nothing is left of a block that was left by an error."
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before = hooks()
    full = model(**batch.inputs).logits
    without = model.generate(**batch.inputs, **OPTIONS)
    for kv in ("evict", "retain"):
        with prune(model, usual(name), kv=kv) as run:
            out = model.generate(**batch.inputs, **OPTIONS)
        assert out.shape == without.shape and run.kept and run.timings.ms["prefill"] > 0
    with prune(model, EVERY[name].for_trr(L, 1.0, 1.0, 24, 40)) as run:
        assert torch.equal(model(**batch.inputs).logits, full)
    assert run.kept == {}
    with pytest.raises(KeyboardInterrupt), prune(model, usual(name)):
        raise KeyboardInterrupt
    assert hooks() == before
    assert torch.equal(model.generate(**batch.inputs, **OPTIONS), without)


@in_one_family
def test_copies_of_a_sample_are_treated_alike(name, model, processor, samples):
    inputs = encode(model, processor, samples[:1]).inputs
    with prune(model, usual(name)) as run:
        beams = model.generate(**inputs, num_beams=3, num_return_sequences=3, **OPTIONS)
    assert beams.shape == (3, inputs["input_ids"].shape[1] + 3)
    assert all(torch.equal(row, rows[0]) for rows in run.kept.values() for row in rows)


@in_one_family
def test_nothing_is_chosen_from_nan(name, model, batch):
    "A method that looks at what is broken refuses."
    method = usual(name)
    places = []
    if min(method.schedule.entering.values()) < 1:
        places.append(adapter_for(model).visual(model).merger)
    if (method.uses_scores or method.uses_hidden) and method.schedule.drop_layers:
        places.append(adapter_for(model).layers(model)[0])

    def spoil(module, args, out):
        if isinstance(out, tuple):
            return spoil(module, args, out[0]), *out[1:]
        return out.index_fill(-1, torch.tensor([0]), torch.nan)

    for place in places:
        with place.register_forward_hook(spoil), prune(model, method) as run:
            with pytest.raises(ValueError, match="NaN or infinity"):
                model(**batch.inputs)
        assert run.kept == {}


# ---------------------------------------------------------------- what is refused


STAGES = {
    1: dict(entering=dict(visual=0.4, audio=0.5)),
    2: dict(drop_layers=(2,), keep_ratios=dict(visual=(0.4,), audio=(0.5,))),
    3: dict(late_start=4),
}


@pytest.mark.parametrize("stage", STAGES)
@in_one_family
def test_a_stage_without_a_rule_is_refused(name, stage, model, processor, samples):
    "What it builds runs and loses no text; a stage without a rule is refused before it runs."
    plan = Schedule(L, **STAGES[stage])
    if stage in EVERY[name].stages:
        method = EVERY[name](plan)
        assert method.name == name
        tokens, batch = check_batch(model, processor, method, samples[:1], ())
        assert tokens[0, -1] < batch.layout.valid.sum()
    else:
        with pytest.raises(ValueError, match=f"stage {stage}.*for_trr"):
            EVERY[name](plan)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="known: full, seats, random.*seats-no-stage2"):
        method_at("fastv2", Schedule(L), (40, 20))
    for name in ("random", "visionzip-om"):  # whose own checks come on top
        narrow = type("Narrow", (EVERY[name],), dict(stages=(1,)))
        with pytest.raises(ValueError, match="stage 2"):
            narrow(Schedule(L, **STAGES[2]))
