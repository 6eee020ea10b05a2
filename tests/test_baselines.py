"""Every method against plain loops of its paper's pseudo-code, and inside a model.

There: exact counts, any batch, both families, bit-identical at 100 %, nothing left on exit.
"""

import numpy as np, plain_rivals, pytest, tiny, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from seats_analysis.inputs.layout import TokenLayout, chunk_ids
from seats_analysis.models.encode import encode, layout_of
from seats_analysis.baselines.registry import ABLATIONS, METHODS, method_at
from seats_analysis.pruning.seats import Seats
from seats_analysis.baselines.merging import (
    DyCoke,
    OmniZip,
    audio_anchors,
    density_peaks,
    select_visionzip,
    visionzip_counts,
    visual_shares,
)
from seats_analysis.pruning.base import PruneStep, Stage1Inputs, WindowBudget, Tokens
from seats_analysis.pruning.session import prune
from seats_analysis.baselines.attention import VTW, PyramidDrop
from seats_analysis.baselines.diversity import DivPruneOm
from seats_analysis.baselines.simple import Uniform
from seats_analysis.schedules.schedule import Schedule

EVERY = METHODS | ABLATIONS
CASES = range(15)
SAME_STAGE_1 = "seats-no-stage1", "seats-attention-only", "seats-diversity-only"
L = tiny.LAYERS
each = pytest.mark.parametrize("name", EVERY)


def by_family(pairs):
    return pytest.mark.parametrize("family, name", pairs, indirect=["family"], scope="module")


in_both_families = by_family(
    [(f, n) for f in tiny.FAMILIES for n in METHODS] + [(tiny.FAMILIES[0], n) for n in ABLATIONS]
)
in_one_family = by_family(sorted((tiny.FAMILIES[i % 2], n) for i, n in enumerate(EVERY)))
seeded = pytest.mark.parametrize("seed", CASES)


pytestmark = pytest.mark.usefixtures("no_grad")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def planned_tokens(method, layout):
    "(B, L) tokens that every layer processes; an upper bound where the content decides."
    widths = np.repeat(layout.valid.sum(1).numpy()[:, None], method.schedule.num_layers, 1)
    for step in method.plan(layout, method.window_budgets(layout, 0)):
        widths[:, step.layer :] = np.asarray(step.widths)[:, None]
    return widths


def positions(keep):
    return keep.nonzero()[:, 0].tolist()


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=0)


# ---------------------------------------------------------------- against the pseudo-code


@seeded
def test_divprune(seed):
    g, r = generator(seed), np.random.default_rng(seed)
    sizes = r.integers(1, 26, 2).tolist()
    method = DivPruneOm.for_trr(L, *r.uniform(0.05, 1, 2), *sizes)
    x = torch.randn(sum(sizes), 6, generator=g) + r.choice([0, 1])
    parts = tuple(
        WindowBudget(m, 0, *method.budget(m, (n,))) for m, n in zip(("visual", "audio"), sizes)
    )
    keep, start = method.select(Stage1Inputs(x, None, parts)), 0
    for part, n in zip(parts, sizes):
        want, slack = plain_rivals.divprune(x[start : start + n], part.keep[0])
        if slack > 1e-6:
            assert positions(keep[start : start + n]) == want
        assert int(keep[start : start + n].sum()) == part.keep[0]
        start += n


@seeded
def test_visionzip(seed):
    g, r = generator(seed), np.random.default_rng(seed)
    sizes = tuple(r.integers(1, 30, r.integers(1, 5)).tolist())
    counts = [visionzip_counts(n, r.uniform(0.02, 0.95), r.choice([0, 0.05, 0.2])) for n in sizes]
    x, keys, attention = (
        torch.randn(sum(sizes), 5, generator=g),
        torch.randn(sum(sizes), 4, generator=g),
        torch.rand(sum(sizes), generator=g),
    )
    keep, merged = select_visionzip(x, attention, keys, sizes, counts)
    want, out = plain_rivals.visionzip(x, attention, keys, sizes, counts)
    assert positions(keep) == want
    close(merged[keep], out[keep])


@seeded
def test_dycoke(seed):
    g, r = generator(seed), np.random.default_rng(seed)
    frames, P, ratio = int(r.integers(1, 10)), int(r.integers(1, 14)), float(r.uniform(0.25, 1))
    method = DyCoke(Schedule(L, entering=dict(visual=ratio, audio=1.0)))
    x = torch.randn(frames, P, 6, generator=g)
    sizes, keep = method.budget("visual", (P,) * frames)
    got = method.pick(
        Stage1Inputs(x.flatten(0, 1), None, (WindowBudget("visual", 0, sizes, keep),))
    )
    assert positions(got) == plain_rivals.dycoke(x, max((4 * ratio - 1) / 3, 0.0)) and int(
        got.sum()
    ) == sum(keep)


@seeded
def test_omnizip_audio(seed):
    g, r = generator(seed), np.random.default_rng(seed)
    n, seen = int(r.integers(1, 30)), int(r.choice([0, 5, 20]))
    contextual = int(r.integers(0, min(n, 4) + 1))
    dominant, how_many = int(r.integers(0, n - contextual + 1)), int(r.integers(1, 5))
    audio, visual, attention = (
        torch.randn(n, 6, generator=g),
        torch.randn(seen, 6, generator=g),
        torch.rand(n, generator=g),
    )
    keep, merged = audio_anchors(audio, visual, attention, dominant, contextual, how_many)
    want, out = plain_rivals.omnizip_audio(audio, visual, attention, dominant, contextual, how_many)
    assert positions(keep) == want
    close(merged[keep], out[keep])


@pytest.mark.parametrize("seen", (0, 5))
@pytest.mark.parametrize("contextual", (0, 2))
def test_omnizip_takes_in_at_anchors_only(seen, contextual):
    "Without anchors nothing changes; without video, sounds go by likeness to their anchor."
    g = generator(0)
    audio, visual, attention = (
        torch.randn(n, *d, generator=g) for n, *d in ((20, 6), (seen, 6), (20,))
    )
    given = audio, visual, attention, 8, contextual, 2
    (keep, features), (want, out) = audio_anchors(*given), plain_rivals.omnizip_audio(*given)
    assert positions(keep) == want
    close(features, out)
    assert (features != audio).any(1).sum() == contextual


@seeded
def test_omnizip_rates(seed):
    r = np.random.default_rng(seed)
    G = int(r.integers(1, 8))
    sizes, retained = (
        r.integers(1, 30, G).tolist(),
        [None if r.random() < 0.2 else float(r.random()) for _ in range(G)],
    )
    keep = max(1, round(float(r.uniform(0.26, 0.64)) * sum(sizes)))
    got = visual_shares(
        torch.tensor([np.nan if v is None else v for v in retained]), torch.tensor(sizes), keep
    )
    close(got, torch.tensor(plain_rivals.omnizip_rates(retained, sizes, keep, 0.35, 0.75)), 1e-6)
    close((got * torch.tensor(sizes)).sum(), torch.tensor(float(keep)), 1e-9)


@seeded
def test_omnizip(seed):
    "The whole method on one sample."
    g, r = generator(seed), np.random.default_rng(seed)
    frames, P, windows, w = (
        int(r.integers(1, 7)),
        int(r.integers(4, 12)),
        int(r.integers(1, 4)),
        int(r.integers(5, 14)),
    )
    method = OmniZip.for_trr(L, *r.uniform(0.1, 0.9, 2), frames * P, windows * w)
    n, N = frames * P, windows * w
    parts = (
        WindowBudget("visual", 0, *method.budget("visual", (P,) * frames)),
        WindowBudget("audio", 0, *method.budget("audio", (w,) * windows)),
    )
    x, attention = torch.randn(n + N, 6, generator=g), torch.rand(n + N, generator=g)
    keep, merged = method.select(Stage1Inputs(x, attention, parts))
    total, anchors = sum(parts[1].keep), min(round(0.05 * N), sum(parts[1].keep))
    heard, out = plain_rivals.omnizip_audio(
        x[n:], x[:n], attention[n:], total - anchors, anchors, 3
    )
    retained = [sum(i * w <= j < (i + 1) * w for j in heard) / w for i in range(windows)]
    groups = [min(2, frames - f) * P for f in range(0, frames, 2)]
    retained = (retained + [None] * len(groups))[: len(groups)]
    seen = plain_rivals.omnizip_visual(
        x[:n].view(frames, P, 6),
        plain_rivals.omnizip_rates(retained, groups, sum(parts[0].keep), 0.35, 0.75),
    )
    assert (
        positions(keep[n:]) == heard
        and positions(keep[:n]) == seen
        and len(seen) == sum(parts[0].keep)
    )
    close(merged[n:][keep[n:]], out[keep[n:]])


@seeded
def test_density_peaks(seed):
    x = torch.randn(1, 3 + seed % 9, 5, generator=generator(seed))
    close(
        density_peaks(x, torch.ones(x.shape[:2], dtype=torch.bool))[0],
        torch.tensor(plain_rivals.peaks(x[0])),
    )


def sequence(seed, rows=1):
    "Tokens of a made-up prompt, and scores."
    g, r = generator(seed), np.random.default_rng(seed)
    kinds = [[0, 0] + r.choice([1, 1, 2], int(r.integers(4, 20))).tolist() + [1, 2, 0]] * rows
    modality = torch.tensor(kinds, dtype=torch.int8)
    column = torch.arange(modality.shape[1]).expand(modality.shape)
    tokens = Tokens(
        column, modality, column * 0, column * 0, modality.shape[1], tuple(range(rows)), False
    )
    return kinds[0], tokens, torch.randint(0, 8, modality.shape, generator=g).float(), r


@pytest.mark.parametrize("name", ("fastv-om", "pyramiddrop", "seats-flat-budgets"))
@seeded
def test_best_of_each_modality(seed, name):
    kinds, tokens, scores, r = sequence(seed)
    n = {1: kinds.count(1), 2: kinds.count(2)}
    aim = {m: int(r.integers(1, n[k] + 1)) for m, k in (("visual", 1), ("audio", 2))}
    method = EVERY[name].for_trr(L, 0.9, 0.9, n[1], n[2])
    keep = method.drop(tokens, scores, PruneStep("drop2", 2, 2, (aim,), (0,), (True,)), 1)[0]
    assert positions(keep) == plain_rivals.top_by_modality(
        scores[0].tolist(), kinds, {1: aim["visual"], 2: aim["audio"]}
    )


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if getattr(m, "prunes", None) == ("visual",)]
)
def test_audio_without_a_rule_goes_by_chance(name):
    "Not by anything that the method looks at; otherwise for every sample, alike for the same seed."
    method = (
        METHODS[name].for_trr(L, 0.5, 0.5, 12, 30)
        if name != "fastv"
        else METHODS[name].for_trr(L, 0.7, 0.7, 12, 30)
    )
    kinds, tokens, scores, r = sequence(3, rows=2)
    if name == "fastv":
        aim = dict(visual=2, audio=kinds.count(2) // 2)
        draw = lambda s, m=method: m.drop(
            tokens, s, PruneStep("drop2", 2, 2, (aim, aim), (0, 0), (True, True)), 1
        )[tokens.is_("audio")].view(2, -1)
        a, b, other = (
            draw(scores),
            draw(scores.flip(1)),
            draw(scores, type(method)(method.schedule, seed=1)),
        )
    else:
        parts = tuple(
            WindowBudget(m, i, (n,), (k,))
            for m, n, k in (("visual", 12, 6), ("audio", 30, 15))
            for i in range(2)
        )
        look = lambda: Stage1Inputs(
            torch.randn(84, 4),
            torch.rand(84),
            parts,
            dict(visual=torch.randn(24, 3), audio=torch.randn(60, 3)),
        )
        draw = lambda m: (
            lambda keep: (keep[0] if isinstance(keep, tuple) else keep)[24:].view(2, 30)
        )(m.select(look()))
        a, b, other = draw(method), draw(method), draw(type(method)(method.schedule, seed=1))
    assert (
        torch.equal(a, b)
        and not torch.equal(a[0], a[1])
        and not torch.equal(a, other)
        and a.sum(1).unique().numel() == 1
    )


@seeded
def test_uniform_lies_evenly(seed):
    r = np.random.default_rng(seed)
    n = int(r.integers(1, 60))
    method = Uniform.for_trr(L, float(r.uniform(0.01, 1)), 1.0, n, 0)
    part = WindowBudget("visual", 0, *method.budget("visual", (n,)))
    keep = positions(method.pick(Stage1Inputs(torch.zeros(n, 2), None, (part,))))
    assert len(keep) == part.keep[0]
    gaps = np.diff([-1, *keep])  # every step is the whole part of N/n or one more
    assert set(gaps.tolist()) <= {n // len(keep), n // len(keep) + 1} and keep[-1] == n - 1


@seeded
def test_uniform_drops_evenly(seed):
    "Between layers too: of what is left, as many of each modality as planned, and text."
    kinds, tokens, scores, r = sequence(seed)
    n = {1: kinds.count(1), 2: kinds.count(2)}
    aim = {m: int(r.integers(1, n[k] + 1)) for m, k in (("visual", 1), ("audio", 2))}
    plan = Schedule(L, drop_layers=(2,), keep_ratios=dict(visual=(0.5,), audio=(0.5,)))
    keep = positions(
        Uniform(plan).drop(tokens, None, PruneStep("drop2", 2, 2, (aim,), (0,), (True,)), 1)[0]
    )
    assert {i for i, k in enumerate(kinds) if k == 0} <= set(keep)
    for m, k in (("visual", 1), ("audio", 2)):
        mine = [i for i, kind in enumerate(kinds) if kind == k]
        ordinals = [mine.index(i) for i in keep if kinds[i] == k]
        assert len(ordinals) == aim[m] and ordinals[-1] == n[k] - 1
        assert set(np.diff([-1, *ordinals]).tolist()) <= {n[k] // aim[m], n[k] // aim[m] + 1}


@seeded
def test_vtw_takes_the_first_layer_under_the_threshold(seed):
    import xarray as xr

    r = np.random.default_rng(seed)
    kl = r.random((5, 2, 7)) * np.linspace(1, 0, 7) ** 3
    profile = xr.Dataset(
        dict(kl=(("sample", "removed", "layer"), kl)),
        dict(removed=["both", "visual"], layer=range(7)),
    )
    threshold = float(r.uniform(0.001, 0.3))
    for i, removed in enumerate(("both", "visual")):
        want = next(l for l in range(7) if sum(kl[s, i, l] for s in range(5)) / 5 < threshold)
        plan = VTW.from_profile(profile, 6, removed, threshold).schedule
        assert plan.late("visual") == want and plan.late("audio") == (
            want if removed == "both" else 6
        )


@seeded
def test_pyramid_and_seats_meet_their_targets(seed):
    "The average of the levels, computed layer by layer, is the target or the floor."
    r = np.random.default_rng(seed)
    layers, t = int(r.integers(12, 60)), float(r.uniform(0.01, 0.75))
    pyramid = PyramidDrop.for_trr(layers, t, t, 10_000, 10_000).schedule
    level, levels = 1.0, []
    for i in range(layers):
        if i in pyramid.drop_layers:
            level *= pyramid.keep_ratios["visual"][pyramid.drop_layers.index(i)]
        levels.append(level)
    floor = pyramid.drop_layers[0] / layers
    assert np.mean(levels) == pytest.approx(t if t > floor else floor, abs=1e-3)
    drops, late = (layers // 2, layers // 2 + 2), layers - 2
    like = Schedule(layers, drop_layers=drops, late_start=late)
    for cls in (Seats, ABLATIONS["seats-uniform-trr"]):
        plan = cls.for_trr(layers, t, t, like=like).schedule
        e, keep = plan.entering["visual"], plan.keep_ratios["visual"]
        assert (
            e * (drops[0] + keep[0] * 2 + keep[0] * keep[1] * (late - drops[1]))
        ) / layers == pytest.approx(min(t, late / layers))


# ---------------------------------------------------------------- for a target of their own


@each
@pytest.mark.parametrize("layers", (3, 6, 28))
def test_no_target_fails(name, layers):
    "What is planned is what the schedule says: more for a higher target, all at 100 %."
    before = -1.0
    for t in (1e-9, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        method = EVERY[name].for_trr(layers, t, t, 128.0, 80.0)
        trr = method.schedule.token_trr(128, 80)
        assert method.schedule.num_layers == layers and 0 <= trr <= 1 and trr >= before - 0.02
        before = trr
    assert method.schedule.keeps_all
    for pair in ((1.0, 0.05), (0.05, 1.0), (0.3, 0.6)):
        for n in ((128, 80), (9216, 1500), (100, 0), (0, 100), (1, 1)):
            EVERY[name].for_trr(layers, *pair, *n)


@each
def test_targets_are_met_where_no_floor_is_in_the_way(name):
    got = EVERY[name].for_trr(28, 0.72, 0.72, 9216, 1500).schedule.token_trr(9216, 1500)
    limit = {"omnizip": 0.65, "vtw": 20 / 28}.get(
        name, 0.72
    )  # 65 % of the visual tokens at most; whole layers
    assert got == pytest.approx(limit, abs=0.02)


@pytest.mark.parametrize("name", [n for n, m in EVERY.items() if issubclass(m, Seats)])
def test_ablations_change_one_thing(name):
    "Scale, windows and temperature are the plan's; its ratios, too, where its stages are kept."
    plan = Schedule.solve(
        20,
        (10, 12, 14),
        18,
        0.2,
        0.3,
        scale=1.3,
        temperature=0.25,
        windows=dict(visual_grids=4, seconds=2.0),
    )
    got = EVERY[name].for_trr(20, 0.2, 0.3, 128, 80, like=plan).schedule
    assert (got.windows, got.temperature) == (plan.windows, plan.temperature)
    if 1 in EVERY[name].stages and name != "seats-no-stage2":
        assert got.entering["visual"] == pytest.approx(0.26) and got.entering[
            "audio"
        ] == pytest.approx(0.39)
    if name in ("seats", "seats-flat-budgets", "seats-attention-only", "seats-diversity-only"):
        assert (got.drop_layers, got.late_start, got.shallow_end) == (
            plan.drop_layers,
            plan.late_start,
            plan.shallow_end,
        )
        for m in ("visual", "audio"):
            np.testing.assert_allclose(got.keep_ratios[m], plan.keep_ratios[m])


def test_the_scale_asked_for_holds_at_other_targets():
    "A plan at the limit still says what it wanted; a ratio set by hand counts more than that."
    layers = dict(num_layers=20, drop_layers=(10, 12), late_start=18)
    tight = Schedule.solve(
        **layers, visual=0.7, audio=0.3, scale=1.6, evidence=dict(scale_requested=1.6)
    )
    assert tight.scale["visual"] < 1.43
    assert Seats.for_trr(20, 0.35, 0.3, like=tight).schedule.entering["visual"] == pytest.approx(
        1.6 * 0.35
    )
    stated = Schedule.solve(
        **layers,
        visual=0.3,
        audio=0.3,
        entering=dict(visual=0.36, audio=0.39),
        evidence=dict(scale_requested=1.4),
    )
    got = stated.nearest(0.2, 0.2)
    assert list(got.entering.values()) == pytest.approx([0.2 * 1.2, 0.2 * 1.3])


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
    budgets = usual(name).window_budgets(layout, 5)
    got = [(b.modality, b.number) for b in budgets]
    assert got == [(m, n) for m in ("visual", "audio") for n in (5, 6, 7)]


def test_every_entry_says_what_it_is():
    assert list(METHODS) == [
        "seats",
        "random",
        "uniform",
        "fastv",
        "fastv-om",
        "visionzip",
        "visionzip-om",
        "visionzip-om-wide",
        "divprune",
        "divprune-om",
        "dycoke",
        "omnizip",
        "vtw",
        "pyramiddrop",
    ]
    for name, cls in EVERY.items():
        assert cls.name == name and (
            cls.paper.startswith("arXiv ") or name in ("random", "uniform")
        )


def test_classes_are_small():
    import inspect

    for cls in METHODS.values():
        assert len(inspect.getsource(cls).splitlines()) <= 60, cls


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


@pytest.fixture(scope="module")
def singles(model, processor, samples):
    return [encode(model, processor, [s]) for s in samples]


def usual(name, t=(0.55, 0.6)):
    return EVERY[name].for_trr(L, *t, 24, 40)


def last(model, encoded):
    return model(**encoded.inputs).logits[:, -1]


@in_both_families
def test_batch_equals_singles_and_plan(name, model, batch, singles):
    method = usual(name)
    full = last(model, batch)
    with prune(model, method) as run:
        together, kept, tokens = last(model, batch), run.kept, run.tokens_per_layer
    layout = layout_of(model, batch.inputs, "keep", method.grids, method.seconds)
    assert (
        tokens <= planned_tokens(method, layout)
    ).all() and tokens.sum() < layout.valid.sum() * L
    if name not in ("seats", *ABLATIONS):
        assert (tokens == planned_tokens(method, layout)).all()
    pads = (layout.modality == -1).sum(1)
    for rows in kept.values():  # text always stays
        for i, row in enumerate(rows):
            assert set(((layout.modality[i] == 0).nonzero()[:, 0] - pads[i]).tolist()) <= set(
                row.tolist()
            )
    for i, one in enumerate(singles):
        with prune(model, method) as run:
            if name == "random" or "audio" not in getattr(method, "prunes", ("audio",)):
                run.samples = i  # chance depends on the ordinal of a sample
            alone = last(model, one)
        close(together[i : i + 1], alone, 2e-5)
        assert tokens[i].tolist() == run.tokens_per_layer[0].tolist()
        for stage in run.kept:
            assert kept[stage][i].tolist() == run.kept[stage][0].tolist()
    assert torch.equal(last(model, batch), full)


@in_one_family
def test_a_plan_that_goes_by_distance(name, model, batch):
    "Stage I without attention is the plan's; who goes by attention gets it all the same."
    kept = []
    for weighted in (True, False):
        method = method_at(name, tiny.schedule(weighted=weighted), (24, 40))
        with prune(model, method) as run:
            assert last(model, batch).isfinite().all()
        kept.append([row.tolist() for row in run.kept.get("stage1", ())])
    weighs = issubclass(EVERY[name], Seats) and name not in SAME_STAGE_1
    assert (kept[0] != kept[1]) == weighs


@by_family(sorted((tiny.FAMILIES[i % 2], n) for i, n in enumerate(METHODS)))
def test_any_media(name, model, processor):
    "Images as visual tokens, clips of different size, one modality or none, in one batch."
    from seats_analysis.models.encode import Prompt

    clips = Prompt(
        "clips",
        (
            tiny.clip(8, 2),
            tiny.clip(9, 2, sound=False, size=(84, 56)),
            "where ?",
            tiny.clip(10, 1, sight=False),
            "when ?",
        ),
    )
    mixed = [
        Prompt("mixed", (tiny.image(2), tiny.clip(14, 2), "or", tiny.image(3, (28, 56)), "what ?")),
        tiny.ask("heard", tiny.clip(2, 2.5, sight=False)),
        clips,
        tiny.ask("text", None),
    ]
    method, batch = usual(name, (0.5, 0.5)), encode(model, processor, mixed)
    with prune(model, method, images="prune") as run:
        together, kept, tokens = last(model, batch), run.kept, run.tokens_per_layer
    plan = planned_tokens(
        method, layout_of(model, batch.inputs, "prune", method.grids, method.seconds)
    )
    assert (tokens == plan).all() if name != "seats" else (tokens <= plan).all()
    assert (tokens[:3, -1] < batch.layout.valid.sum(1).numpy()[:3]).all()
    for i in (0, 2):
        with prune(model, method, images="prune") as run:
            run.samples = i
            alone = last(model, encode(model, processor, mixed[i : i + 1]))
        close(together[i : i + 1], alone, 2e-5)
        for stage in run.kept:
            assert kept[stage][i].tolist() == run.kept[stage][0].tolist()


@in_one_family
def test_generate_and_undo(name, model, batch):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before, options = hooks(), dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    plain = model.generate(**batch.inputs, **options)
    for kv in ("evict", "retain"):
        with prune(model, usual(name), kv=kv) as run:
            out = model.generate(**batch.inputs, **options)
        assert out.shape == plain.shape and run.kept and run.timings.ms["prefill"] > 0
    with pytest.raises(KeyboardInterrupt):
        with prune(model, usual(name)):
            raise KeyboardInterrupt
    assert hooks() == before and torch.equal(model.generate(**batch.inputs, **options), plain)


@in_one_family
def test_copies_of_a_sample_are_treated_alike(name, model, singles):
    options = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False)
    with prune(model, usual(name)):
        one = model.generate(**singles[0].inputs, **options)
    with prune(model, usual(name)) as run:
        beams = model.generate(**singles[0].inputs, num_beams=3, num_return_sequences=3, **options)
    assert (
        len(beams) == 3
        and all(torch.equal(row, rows[0]) for rows in run.kept.values() for row in rows)
        and beams.shape[1] == one.shape[1]
    )


@in_one_family
def test_keeping_all_changes_no_bit(name, model, batch):
    full = model(**batch.inputs).logits
    with prune(model, EVERY[name].for_trr(L, 1.0, 1.0, 24, 40)) as run:
        assert torch.equal(model(**batch.inputs).logits, full)
    assert run.kept == {}


@in_one_family
def test_nothing_is_chosen_from_nan(name, model, batch):
    "A method that looks at what is broken refuses."
    from seats_analysis.models.families import adapter_for

    spoil = lambda m, args, out: out.index_fill(-1, torch.tensor([0]), torch.nan)
    method = usual(name)
    places = (
        dict(embeddings=adapter_for(model).visual(model).merger)
        if min(method.schedule.entering.values()) < 1
        else {}
    )
    if method.uses_scores and method.schedule.drop_layers:
        places["scores"] = adapter_for(model).layers(model)[0]
    for place, module in places.items():

        def hook(m, args, out):
            return (
                (spoil(m, args, out[0]), *out[1:])
                if isinstance(out, tuple)
                else spoil(m, args, out)
            )

        handle = module.register_forward_hook(hook)
        try:
            with prune(model, method) as run, pytest.raises(ValueError, match="NaN or infinity"):
                model(**batch.inputs)
        finally:
            handle.remove()
        assert run.kept == {}


# ---------------------------------------------------------------- no host sync


def entry_for(method, layout):
    parts = method.window_budgets(layout, 0)
    T = sum(sum(p.sizes) for p in parts)
    n = {m: sum(sum(p.sizes) for p in parts if p.modality == m) for m in ("visual", "audio")}
    return lambda: Stage1Inputs(
        torch.rand(T, 8),
        torch.rand(T) if method.uses_attention else None,
        parts,
        {m: torch.rand(k, 4) for m, k in n.items()} if method.uses_keys else None,
    )


@in_one_family
def test_no_choice_waits_for_the_device(name, model, batch):
    "Fake tensors have shapes but no values: whatever asks for one fails."
    method = usual(name)
    layout = layout_of(model, batch.inputs, "keep", method.grids, method.seconds)
    make, cuts = entry_for(method, layout), method.plan(layout, method.window_budgets(layout, 0))
    B, S = layout.shape
    with FakeTensorMode():
        keep = method.select(make()) if any(c.stage == 1 for c in cuts) else None
        if keep is not None:
            assert (keep[0] if isinstance(keep, tuple) else keep).dtype == torch.bool
        for cut in (c for c in cuts if c.stage == 2):
            kind = torch.zeros(B, S, dtype=torch.int8)
            tokens = Tokens(
                torch.arange(S).expand(B, S), kind, kind.int(), kind.int(), S, tuple(range(B)), True
            )
            assert method.drop(tokens, torch.rand(B, S), cut, 4).shape == (B, S)


STAGES = {
    1: dict(entering=dict(visual=0.4, audio=0.5)),
    2: dict(drop_layers=(2,), keep_ratios=dict(visual=(0.4,), audio=(0.5,))),
    3: dict(late_start=4),
}


@pytest.mark.parametrize("stage", STAGES)
@in_one_family
def test_a_stage_without_a_rule_is_refused(name, stage, model, singles):
    "What it builds runs and loses no text; a stage without a rule is refused before it runs."
    plan = Schedule(L, **STAGES[stage])
    if stage not in EVERY[name].stages:
        with pytest.raises(ValueError, match=f"stage {stage}.*for_trr"):
            EVERY[name](plan)
        return
    method, layout = EVERY[name](plan), singles[0].layout
    with prune(model, method) as run:
        assert last(model, singles[0]).isfinite().all()
    assert method.name == name and run.tokens_per_layer[0, -1] < layout.valid.sum()
    for rows in run.kept.values():
        assert set((layout.modality[0] == 0).nonzero()[:, 0].tolist()) <= set(rows[0].tolist())


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="seats-no-stage2"):
        method_at("fastv2", Schedule(L), (40, 20))
    for name in ("random", "visionzip-om"):  # whose own checks come on top
        cls = type("Narrow", (EVERY[name],), dict(stages=(1,)))
        with pytest.raises(ValueError, match="stage 2"):
            cls(Schedule(L, **STAGES[2]))


@pytest.mark.cuda
@in_one_family
def test_cuda_runs_without_sync(name, model, batch):
    method = usual(name)
    layout = layout_of(model, batch.inputs, "keep", method.grids, method.seconds)
    inputs = entry_for(method, layout)()
    if not any(c.stage == 1 for c in method.plan(layout, inputs.budgets)):
        pytest.skip("chooses nothing before the first layer")
    here = Stage1Inputs(
        *(None if x is None else x.cuda() for x in (inputs.features, inputs.attention)),
        inputs.budgets,
        inputs.keys and {m: k.cuda() for m, k in inputs.keys.items()},
    )
    cpu = method.select(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu = method.select(here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    a, b = (x[0] if isinstance(x, tuple) else x for x in (cpu, gpu))
    assert torch.equal(a, b.cpu())
