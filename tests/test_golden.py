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
    close,
    e2e_cases,
    e2e_model,
    flagged,
    index,
    is_feasible,
    label,
    near,
    quirk_base,
    recorded,
    run_pruned,
    runs_of,
    tensors,
)
from seats_analysis import Schedule, adapter_for, prune
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.encode import layout_of
from seats_analysis.pruning.base import Tokens, stage1_counts, window_tokens
from seats_analysis.pruning.encoders import pool_groups, window_sizes
from seats_analysis.pruning.prefill import Prefill
from seats_analysis.pruning.received import attention_received
from seats_analysis.pruning.seats import Seats
from seats_analysis.pruning.select import query_scores, select_in_clip
from seats_analysis.schedules.solve import Segments
from plain import stage2

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


def close_at_scale(a, b):
    """Through many layers rounding grows with the values: 1e-5 of the largest, but not less than
    1e-5. The parity notebook shows the numbers."""
    close(a, b, FLOAT32 * max(1.0, float(b.abs().max())))


# ---------------------------------------------------------------- schedule


def refused():
    return pytest.raises(ValueError, match="cannot be met|give an entering ratio")


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
        with refused():
            segments.keep_ratios(target, entering=entering)


@pytest.mark.parametrize("case", SOLVED)
def test_schedule_meets_the_target_or_refuses(case):
    asked = {m: recorded(case, m)[:5] for m in MODALITIES}
    targets, entering, (drops, _), (last, _), (layers, _) = zip(*asked.values())
    build = lambda: Schedule.solve(
        layers, drops, last, *targets, entering=dict(zip(MODALITIES, entering))
    )
    if all(is_feasible(*one) for one in asked.values()):
        means = [np.mean(build().levels(m)) for m in MODALITIES]
        assert means == pytest.approx(targets, abs=1e-9)
    else:
        with refused():
            build()


# ---------------------------------------------------------------- statistic


@pytest.mark.parametrize("case", cases("attn_qk_index.json", "vision"))
def test_vision_statistic(case):
    t = tensors(case)
    tol = FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    sizes = window_sizes(len(t["q"]), case["window_tokens_patches"])
    stat = attention_received(t["q"], t["k"], sizes)
    close(stat, t["patch_stat"], tol)
    merged = pool_groups(stat, case["spatial_merge_size"] ** 2)
    close(merged[t["window_index"].argsort()], t["merged_stat"], tol)


@pytest.mark.parametrize("case", cases("attn_qk_index.json", "audio"))
def test_audio_statistic(case):
    t = tensors(case)
    tol = FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    stat = attention_received(t["q"], t["k"], window_sizes(case["T"], case["window_frames"]))
    close(stat, t["frame_stat"], tol)
    close(pool_groups(stat, 2), t["pooled_stat"], tol)


# ---------------------------------------------------------------- Stage I


@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="batch"))
def test_diverse_batch(case):
    t = tensors(case)
    n = min(case["num_retained"], case["N"])
    B, N = t["features"].shape[:2]
    attention = t["attention"].flatten() if "attention" in t else None
    flat = t["features"].flatten(0, 1), attention, [N] * B
    keep = [select_in_clip(*flat, [count] * B).view(B, N) for count in range(n + 1)]
    assert all(k.sum(1).tolist() == [count] * B for count, k in enumerate(keep))
    gaps = case["min_rel_gap_per_row"] or [None] * B
    for row in range(B):
        if near(gaps[row]):
            continue
        assert keep[n][row].nonzero()[:, 0].tolist() == t["keep_indices"][row].tolist()
        added = [(more & ~less)[row].nonzero().tolist() for less, more in zip(keep, keep[1:])]
        if "greedy_order" in t:
            assert added == [[[i]] for i in t["greedy_order"][row].tolist()]


def check_windows(case, features, attention, golden):
    """Exact count in every window; the same tokens unless the window's closest decision was a near
    tie."""
    sizes = window_sizes(case["T"], case["window_tokens"])
    counts = stage1_counts(sizes, case["ratio"])
    assert list(counts) == case["intended_per_window"]
    keep = select_in_clip(features, attention, sizes, counts)
    gaps = case["min_rel_gap_per_window"]
    for (start, end), count, gap in zip(case["windows"], counts, gaps, strict=True):
        assert int(keep[start:end].sum()) == count
        if not near(gap):
            assert keep[start:end].tolist() == golden[start:end].tolist()


@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="windows"))
def test_diverse_windows(case):
    t = tensors(case)
    check_windows(case, t["features"], t.get("attention"), t["keep_mask"])


@pytest.mark.parametrize(
    "case",
    cases("windivprune_index.json", kind="video") + cases("windivprune_index.json", kind="audio"),
)
def test_diverse_modality(case):
    t = tensors(case)
    at = t["input_ids"][0] == case[f"{case['kind']}_token_id"]
    check_windows(case, t["inputs_embeds"][0, at], t.get("attn_mean"), t["global_keep_mask"][at])


@pytest.mark.parametrize("case", cases("windivprune_ties.json"))
def test_diverse_ties(case):
    t = tensors(case)
    n = case["num_retained"]
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
    close(scores, t["scores"], FLOAT32 if case["dtype"] == "float32" else BF16_SCORE)


# ---------------------------------------------------------------- Stage II choice


def chosen(case, t, totals):
    "What ours keeps: the mask, and how many of each run; visual, then audio."
    types = t["token_type"]
    runs, n = runs_of(types.tolist())
    assert n == case["n_windows"]
    given = t["scores"][None], types[None], runs[None], n
    keep = stage2(*given, totals[:1], totals[1:], case["temperature"])[0]
    kept = [[int((keep & (types == k) & (runs == i)).sum()) for i in range(n)] for k in (1, 2)]
    return keep, kept, runs


@pytest.mark.parametrize("case", cases("topdown_index.json"))
def test_stage2(case):
    t = tensors(case)
    scores, golden, text = t["scores"], t["keep_mask"], t["token_type"] == 0
    sizes = case["video_sizes"], case["audio_sizes"]
    ratios = case["video_keep_ratio"], case["audio_keep_ratio"]
    totals = tuple(stage1_counts((sum(n),), r)[0] for n, r in zip(sizes, ratios))
    assert totals == (case["intended_video"], case["intended_audio"])
    keep, kept, _ = chosen(case, t, totals)
    assert keep[text].all()
    assert int(keep[~text].sum()) == case["intended_total"]  # ours: exact for every entry
    assert all(k <= n for pair in zip(kept, sizes) for k, n in zip(*pair))
    if case["total_mismatch"] or near(case.get("min_distance_to_rounding_tie")):
        return
    assert kept == [case["video_kept"], case["audio_kept"]]
    if case["tie_order_defined"]:
        assert keep.tolist() == golden.tolist()
    else:
        assert scores[keep].sort().values.tolist() == scores[golden].sort().values.tolist()


def is_short(case):
    "Of both modalities together, fewer tokens than windows."
    some = case["intended_video"] and case["intended_audio"]
    return some and case["n_windows"] > max(case["intended_total"], 1)


@pytest.mark.parametrize("case", [c for c in index("topdown_index.json") if is_short(c)], ids=label)
def test_stage2_fewer_tokens_than_windows(case):
    "One token in each of the best-scored windows, none in the others."
    t = tensors(case)
    total, n = case["intended_total"], case["n_windows"]
    _, kept, runs = chosen(case, t, (case["intended_video"], case["intended_audio"]))
    share = 0
    for kind in (1, 2):
        own = [t["scores"][(t["token_type"] == kind) & (runs == i)].double() for i in range(n)]
        share += torch.softmax(torch.stack([x.mean() for x in own]) / case["temperature"], 0)
    both = [sum(pair) for pair in zip(*kept)]
    assert sorted(both) == [0] * (n - total) + [1] * total
    assert {i for i in range(n) if both[i]} == set(share.topk(total).indices.tolist())


def test_some_recorded_entries_are_short():
    assert any(map(is_short, index("topdown_index.json")))


# ---------------------------------------------------------------- end to end: the untouched model


@pytest.fixture(scope="module", params=e2e_cases(), ids=lambda c: c.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    return e2e_model()


def next_position(case):
    return case.inputs["input_ids"].shape[1] + case.out["rope_deltas"].view(1)


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


def test_stage1_from_recorded_features(model, case):
    layout = layout_of(model, case.inputs)
    sizes = window_tokens(layout)[0]
    found = case.types == 0
    for kind, (m, f) in enumerate(FILE_NAME.items(), 1):
        counts = stage1_counts(sizes[m], case.seats[f"{f}_encoder_ratio"])
        features = case.out["inputs_embeds"][case.types == kind]
        attention = case.out[f"{f}_attn_mean"]
        found[case.types == kind] = select_in_clip(features, attention, sizes[m], counts)
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
    here = before(case, stage)
    hidden = case.out[f"hidden.after_layer{stage.layer}.before_drop"][None]
    decoder = Decoder(model)
    tables = decoder.rotary_tables(hidden, case.out["position_ids"][:, :, here])
    tokens = Tokens(
        here[None], case.types[here][None].to(torch.int8), None, None, len(case.types), (0,), False
    )
    layout = SimpleNamespace(chunk=torch.zeros(1, 1))  # not looked at
    seats = Seats(Schedule(len(decoder.layers)))
    prefill = Prefill(decoder, seats, "evict", layout, (), [], tokens, None)
    prefill.tables = tables
    scores = prefill.scores(stage.layer - 1, hidden, {})[0]
    close(scores, case.out[f"scores.after_layer{stage.layer}"])


@pytest.mark.parametrize("case, stage", DROPS)
def test_drop_from_recorded_scores(case, stage):
    """The choice alone, on the runs of the current sequence and the counts of the record: no later
    stage depends on an earlier one here."""
    here = before(case, stage)
    totals = next(recorded for s, recorded, _ in case.totals() if s is stage)
    types = case.types[here]
    scores = case.out[f"scores.after_layer{stage.layer}"]
    runs, n = runs_of(types.tolist())
    keep = stage2(scores[None], types[None], runs[None], n, totals[:1], totals[1:])[0]
    assert keep[types == 0].all() and int(keep[types > 0].sum()) == sum(totals)
    if sum(totals) == stage.counts["video"] + stage.counts["audio"] and not near(stage.gap):
        assert torch.equal(here[keep], stage.kept)


# ---------------------------------------------------------------- end to end: through prune


@pytest.fixture(scope="module")
def run(model, case):
    return run_pruned(model, case)


def check_kept(run, case):
    for stage in case.stages:
        if stage.name in case.comparable:
            assert torch.equal(run.kept[stage.name], stage.kept), stage.name


def test_same_statistic_and_features(case, run):
    "What stage I saw inside the pruned forward pass."
    entry = run.seen["stage1"]
    close(entry.attention, torch.cat([case.out[f"{f}_attn_mean"] for f in FILE_NAME.values()]))
    media = [case.out["inputs_embeds"][case.types == kind] for kind in (1, 2)]
    close(entry.features, torch.cat(media))


def test_same_kept_positions_after_every_stage(case, run):
    check_kept(run, case)
    planned = dict(stage1=sum(case.stages[0].counts.values())) | {
        s.name: sum(ours) + s.counts["text"] for s, _, ours in case.totals()
    }
    for name, n in planned.items():
        assert len(run.kept[name]) == n  # flagged or not
    for kept in run.kept.values():
        assert (kept.diff() > 0).all()
        assert torch.isin((case.types == 0).nonzero(), kept).all()


def test_same_hidden_states_and_scores(case, run):
    for earlier, stage in zip(case.stages, case.stages[1:]):
        if earlier.name not in case.comparable:
            break
        kind = "drop" if stage.ratios else "late"
        recorded = case.out[f"hidden.after_layer{stage.layer}.before_{kind}"]
        close_at_scale(run.hidden[stage.name], recorded)
        if stage.ratios:
            close(run.seen[stage.name][0], case.out[f"scores.after_layer{stage.layer}"])


def test_same_logits_and_decode_step(case, run):
    # evict: every layer ends with what the last one holds
    assert set(run.cache_lengths) == {run.tokens_per_layer[-1]}
    if len(case.comparable) < len(case.stages):
        return
    assert run.cache_lengths == case.out["seats.cache_lengths"].tolist()
    close_at_scale(run.logits, case.out["seats.last_logits"].flatten())
    close_at_scale(run.decode, case.out["seats.decode_logits"].flatten())


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
    steps = {}
    if n != {m: sum(windows[m]) for m in MODALITIES}:
        steps["stage1"] = text + sum(n.values())
    for i, d in enumerate(plan.drop_layers):
        n = {m: min(n[m], max(1, round(plan.keep_ratios[m][i] * n[m]))) for m in MODALITIES}
        steps[f"drop{d}"] = text + sum(n.values())
    if plan.late_start < plan.num_layers:
        steps[f"late{plan.late_start}"] = text
    return steps


def agrees(found, record):
    """Ours against the recorded [layer, length] pairs. Totals of later drops follow from counts
    that ours plans and the reference finds: each may round otherwise."""
    names = [name for name in found if name != "stage1"]
    off = [abs(found[name] - n) for name, (_, n) in zip(names, record["drops"])]
    return (
        [name.lstrip("droplate") for name in names] == [str(l + 1) for l, _ in record["drops"]]
        and off[0] == off[-1] == 0
        and all(difference <= i for i, difference in enumerate(off))
    )


def same_as_recorded(model, name, **changes):
    found, _ = lengths_of(model, quirk_plan(**changes), quirk_case().inputs)
    assert agrees(found, RESULTS[name]), (found, RESULTS[name])


def works(model, inputs, plan=None):
    "Every stage runs, with the planned number of tokens."
    plan = plan or quirk_plan()
    layout = layout_of(model, inputs)
    text = int((layout.modality == 0).sum())
    with prune(model, plan) as run:
        logits = model(**inputs).logits
    lengths = {name: len(rows[0]) for name, rows in run.kept.items()}
    assert lengths == expected_lengths(plan, window_tokens(layout)[0], text)
    assert torch.isfinite(logits).all()
    return run


def prompt(model, case, *media, lead=True):
    """A prompt with other media than the case: 'video', or the frames of a sound that is cut from
    the case's."""
    token = index("e2e_index.json", "token_ids")
    ids = case.inputs["input_ids"][0]
    words = ids[~torch.isin(ids, torch.tensor(list(token.values())))].tolist()
    ids = words[:2] if lead else []
    inputs = {}
    sounds = []
    for medium in media:
        if medium == "video":
            body = [token["video"]] * int((case.types == 1).sum())
            kind = "vision"
            names = "pixel_values_videos", "video_grid_thw", "video_second_per_grid"
            inputs |= {k: case.inputs[k] for k in names}
        else:
            body = [token["audio"]] * adapter_for(model).audio_tokens(model, [medium])[0]
            kind = "audio"
            sounds.append(medium)
        if lead or ids:
            body = [token[f"{kind}_start"], *body, token[f"{kind}_end"]]
        ids += body
    if sounds:
        features = case.inputs["input_features"].expand(len(sounds), -1, -1)
        heard = torch.arange(features.shape[2]) < torch.tensor(sounds)[:, None]
        inputs |= dict(
            feature_attention_mask=heard.long(), input_features=features * heard[:, None]
        )
    ids = torch.tensor([ids + words[-3:]])
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not lead:  # stock positions look for the token before a video
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
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
    (drop, dropped), (late, left) = list(run.kept.items())[-2:]
    assert (drop, late) == (f"drop{base.late}", f"late{base.late}")
    assert len(left[0]) < len(dropped[0])


def on_drop_after_late(model):
    base = quirk_base()
    with pytest.raises(ValueError):
        quirk_plan(drop_layers=(*base.drops[:-1], base.late + 1))


def on_no_stage1(model):
    plan = quirk_plan(entering=dict(visual=1.0, audio=1.0))
    run = works(model, quirk_case().inputs, plan)
    assert "stage1" not in run.kept and len(run.kept) == len(plan.drop_layers) + 1


def on_one_ratio_1(model):
    entering = quirk_plan().entering
    plans = [quirk_plan(entering={**entering, m: 1.0}) for m in MODALITIES]
    found = [lengths_of(model, plan, quirk_case().inputs)[0] for plan in plans]
    # the record does not say which of the two it was
    assert sum(agrees(f, RESULTS["one_encoder_ratio_1"]) for f in found) == 1


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
    base = quirk_base()
    record = RESULTS["late_L_plus_1"]
    _, per_layer = lengths_of(model, quirk_plan(late_start=base.layers), quirk_case().inputs)
    found, _ = lengths_of(model, quirk_plan(late_start=None), quirk_case().inputs)
    assert agrees(found, record | dict(drops=record["drops"][:-1]))
    assert per_layer[-1] == found[f"drop{base.drops[-1]}"]


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
        sounds = [f(n) for f, n in zip(cut, (frames(case), frames(case) // 2))]
        for media in (("video",), ()):
            works(model, prompt(model, case, *media, *sounds))

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
        assert all((flag.file, flag.entry, flag.field, flag.reason, flag.ours))
        assert (GOLDEN / flag.file).exists()


def test_every_file_is_read():
    """No recorded file without a test, whatever the folder: index files name the tensors, and this
    module names the index files."""
    source = open(__file__).read() + open(__file__.replace("test_golden", "golden")).read()
    lists = [*GOLDEN.glob("*_index.json"), *GOLDEN.glob("*_ties.json")]
    source += "".join(path.read_text() for path in lists)
    for path in GOLDEN.iterdir():
        assert path.is_dir() or path.name in source, f"{path.name} is read by no test"
