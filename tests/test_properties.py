"""What holds for every layout, score, ratio and budget. Hypothesis looks for an example against it:
200 of them in `make test`, 10,000 in `make nightly`.

The model is left out: a forward pass is played with the same functions on made-up features and
scores, so that thousands of layouts can be tried."""

import math
import torch
from hypothesis import assume, given, settings, strategies as st
from plain import stage2
from seats_analysis import Schedule
from seats_analysis.inputs.layout import Modality, TokenLayout, chunk_ids
from seats_analysis.pruning.base import Stage1Inputs, Tokens, take
from seats_analysis.pruning.prefill import finite_rows
from seats_analysis.pruning.encoders import window_sizes
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.select import plan_chunks, select_in_clip

VISUAL, AUDIO, _, _, PAD = Modality

EXAMPLES = {"ci": 200, "nightly": 10_000}
many = settings(max_examples=EXAMPLES.get(settings.get_current_profile_name(), 200))
seeds = st.integers(0, 2**31 - 1)
ratios = st.one_of(st.floats(0.01, 1.0), st.sampled_from((0.1, 0.5, 1.0)))
LAYERS = 8

# ---------------------------------------------------------------- what is drawn


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def layouts(draw, samples=3):
    """A left-padded batch of prompts: runs of text, visual, audio and image tokens in any order;
    time windows of any size."""
    segment = st.tuples(st.sampled_from((0, 1, 1, 1, 2, 2, 2, 3)), st.integers(1, 7))
    rows = [
        [kind for kind, n in draw(st.lists(segment, min_size=1, max_size=10)) for _ in range(n)]
        for _ in range(draw(st.integers(1, samples)))
    ]
    width = max(map(len, rows))
    modality = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], dtype=torch.int8)
    window = torch.full(modality.shape, -1, dtype=torch.int32)
    for kind in (VISUAL, AUDIO):
        ordinal = (modality == kind).int().cumsum(1) - 1
        window = torch.where(modality == kind, ordinal // draw(st.integers(1, 9)), window).int()
    return TokenLayout(modality, window, chunk_ids(modality))


@st.composite
def schedules(draw):
    "Any of the stages, at any depth, with any ratios."
    one, never = st.integers(3, LAYERS), st.just(LAYERS)
    late = draw(st.one_of(one.map(lambda l: (l, l)), st.tuples(one, one), st.tuples(never, never)))
    late = dict(zip(("visual", "audio"), late))
    drops = sorted(draw(st.sets(st.integers(1, min(max(late.values()), LAYERS - 1)), max_size=3)))
    keep = {m: tuple(draw(ratios) if d <= late[m] else 1.0 for d in drops) for m in late}
    return Schedule(
        num_layers=LAYERS,
        drop_layers=tuple(drops),
        late_start=late,
        keep_ratios=keep,
        entering={m: draw(ratios) for m in ("visual", "audio")},
        temperature=draw(st.sampled_from((1e-3, 0.1, 0.3))),
    )


def made_up(seed, shape):
    """Scores of some kind, all positive: smooth, at the scale of a softmax, with many ties, all
    equal, of reduced precision."""
    g, kind = generator(seed), seed % 5
    x = torch.rand(shape, generator=g)
    if kind == 1:
        x = x / shape[-1] * torch.rand(shape, generator=g) ** 8
    if kind == 2:
        x = (x * 4).round()
    if kind == 3:
        x = torch.full(shape, 0.25)
    return x.bfloat16() if kind == 4 else x


# ---------------------------------------------------------------- a forward pass without a model


def stages(layout, schedule, features, attention, scores):
    """(cut, tokens before, keep, index, tokens after) of every cut. features (B, S, D), attention
    (B, S), scores: layer -> (B, S), all on the full prompt."""
    method, windows = Seats(schedule), int(layout.chunk.max()) + 1
    parts = method.window_budgets(layout, 0)
    tokens = Tokens.of(layout, range(len(layout)), "cpu")
    for cut in method.plan(layout, parts):
        if cut.stage == 1:
            at = torch.cat(
                [(layout.modality == m).flatten().nonzero()[:, 0] for m in (VISUAL, AUDIO)]
            )
            chosen = method.select(
                Stage1Inputs(features.flatten(0, 1)[at], attention.flatten()[at], parts)
            )
            keep = tokens.valid.flatten().scatter(0, at, chosen).view(layout.shape)
        elif cut.stage == 2:
            keep = (
                method.drop(tokens, scores[cut.layer].gather(1, tokens.column), cut, windows)
                & tokens.valid
            )
        else:
            keep = tokens.valid & ~torch.stack([tokens.is_(m) for m in cut.removed]).any(0)
        before = tokens
        index, tokens = tokens.cut(keep, cut)
        yield cut, before, keep, index, tokens


def inputs_of(layout, schedule, seed):
    g = generator(seed)
    features = torch.randn(*layout.shape, 4, generator=g)
    if seed % 3 == 0:
        features = features.round()  # duplicates and zeros
    attention = torch.rand(layout.shape, generator=g)
    return features, attention, {d: made_up(seed + d, layout.shape) for d in schedule.drop_layers}


@many
@given(layouts(), schedules(), seeds)
def test_totals_text_order_and_positions(layout, schedule, seed):
    carried = torch.arange(layout.shape[1]).expand(
        layout.shape
    )  # what hidden states, rotary tables and caches go through
    never = ~(
        (layout.modality == VISUAL) | (layout.modality == AUDIO) | (layout.modality == PAD)
    )  # text, special tokens, images
    for cut, before, keep, index, tokens in stages(
        layout, schedule, *inputs_of(layout, schedule, seed)
    ):
        carried, media = (
            take(carried, index),
            (tokens.modality == VISUAL) | (tokens.modality == AUDIO),
        )
        for n, aim, exact, width, rest in zip(
            media.sum(1).tolist(), cut.n_keep, cut.exact, cut.widths, never.sum(1).tolist()
        ):
            # once one modality has left after a drop, what is left of the other is what that drop's
            # split gave it
            assert n == sum(aim.values()) if exact else n + rest <= width, "totals are exact"
        assert all(cut.exact) or schedule.late("visual") != schedule.late("audio")
        assert (
            tokens.valid.sum(1).tolist() == keep.sum(1).tolist()
            and tokens.column.shape[1] == cut.width
        ), "nothing is cut off, nothing invented"
        assert torch.equal(carried[tokens.valid], tokens.column[tokens.valid]), (
            "positions are those of the prompt"
        )
        for b, valid in enumerate(tokens.valid):
            here = tokens.column[b, valid]
            assert (here.diff() > 0).all(), "order is kept, no token twice"
            assert set(never[b].nonzero()[:, 0].tolist()) <= set(here.tolist()), "text stays"
            for name in ("modality", "window", "chunk"):
                assert torch.equal(
                    getattr(tokens, name)[b, valid], getattr(layout, name)[b, here]
                ), name


# ---------------------------------------------------------------- budgets of one step


@st.composite
def windows(draw):
    "Sizes of visual and audio runs per window, and totals that fit."
    pairs = st.tuples(st.integers(0, 9), st.integers(0, 9))
    visual, audio = zip(*draw(st.lists(pairs, min_size=1, max_size=8)))
    n_v, n_a = sum(visual), sum(audio)
    return visual, audio, draw(st.integers(min(1, n_v), n_v)), draw(st.integers(min(1, n_a), n_a))


taus = st.sampled_from((1e-3, 0.01, 0.1, 0.3, 10.0))


@many
@given(windows(), taus, seeds)
def test_budgets_are_exact_and_fit(drawn, tau, seed):
    visual, audio, t_v, t_a = drawn
    size = torch.tensor([visual]), torch.tensor([audio])
    mean = [made_up(seed + i, s.shape).float() * (s > 0) for i, s in enumerate(size)]
    stacked = torch.stack(mean, 1), torch.stack(size, 1), torch.tensor([[t_v, t_a]])
    v, a = plan_chunks(*stacked, tau).unbind(1)
    assert int(v.sum() + a.sum()) == t_v + t_a
    assert (v >= 0).all() and (a >= 0).all() and (v <= size[0]).all() and (a <= size[1]).all()
    if t_v + t_a >= sum(x + y > 0 for x, y in zip(visual, audio)):
        assert ((v + a > 0) == (size[0] + size[1] > 0)).all()  # else some go without


# ---------------------------------------------------------------- stage I


@st.composite
def clips(draw):
    """Features of a clip with duplicates, zeros and any scale; attention or none; window sizes and
    how many tokens of each."""
    total, seed = draw(st.integers(1, 40)), draw(seeds)
    sizes = window_sizes(total, draw(st.integers(1, 15)))
    features = torch.randn(total, draw(st.integers(1, 6)), generator=generator(seed))
    if draw(st.booleans()):
        features = features[torch.randint(0, total, (total,), generator=generator(seed))].round()
    attention = draw(st.sampled_from((None, 1.0, 1e-30, 0.0)))
    attention = (
        attention
        if attention is None
        else attention * torch.rand(total, generator=generator(seed + 1))
    )
    return (
        features * 10.0 ** draw(st.integers(-12, 12)),
        attention,
        sizes,
        [draw(st.integers(0, s)) for s in sizes],
    )


@many
@given(clips(), st.randoms(use_true_random=False))
def test_stage1_is_exact_and_windows_are_independent(clip, random):
    features, attention, sizes, counts = clip
    keep = select_in_clip(features, attention, sizes, counts)
    assert [int(part.sum()) for part in keep.split(list(sizes))] == counts
    order = random.sample(range(len(sizes)), len(sizes))
    parts = torch.arange(len(features)).split(list(sizes))
    moved = torch.cat([parts[i] for i in order])
    after = select_in_clip(
        features[moved],
        None if attention is None else attention[moved],
        [sizes[i] for i in order],
        [counts[i] for i in order],
    )
    assert torch.equal(after, keep[moved])


# ---------------------------------------------------------------- NaN and infinity

broken = st.sampled_from((math.nan, math.inf, -math.inf))


@many
@given(clips(), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 5), broken), max_size=4))
def test_every_broken_row_is_flagged_and_no_other(clip, faults):
    features, attention, sizes, counts = clip
    for row, column, value in faults:
        features[row % len(features), column % features.shape[1]] = value
    assert finite_rows(features).tolist() == [
        all(map(math.isfinite, row)) for row in features.tolist()
    ]
    keep = select_in_clip(
        features, attention, sizes, counts
    )  # and what runs before the flag is read must not fall over
    assert keep.shape == (len(features),) and int(keep.sum()) <= sum(counts)


@many
@given(windows(), taus, seeds, st.lists(st.tuples(st.integers(0, 200), broken), max_size=5))
def test_broken_scores_keep_the_shapes(drawn, tau, seed, faults):
    visual, audio, t_v, t_a = drawn
    assume(sum(visual) + sum(audio))
    cells = [
        (kind, i)
        for i, pair in enumerate(zip(visual, audio))
        for kind, n in zip((VISUAL, AUDIO), pair)
        for _ in range(n)
    ]
    modality, window = torch.tensor(cells).T[:, None]
    scores = made_up(seed, modality.shape).float()
    for i, value in faults:
        scores[0, i % scores.shape[1]] = value
    keep = stage2(scores, modality, window, len(visual), [t_v], [t_a], tau)
    assert int(keep.sum()) == t_v + t_a
