"""Parity with the recorded reference, file by file, and our own rule wherever an entry is set
apart.

The recorded cases are read from the folder named by SEATS_GOLDEN (default: tests/fixtures/golden).
What to leave out is decided by the fields of an entry
(golden.py), never by its name, so the same tests run on any folder with the same set of files,
whatever its seeds and shapes.
"""

from types import SimpleNamespace

import numpy as np, pytest, torch

pytest.register_assert_rewrite("golden_baselines")
from golden_baselines import *  # the recorded baselines: fixtures below are theirs too
from golden import (
    BF16_SCORE,
    BF16_STATISTIC,
    FILE_NAME,
    FLOAT32,
    GOLDEN,
    QUIRKS,
    e2e_cases,
    e2e_model,
    flagged,
    index,
    is_feasible,
    label,
    near,
    quirk_base,
    read_json,
    recorded,
    run_pruned,
    runs_of,
    tensors,
)
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import layout_of
from seats_analysis.models.decoder import Decoder
from seats_analysis.pruning.base import Tokens, stage1_counts, stage2_counts, window_tokens
from seats_analysis.pruning.prefill import Prefill
from seats_analysis.pruning.received import attention_received, pool_groups, window_sizes
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.session import prune
from plain import stage2
from seats_analysis.inputs.layout import Modality
from seats_analysis.schedules.solve import Segments, drop_shares
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.pruning.select import query_scores, select_in_clip

MODALITIES = tuple(Modality.CODES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def cases(name, key="cases", **where):
    return [
        pytest.param(c, id=label(c))
        for c in index(name, key)
        if all(c[k] == v for k, v in where.items())
    ]


def close(a, b, tol=FLOAT32):
    torch.testing.assert_close(a.float(), b.float(), atol=tol, rtol=0)


def close_at_scale(a, b):
    """Through many layers rounding grows with the values: 1e-5 of the largest, but not less than
    1e-5. The parity notebook shows the numbers."""
    close(a, b, FLOAT32 * max(1.0, float(b.abs().max())))


# ---------------------------------------------------------------- schedule


# The recorded behaviour, kept here and only here: clipping, filtering, four decimals, 1-based
# layers.
def parse_layers(text):
    'Sorted layers of "16-18-20" or "20, 16,18"; none for None or a blank.'
    return sorted(int(part) for part in (text or "").replace("-", ",").split(",") if part.strip())


def count_layers(name):
    "Layer count by the first known name inside the model path."
    for known, layers in index("schedule.json", "num_layers").items():
        if known in name:
            return layers
    raise ValueError(f"Unknown model {name!r}, cannot compute progressive_remove lm_ratio")


def clipped_strength(target, entering, drops, last, layers):
    "Closed form of the strength, clipped to [0, 1] as the bisection of the reference ends up."
    pieces = np.diff([0, *drops, last])
    return min(
        max(
            (entering * last - target * layers)
            / (entering * float(pieces[1:] @ drop_shares(len(drops)))),
            0.0,
        ),
        1.0,
    )


def rounded_ratios(target, entering, drops, last, layers):
    "Keep ratios with four decimals; levels floored at 1e-12."
    active = [d for d in drops if d < last]
    if not active:
        return []
    strength = clipped_strength(target, entering, active, last, layers)
    levels = [
        entering,
        *(max(entering * (1 - strength * share), 1e-12) for share in drop_shares(len(active))),
    ]
    return [round(after / before, 4) for before, after in zip(levels, levels[1:])]


def reference_solver(
    pretrained,
    video_ratio,
    audio_ratio,
    video_encoder_ratio,
    audio_encoder_ratio,
    progressive_drop_layers,
    late_block_layer,
    progressive_schedule,
):
    "All outputs of the recorded solver, by the names in the file."
    layers, drops = count_layers(pretrained), parse_layers(progressive_drop_layers)
    if progressive_schedule != "exp":
        raise ValueError(f"Unknown progressive_schedule: {progressive_schedule!r}")
    last = layers if late_block_layer is None else min(late_block_layer - 1, layers)
    solve = lambda target, entering: rounded_ratios(target, entering, drops, last, layers)
    return dict(
        video_inner_progressive_ratio_list=solve(video_ratio, video_encoder_ratio),
        audio_inner_progressive_ratio_list=solve(audio_ratio, audio_encoder_ratio),
        num_layers=layers,
        drop_layers=drops,
        remove_layer=last,
        progressive_schedule=progressive_schedule,
        video_encoder_ratio=video_encoder_ratio,
        audio_encoder_ratio=audio_encoder_ratio,
    )


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in index("schedule.json")])
def test_reference_solver_matches_every_case(case):
    if "exception" in case:
        with pytest.raises(ValueError) as caught:
            reference_solver(**case["inputs"])
        assert (type(caught.value).__name__, str(caught.value)) == (
            case["exception"],
            case["message"],
        )
    else:
        assert reference_solver(**case["inputs"]) == case["outputs"]


SOLVED = [pytest.param(c, id=c["name"]) for c in index("schedule.json") if "outputs" in c]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("case", SOLVED)
def test_full_precision_agrees_or_refuses(case, modality):
    target, entering, drops, last, layers, ratios = recorded(case, modality)
    segments = Segments(layers, tuple(drops), last)
    if is_feasible(target, entering, drops, last, layers):
        _, keep = segments.keep_ratios(target, entering=entering)
        assert keep == pytest.approx(ratios, abs=5.1e-5)
    else:
        with pytest.raises(ValueError, match="cannot be met|give an entering ratio"):
            segments.keep_ratios(target, entering=entering)


@pytest.mark.parametrize("case", SOLVED)
def test_schedule_meets_the_target_or_refuses(case):
    (t_v, e_v, drops, last, layers, _), (t_a, e_a, *_) = (recorded(case, m) for m in MODALITIES)
    build = lambda: Schedule.solve(
        layers, drops, last, visual=t_v, audio=t_a, entering={"visual": e_v, "audio": e_a}
    )
    if is_feasible(t_v, e_v, drops, last, layers) and is_feasible(t_a, e_a, drops, last, layers):
        means = [np.mean(build().levels(m)) for m in MODALITIES]
        assert means == pytest.approx([t_v, t_a], abs=1e-9)
    else:
        with pytest.raises(ValueError, match="cannot be met|give an entering ratio"):
            build()


# ---------------------------------------------------------------- statistic


@pytest.mark.parametrize("case", cases("attn_qk_index.json", "vision"))
def test_vision_statistic(case):
    t, tol = tensors(case), FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    stat = attention_received(
        t["q"], t["k"], window_sizes(len(t["q"]), case["window_tokens_patches"])
    )
    torch.testing.assert_close(stat, t["patch_stat"].float(), atol=tol, rtol=0)
    merged = pool_groups(stat, case["spatial_merge_size"] ** 2)[t["window_index"].argsort()]
    torch.testing.assert_close(merged, t["merged_stat"].float(), atol=tol, rtol=0)


@pytest.mark.parametrize("case", cases("attn_qk_index.json", "audio"))
def test_audio_statistic(case):
    t, tol = tensors(case), FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    stat = attention_received(t["q"], t["k"], window_sizes(case["T"], case["window_frames"]))
    torch.testing.assert_close(stat, t["frame_stat"].float(), atol=tol, rtol=0)
    torch.testing.assert_close(pool_groups(stat, 2), t["pooled_stat"].float(), atol=tol, rtol=0)


# ---------------------------------------------------------------- Stage I


@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="batch"))
def test_diverse_batch(case):
    t, n = tensors(case), min(case["num_retained"], case["N"])
    features, attention = t["features"], t.get("attention")
    B, N = features.shape[:2]
    flat = features.flatten(0, 1), None if attention is None else attention.flatten(), [N] * B
    keep = [select_in_clip(*flat, [count] * B).view(B, N) for count in range(n + 1)]
    assert all(k.sum(1).tolist() == [count] * B for count, k in enumerate(keep))
    gaps = case["min_rel_gap_per_row"] or [None] * B
    for row in range(B):
        if near(gaps[row]):
            continue
        assert keep[n][row].nonzero()[:, 0].tolist() == t["keep_indices"][row].tolist()
        order = [
            (more[row] & ~less[row]).nonzero()[:, 0].tolist() for less, more in zip(keep, keep[1:])
        ]  # what one token more adds
        if "greedy_order" in t:
            assert order == [[i] for i in t["greedy_order"][row].tolist()]


def check_windows(case, keep, golden):
    """Exact count in every window; the same tokens unless the window's closest decision was a near
    tie."""
    for (start, end), count, gap in zip(
        case["windows"], case["intended_per_window"], case["min_rel_gap_per_window"]
    ):
        assert int(keep[start:end].sum()) == count
        if not near(gap):
            assert keep[start:end].tolist() == golden[start:end].tolist()


@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="windows"))
def test_diverse_windows(case):
    t, sizes = tensors(case), window_sizes(case["T"], case["window_tokens"])
    counts = stage1_counts(sizes, case["ratio"])
    assert list(counts) == case["intended_per_window"]
    check_windows(
        case, select_in_clip(t["features"], t.get("attention"), sizes, counts), t["keep_mask"]
    )


@pytest.mark.parametrize(
    "case",
    cases("windivprune_index.json", kind="video") + cases("windivprune_index.json", kind="audio"),
)
def test_diverse_modality(case):
    t, sizes = tensors(case), window_sizes(case["T"], case["window_tokens"])
    at = (t["input_ids"][0] == case[f"{case['kind']}_token_id"]).nonzero()[:, 0]
    counts = stage1_counts(sizes, case["ratio"])
    assert list(counts) == case["intended_per_window"]
    keep = select_in_clip(t["inputs_embeds"][0, at], t.get("attn_mean"), sizes, counts)
    check_windows(case, keep, t["global_keep_mask"][at])


@pytest.mark.parametrize("case", cases("windivprune_ties.json"))
def test_diverse_ties(case):
    t, n = tensors(case), case["num_retained"]
    keep = select_in_clip(t["features"], t.get("attention"), [len(t["features"])], [n])
    assert int(keep.sum()) == n  # ours: exactly n distinct tokens, whatever the reference did
    if case["exact_arithmetic"]:
        assert keep.nonzero()[:, 0].tolist() == t["keep_indices"].tolist()


# ---------------------------------------------------------------- Stage II scores


def rms_norm(x, weight, eps):
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)


def rotate(x, cos, sin):
    return x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin


def sectioned(table, section):
    "Qwen2.5's rotary table: block i of the frequencies follows axis i mod 3 (t, h, w)."
    return torch.cat([part[i % 3] for i, part in enumerate(table.split(list(section) * 2, -1))], -1)


def projected(t, case):
    "Query and key heads (1, S, heads, d) of one recorded layer."
    hidden = rms_norm(t["hidden_states"], t["input_layernorm.weight"], case["rms_norm_eps"])
    for name in "qk":
        x = torch.nn.functional.linear(
            hidden, t[f"{name}_proj.weight"], t.get(f"{name}_proj.bias")
        ).unflatten(-1, (-1, case["head_dim"]))
        yield (
            rms_norm(x, t[f"{name}_norm.weight"], case["rms_norm_eps"])
            if f"{name}_norm.weight" in t
            else x
        )


@pytest.mark.parametrize("case", cases("qk_index.json"))
def test_query_scores(case):
    t = tensors(case)
    cos, sin = (
        sectioned(t[n], case["mrope_section"]) if t[n].dim() == 4 else t[n] for n in ("cos", "sin")
    )
    q, k = (rotate(x.transpose(1, 2), cos[:, None], sin[:, None]) for x in projected(t, case))
    scores = query_scores(q[:, :, case["query_position"]], k)[0]
    tol = FLOAT32 if case["dtype"] == "float32" else BF16_SCORE
    torch.testing.assert_close(scores, t["scores"].float(), atol=tol, rtol=0)


# ---------------------------------------------------------------- Stage II choice


def per_window(keep, types, runs, kind, n):
    return [int((keep & (types == kind) & (runs == i)).sum()) for i in range(n)]


@pytest.mark.parametrize("case", cases("topdown_index.json"))
def test_stage2(case):
    t = tensors(case)
    scores, types, golden = t["scores"], t["token_type"], t["keep_mask"]
    runs, n = runs_of(types.tolist())
    assert n == case["n_windows"]
    totals = stage2_counts(
        sum(case["video_sizes"]),
        sum(case["audio_sizes"]),
        case["video_keep_ratio"],
        case["audio_keep_ratio"],
    )
    assert totals == (case["intended_video"], case["intended_audio"])
    keep = stage2(
        scores[None], types[None], runs[None], n, totals[:1], totals[1:], case["temperature"]
    )[0]
    assert keep[types == 0].all()
    assert int(keep[types > 0].sum()) == case["intended_total"]  # ours: exact for every entry
    for kind, field in ((1, "video_sizes"), (2, "audio_sizes")):
        assert all(k <= s for k, s in zip(per_window(keep, types, runs, kind, n), case[field]))
    if case["total_mismatch"] or near(case.get("min_distance_to_rounding_tie")):
        return
    for kind, field in ((1, "video_kept"), (2, "audio_kept")):
        assert per_window(keep, types, runs, kind, n) == case[field]
    if case["tie_order_defined"]:
        assert keep.tolist() == golden.tolist()
    else:
        assert scores[keep].sort().values.tolist() == scores[golden].sort().values.tolist()


def test_stage2_fewer_tokens_than_windows():
    """Recorded entries with more windows than tokens: one token in each of the best-scored windows,
    none in the others."""
    seen = 0
    for case in index("topdown_index.json"):
        total, n = case["intended_total"], case["n_windows"]
        if total >= n or n < 2 or not (case["intended_video"] and case["intended_audio"]):
            continue
        t = tensors(case)
        runs, _ = runs_of(t["token_type"].tolist())
        totals = [case["intended_video"]], [case["intended_audio"]]
        keep = stage2(
            t["scores"][None], t["token_type"][None], runs[None], n, *totals, case["temperature"]
        )[0]
        kept = [
            a + b
            for a, b in zip(*(per_window(keep, t["token_type"], runs, kind, n) for kind in (1, 2)))
        ]
        share = sum(
            torch.softmax(
                torch.stack(
                    [
                        t["scores"][(t["token_type"] == m) & (runs == i)].double().mean()
                        for i in range(n)
                    ]
                )
                / case["temperature"],
                0,
            )
            for m in (1, 2)
        )
        assert sorted(kept) == [0] * (n - total) + [1] * total
        assert {i for i in range(n) if kept[i]} == set(share.topk(total).indices.tolist())
        seen += 1
    assert seen  # the recorded set holds such entries


# ---------------------------------------------------------------- end to end: the untouched model

each_case = pytest.mark.parametrize("case", e2e_cases(), ids=lambda c: c.name)


@pytest.fixture(scope="module")
def model():
    return e2e_model()


def next_position(case):
    return case.inputs["input_ids"].shape[1] + case.out["rope_deltas"].view(1)


@each_case
def test_transformers_computes_the_recorded_model(model, case):
    "Before anything is pruned: the same weights, positions and embeddings give the same logits."
    seen = {}
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.update(k) or None, with_kwargs=True
    )
    try:
        out = model(**case.inputs, use_cache=True)
    finally:
        handle.remove()
    assert torch.equal(seen["position_ids"][-3:], case.out["position_ids"])
    deltas = next(
        d for m in model.modules() if (d := getattr(m, "rope_deltas", None)) is not None
    )  # the stock forward writes them on the model
    assert torch.equal(deltas.view(-1), case.out["rope_deltas"].view(-1))
    close(seen["inputs_embeds"][0], case.out["inputs_embeds"])
    close(out.logits[0, -1], case.out["full.last_logits"].flatten())
    assert int(out.logits[0, -1].argmax()) == int(case.out["full.next_token"])
    step = model(
        input_ids=case.out["full.next_token"].view(1, 1),
        position_ids=next_position(case).expand(3, 1, 1),
        past_key_values=out.past_key_values,
    )
    close(step.logits[0, -1], case.out["full.decode_logits"].flatten())


# -------------------- end to end: each stage from what was recorded before it


@each_case
def test_stage1_from_recorded_features(model, case):
    layout = layout_of(model, case.inputs)
    sizes = window_tokens(layout)[0]
    here = [case.out["inputs_embeds"][case.types == kind] for kind in (1, 2)]
    found = torch.zeros_like(case.types, dtype=torch.bool) | (case.types == 0)
    for kind, (m, f), features in zip((1, 2), FILE_NAME.items(), here):
        counts = stage1_counts(sizes[m], case.seats[f"{f}_encoder_ratio"])
        found[case.types == kind] = select_in_clip(
            features, case.out[f"{f}_attn_mean"], sizes[m], counts
        )
        assert sum(counts) == case.stages[0].counts[f]
    if "stage1" in case.comparable:
        assert torch.equal(found.nonzero()[:, 0], case.stages[0].kept)


def before(case, stage):
    return case.stages[case.stages.index(stage) - 1].kept


DROPS = [pytest.param(c, s, id=f"{c.name}-{s.name}") for c in e2e_cases() for s in c.drops]


@pytest.mark.parametrize("case, stage", DROPS)
def test_scores_from_recorded_hidden_states(model, case, stage):
    """Through the decoder layer itself: norm, projections and rotary tables of the model that
    transformers built."""
    here, hidden = (
        before(case, stage),
        case.out[f"hidden.after_layer{stage.layer}.before_drop"][None],
    )
    decoder = Decoder(model)
    tables = decoder.rotary_tables(hidden, case.out["position_ids"][:, :, here])
    tokens = Tokens(
        here[None], case.types[here][None].to(torch.int8), None, None, len(case.types), (0,), False
    )
    layout = SimpleNamespace(chunk=torch.zeros(1, 1))  # not looked at
    seats = Seats(Schedule(len(decoder.layers)))
    prefill = Prefill(decoder, seats, "evict", layout, (), [], tokens, None)
    scores = prefill.scores(stage.layer - 1, hidden, tables)[0]
    close(scores, case.out[f"scores.after_layer{stage.layer}"])


@pytest.mark.parametrize("case, stage", DROPS)
def test_drop_from_recorded_scores(case, stage):
    """The choice alone, on the runs of the current sequence and the counts of the record: no later
    stage depends on an earlier one here."""
    here, totals = (
        before(case, stage),
        next(recorded for s, recorded, _ in case.totals() if s is stage),
    )
    types, scores = case.types[here], case.out[f"scores.after_layer{stage.layer}"]
    runs, n = runs_of(types.tolist())
    keep = stage2(scores[None], types[None], runs[None], n, totals[:1], totals[1:])[0]
    assert keep[types == 0].all() and int(keep[types > 0].sum()) == sum(totals)
    if sum(totals) == stage.counts["video"] + stage.counts["audio"] and not near(stage.gap):
        assert torch.equal(here[keep], stage.kept)


# ---------------------------------------------------------------- end to end: through prune


@pytest.fixture(scope="module")
def runs(model):
    return {case.name: run_pruned(model, case) for case in e2e_cases()}


@each_case
def test_same_statistic_and_features(case, runs):
    "What stage I saw inside the pruned forward pass."
    entry = runs[case.name].seen["stage1"]
    close(entry.attention, torch.cat([case.out[f"{f}_attn_mean"] for f in FILE_NAME.values()]))
    close(
        entry.features,
        torch.cat([case.out["inputs_embeds"][case.types == kind] for kind in (1, 2)]),
    )


@each_case
def test_same_kept_positions_after_every_stage(case, runs):
    run = runs[case.name]
    for stage in case.stages:
        if stage.name in case.comparable:
            assert torch.equal(run.kept[stage.name], stage.kept), stage.name
    planned = dict(stage1=sum(case.stages[0].counts.values())) | {
        s.name: sum(ours) + s.counts["text"] for s, _, ours in case.totals()
    }
    for name, n in planned.items():
        assert len(run.kept[name]) == n  # flagged or not
    for kept in run.kept.values():
        assert (kept.diff() > 0).all() and set((case.types == 0).nonzero()[:, 0].tolist()) <= set(
            kept.tolist()
        )


@each_case
def test_same_hidden_states_and_scores(case, runs):
    run, names = runs[case.name], [s.name for s in case.stages]
    for i, stage in enumerate(case.stages[1:], 1):
        if not set(names[:i]) <= set(case.comparable):
            break
        kind = "drop" if stage.ratios else "late"
        close_at_scale(
            run.hidden[stage.name], case.out[f"hidden.after_layer{stage.layer}.before_{kind}"]
        )
        if stage.ratios:
            close(run.seen[stage.name][0], case.out[f"scores.after_layer{stage.layer}"])


@each_case
def test_same_logits_and_decode_step(case, runs):
    run = runs[case.name]
    assert run.cache_lengths == [run.tokens_per_layer[-1]] * len(
        run.cache_lengths
    )  # evict: every layer ends with what the last one holds
    if len(case.comparable) < len(case.stages):
        return
    assert run.cache_lengths == case.out["seats.cache_lengths"].tolist()
    close_at_scale(run.logits, case.out["seats.last_logits"].flatten())
    close_at_scale(run.decode, case.out["seats.decode_logits"].flatten())


@each_case
def test_eager_attention_is_the_same(model, case, runs):
    "The record was made with sdpa; another implementation differs by rounding only."
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        run = run_pruned(model, case)
    finally:
        model.set_attn_implementation(before)
    for stage in case.stages:
        if stage.name in case.comparable:
            assert torch.equal(run.kept[stage.name], stage.kept), stage.name
    if len(case.comparable) == len(case.stages):
        close_at_scale(run.logits, case.out["seats.last_logits"].flatten())


# ---------------------------------------------------------------- odd settings

RESULTS = index("e2e_quirks.json", "results")


def quirk_case():
    "Inputs of the odd settings: the first case that interleaves sound with video."
    return next(c for c in e2e_cases() if c.inputs["use_audio_in_video"])


def quirk_plan(**changes):
    base = quirk_base()
    settings = dict(
        num_layers=base.layers,
        drop_layers=base.drops,
        late_start=base.late,
        entering=dict(visual=base.visual, audio=base.audio),
        keep_ratios={m: base.ratios for m in MODALITIES},
    )
    return Schedule(**settings | changes)


def lengths_of(model, plan, inputs):
    "stage -> tokens left, in order; and the tokens of every layer."
    with prune(model, plan) as run:
        model(**inputs)
    return {name: len(rows[0]) for name, rows in run.kept.items()}, run.tokens_per_layer[0].tolist()


def expected_lengths(plan, windows, text):
    "Tokens after every stage, from the rule alone. windows: modality -> sizes of its time windows."
    n = {m: sum(stage1_counts(windows[m], plan.entering[m])) for m in MODALITIES}
    steps = (
        {} if n == {m: sum(windows[m]) for m in MODALITIES} else {"stage1": text + sum(n.values())}
    )
    for i, d in enumerate(plan.drop_layers):
        n = {m: min(n[m], max(1, round(plan.keep_ratios[m][i] * n[m]))) for m in MODALITIES}
        steps[f"drop{d}"] = text + sum(n.values())
    return steps | (
        {} if plan.late_start in (None, plan.num_layers) else {f"late{plan.late_start}": text}
    )


def agrees(found, record):
    """Ours against the recorded [layer, length] pairs. Totals of later drops follow from counts
    that ours plans and the reference finds: each may round otherwise."""
    ours = [n for name, n in found.items() if name != "stage1"]
    theirs = [n for _, n in record["drops"]]
    return (
        [f"{l + 1}" for l, _ in record["drops"]]
        == [name.lstrip("droplate") for name in found if name != "stage1"]
        and ours[0] == theirs[0]
        and ours[-1] == theirs[-1]
        and all(abs(a - b) <= i for i, (a, b) in enumerate(zip(ours, theirs)))
    )


def same_as_recorded(model, name, **changes):
    found, _ = lengths_of(model, quirk_plan(**changes), quirk_case().inputs)
    assert agrees(found, RESULTS[name]), (found, RESULTS[name])


def case_windows(model, inputs):
    layout = layout_of(model, inputs)
    return window_tokens(layout)[0], int((layout.modality == 0).sum())


def works(model, inputs, plan=None):
    "Every stage runs, with the planned number of tokens."
    plan = plan or quirk_plan()
    windows, text = case_windows(model, inputs)
    with prune(model, plan) as run:
        logits = model(**inputs).logits
    assert {name: len(rows[0]) for name, rows in run.kept.items()} == expected_lengths(
        plan, windows, text
    )
    assert torch.isfinite(logits).all()
    return run


def special(name):
    return read_json("e2e_index.json")["token_ids"][name]


def text_tokens(case):
    return case.inputs["input_ids"][
        0,
        ~torch.isin(
            case.inputs["input_ids"][0],
            torch.tensor(list(read_json("e2e_index.json")["token_ids"].values())),
        ),
    ]


def prompt(model, case, *media, lead=True):
    """A prompt with other media than the case: 'video', or the frames of a sound that is cut from
    the case's."""
    words, ids, inputs, sounds = text_tokens(case).tolist(), [], {}, []
    if lead:
        ids += words[:2]
    for medium in media:
        if medium == "video":
            kind, n = "video", int((case.types == 1).sum())
        else:
            kind, (n,) = "audio", adapter_for(model).audio_tokens(model, [medium])
        around = (
            [special("vision_start"), special("vision_end")]
            if kind == "video"
            else [special("audio_start"), special("audio_end")]
        )
        body = [special(kind)] * n
        ids += body if not lead and not ids else [around[0], *body, around[1]]
        if kind == "video":
            inputs |= {
                k: case.inputs[k]
                for k in ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")
            }
        else:
            sounds.append(medium)
    if sounds:
        features = case.inputs["input_features"]
        inputs["feature_attention_mask"] = torch.stack(
            [(torch.arange(features.shape[2]) < n).long() for n in sounds]
        )
        inputs["input_features"] = (
            features.expand(len(sounds), -1, -1) * inputs["feature_attention_mask"][:, None]
        )
    ids = torch.tensor([ids + words[-3:]])
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not lead:
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(
            3, 1, -1
        )  # stock positions look for the token before a video
    return inputs


def frames(case):
    return int(case.inputs["feature_attention_mask"].sum())


def odd(n):
    return n - n % 4 - 2  # so many frames are an odd number after the stride of 2


def even(n):
    return n - n % 4


def on_baseline(model):
    same_as_recorded(model, "baseline")


def on_drop_and_late_together(model):
    base = quirk_base()
    drops = (*base.drops[:-1], base.late)
    run = works(model, quirk_case().inputs, quirk_plan(drop_layers=drops))
    kept = run.kept
    assert list(kept)[-2:] == [f"drop{base.late}", f"late{base.late}"] and len(
        kept[f"late{base.late}"][0]
    ) < len(kept[f"drop{base.late}"][0])


def on_drop_after_late(model):
    base = quirk_base()
    with pytest.raises(ValueError):
        quirk_plan(drop_layers=(*base.drops[:-1], base.late + 1))


def on_no_stage1(model):
    plan = quirk_plan(entering=dict(visual=1.0, audio=1.0))
    run = works(model, quirk_case().inputs, plan)
    assert "stage1" not in run.kept and len(run.kept) == len(plan.drop_layers) + 1


def on_one_ratio_1(model):
    base, found = quirk_base(), []
    for m in MODALITIES:
        found.append(
            lengths_of(
                model,
                quirk_plan(entering=dict(visual=base.visual, audio=base.audio) | {m: 1.0}),
                quirk_case().inputs,
            )[0]
        )
    assert (
        sum(agrees(f, RESULTS["one_encoder_ratio_1"]) for f in found) == 1
    )  # the record does not say which of the two it was


def on_ratio_above_1(model):
    for m in MODALITIES:
        with pytest.raises(ValueError, match="1.05"):
            quirk_plan(entering={"visual": 0.5, "audio": 0.5, m: 1.05})


def on_empty_lists(model):
    for short in ((), quirk_base().ratios[:-1]):
        with pytest.raises(ValueError):
            quirk_plan(keep_ratios={m: short for m in MODALITIES})


def on_late_after_last(model):
    "The reference shortens the last layer's output; no layer is shorter for it."
    base, record = quirk_base(), RESULTS["late_L_plus_1"]
    _, per_layer = lengths_of(model, quirk_plan(late_start=base.layers), quirk_case().inputs)
    found, _ = lengths_of(model, quirk_plan(late_start=None), quirk_case().inputs)
    assert (
        agrees(found, {**record, "drops": record["drops"][:-1]})
        and per_layer[-1] == found[f"drop{base.drops[-1]}"]
    )


def on_late_past_the_end(model):
    with pytest.raises(ValueError):
        quirk_plan(late_start=quirk_base().layers + 1)
    same_as_recorded(model, "late_L_plus_2", late_start=None)


def on_late_none(model):
    same_as_recorded(model, "late_none", late_start=None)


def on_audio_only(model):
    works(model, prompt(model, quirk_case(), frames(quirk_case())))


def on_video_only(model):
    works(model, prompt(model, quirk_case(), "video"))


def on_sounds(*cut):
    def check(model):
        case = quirk_case()
        for media in (("video",), ()):
            works(
                model,
                prompt(
                    model,
                    case,
                    *media,
                    *(f(n) for f, n in zip(cut, (frames(case), frames(case) // 2))),
                ),
            )

    return check


def on_first_token(model):
    "A video token first in the prompt: it may go, and nothing is switched off by that."
    run = works(model, prompt(model, quirk_case(), "video", frames(quirk_case()), lead=False))
    assert len(run.kept) == len(quirk_base().drops) + 2


CHECKS = dict(
    baseline=on_baseline,
    drop_layer_equals_late_minus_1=on_drop_and_late_together,
    drop_layer_after_late=on_drop_after_late,
    both_encoder_ratios_1_disables_all=on_no_stage1,
    one_encoder_ratio_1=on_one_ratio_1,
    encoder_ratio_above_1=on_ratio_above_1,
    empty_ratio_lists_default_085=on_empty_lists,
    late_L_plus_1=on_late_after_last,
    late_L_plus_2=on_late_past_the_end,
    late_none=on_late_none,
    audio_only_first_call=on_audio_only,
    audio_only_after_av_call=on_audio_only,
    video_only_first_call=on_video_only,
    video_only_after_av_call=on_video_only,
    two_audios_even=on_sounds(even, even),
    two_audios_both_odd_after_cnn=on_sounds(odd, odd),
    two_audios_first_odd_after_cnn=on_sounds(odd, even),
    video_first_token_dropped=on_first_token,
)


@pytest.mark.parametrize("name", RESULTS)
def test_odd_setting(model, name):
    CHECKS[name](model)


# ---------------------------------------------------------------- nothing is skipped silently


def test_every_odd_setting_has_a_stated_behaviour():
    assert set(RESULTS) <= set(QUIRKS) == set(CHECKS)


def test_every_flag_has_a_reason():
    for flag in flagged():
        assert (
            all((flag.file, flag.entry, flag.field, flag.reason, flag.ours))
            and (GOLDEN / flag.file).exists()
        )


def test_every_file_is_read():
    """No recorded file without a test, whatever the folder: index files name the tensors, and this
    module names the index files."""
    source = open(__file__).read() + open(__file__.replace("test_golden", "golden")).read()
    for path in GOLDEN.iterdir():
        if not path.is_file():
            continue
        named = (
            path.name in source
            or any(path.name in p.read_text() for p in GOLDEN.glob("*_index.json"))
            or any(path.name in p.read_text() for p in GOLDEN.glob("*_ties.json"))
        )
        assert named, f"{path.name} is read by no test"
