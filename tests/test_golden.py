"""Parity with the recorded reference, file by file, and our own rule wherever an entry is set
apart.

The recorded cases are read from the folder named by SEATS_GOLDEN (default: tests/fixtures/golden).
What to leave out is decided by the fields of an entry
(golden.py), never by its name, so the same tests run on any folder with the same set of files,
whatever its seeds and shapes.
"""

from pathlib import Path
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
from seats_analysis.inputs.layout import MODALITIES
from seats_analysis.schedules.solve import Segments
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.pruning.select import query_scores, select_in_clip


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


SOLVED = [pytest.param(c, id=c["name"]) for c in index("schedule.json") if "outputs" in c]
REFUSED = "cannot be met|give an entering ratio"


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("case", SOLVED)
def test_ratios_agree_or_are_refused(case, modality):
    "The record is our rule with its strength clipped, in four decimals; ours does not clip."
    target, entering, drops, last, layers, ratios = recorded(case, modality)
    segments = Segments(layers, tuple(drops), last)
    if ratios:
        excess = entering * last - target * layers
        strength = np.clip(excess / (entering * segments.room), 0, 1)
        levels = np.maximum(entering * (1 - strength * np.r_[0, segments.shares]), 1e-12)
        assert ratios == pytest.approx(levels[1:] / levels[:-1], abs=5.1e-5)
    if is_feasible(target, entering, drops, last, layers):
        _, keep = segments.solve(target, entering=entering)
        assert keep == pytest.approx(ratios, abs=5.1e-5)
    else:
        with pytest.raises(ValueError, match=REFUSED):
            segments.solve(target, entering=entering)


@pytest.mark.parametrize("case", SOLVED)
def test_schedule_meets_the_target_or_refuses(case):
    rows = {m: recorded(case, m) for m in MODALITIES}
    targets = {m: row[0] for m, row in rows.items()}
    _, _, drops, last, layers, _ = rows["visual"]
    given = dict(targets, entering={m: row[1] for m, row in rows.items()})
    if all(is_feasible(*row[:5]) for row in rows.values()):
        plan = Schedule.solve(layers, drops, last, **given)
        assert {m: np.mean(plan.levels(m)) for m in MODALITIES} == pytest.approx(targets, abs=1e-9)
    else:
        with pytest.raises(ValueError, match=REFUSED):
            Schedule.solve(layers, drops, last, **given)


# ---------------------------------------------------------------- statistic


@pytest.mark.parametrize(
    "case", cases("attn_qk_index.json", "vision") + cases("attn_qk_index.json", "audio")
)
def test_statistic(case):
    t, tol = tensors(case), FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    width = case.get("window_tokens_patches") or case["window_frames"]
    stat = attention_received(t["q"], t["k"], window_sizes(len(t["q"]), width))
    if "window_index" in t:
        close(stat, t["patch_stat"], tol)
        merged = pool_groups(stat, case["spatial_merge_size"] ** 2)
        close(merged[t["window_index"].argsort()], t["merged_stat"], tol)
    else:
        close(stat, t["frame_stat"], tol)
        close(pool_groups(stat, 2), t["pooled_stat"], tol)


# ---------------------------------------------------------------- Stage I


WINDOWED = "windivprune_index.json"


@pytest.mark.parametrize("case", cases(WINDOWED, kind="batch"))
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


@pytest.mark.parametrize(
    "case", [c for kind in ("windows", *FILE_NAME.values()) for c in cases(WINDOWED, kind=kind)]
)
def test_diverse_windows(case):
    """Exact count in every window; the same tokens unless the window's closest decision was a near
    tie."""
    t, sizes = tensors(case), window_sizes(case["T"], case["window_tokens"])
    if case["kind"] == "windows":
        features, attention, golden = t["features"], t.get("attention"), t["keep_mask"]
    else:
        at = (t["input_ids"][0] == case[f"{case['kind']}_token_id"]).nonzero()[:, 0]
        features, attention = t["inputs_embeds"][0, at], t.get("attn_mean")
        golden = t["global_keep_mask"][at]
    counts = stage1_counts(sizes, case["ratio"])
    assert list(counts) == case["intended_per_window"]
    keep = select_in_clip(features, attention, sizes, counts)
    gaps = case["min_rel_gap_per_window"]
    for (start, end), count, gap in zip(case["windows"], counts, gaps, strict=True):
        assert int(keep[start:end].sum()) == count
        assert near(gap) or torch.equal(keep[start:end], golden[start:end].bool())


@pytest.mark.parametrize("case", cases("windivprune_ties.json"))
def test_diverse_ties(case):
    t, n = tensors(case), case["num_retained"]
    keep = select_in_clip(t["features"], t.get("attention"), [len(t["features"])], [n])
    assert int(keep.sum()) == n  # ours: exactly n distinct tokens, whatever the reference did
    if case["exact_arithmetic"]:
        assert keep.nonzero()[:, 0].tolist() == t["keep_indices"].tolist()


# ---------------------------------------------------------------- Stage II scores


def rms_norm(x, weight, eps):
    x = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps)
    return weight * x.to(weight.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def sectioned(table, section):
    "Qwen2.5's rotary table: block i of the frequencies follows axis i mod 3 (t, h, w)."
    return torch.cat([part[i % 3] for i, part in enumerate(table.split(list(section) * 2, -1))], -1)


@pytest.mark.parametrize("case", cases("qk_index.json"))
def test_query_scores(case):
    t, eps = tensors(case), case["rms_norm_eps"]
    tables = [t["cos"], t["sin"]]
    if t["cos"].dim() == 4:
        tables = [sectioned(table, case["mrope_section"]) for table in tables]
    hidden, heads = rms_norm(t["hidden_states"], t["input_layernorm.weight"], eps), []
    for name in "qk":
        x = torch.nn.functional.linear(
            hidden, t[f"{name}_proj.weight"], t.get(f"{name}_proj.bias")
        ).unflatten(-1, (-1, case["head_dim"]))
        if f"{name}_norm.weight" in t:
            x = rms_norm(x, t[f"{name}_norm.weight"], eps)
        heads.append(rotate(x.transpose(1, 2), *(table[:, None] for table in tables)))
    q, k = heads
    scores = query_scores(q[:, :, case["query_position"]], k)[0]
    close(scores, t["scores"], FLOAT32 if case["dtype"] == "float32" else BF16_SCORE)


# ---------------------------------------------------------------- Stage II choice


def per_window(keep, types, runs, kind, n):
    return [int((keep & (types == kind) & (runs == i)).sum()) for i in range(n)]


def more_windows_than_tokens(case):
    both = case["intended_video"] and case["intended_audio"]
    return both and max(case["intended_total"], 1) < case["n_windows"]


@pytest.mark.parametrize("case", cases("topdown_index.json"))
def test_stage2(case):
    t, tau = tensors(case), case["temperature"]
    scores, types, golden = t["scores"], t["token_type"], t["keep_mask"]
    runs, n = runs_of(types.tolist())
    assert n == case["n_windows"]
    sizes = [sum(case[f"{m}_sizes"]) for m in FILE_NAME.values()]
    ratios = [case[f"{m}_keep_ratio"] for m in FILE_NAME.values()]
    totals = stage2_counts(*sizes, *ratios)
    assert totals == (case["intended_video"], case["intended_audio"])
    keep = stage2(scores[None], types[None], runs[None], n, totals[:1], totals[1:], tau)[0]
    kept = [per_window(keep, types, runs, kind, n) for kind in (1, 2)]
    assert keep[types == 0].all()
    assert int(keep[types > 0].sum()) == case["intended_total"]  # ours: exact for every entry
    for found, m in zip(kept, FILE_NAME.values()):
        assert all(k <= s for k, s in zip(found, case[f"{m}_sizes"]))
    if more_windows_than_tokens(case):  # one in each of the best-scored windows
        shares = 0
        for kind in (1, 2):
            means = [scores[(types == kind) & (runs == i)].double().mean() for i in range(n)]
            shares = shares + torch.softmax(torch.stack(means) / tau, 0)
        best = set(shares.topk(case["intended_total"]).indices.tolist())
        assert [a + b for a, b in zip(*kept)] == [int(i in best) for i in range(n)]
    if case["total_mismatch"] or near(case.get("min_distance_to_rounding_tie")):
        return
    assert kept == [case[f"{m}_kept"] for m in FILE_NAME.values()]
    if case["tie_order_defined"]:
        assert keep.tolist() == golden.tolist()
    else:
        assert scores[keep].sort().values.tolist() == scores[golden].sort().values.tolist()


def test_there_are_entries_with_more_windows_than_tokens():
    assert any(map(more_windows_than_tokens, index("topdown_index.json")))


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


DROPS = [
    pytest.param(c, *total, id=f"{c.name}-{total[0].name}")
    for c in e2e_cases()
    for total in c.totals()
]


@pytest.mark.parametrize("case, stage, totals, planned", DROPS)
def test_drop_from_the_record(model, case, stage, totals, planned):
    """Scores through the decoder layer itself, from recorded hidden states: norm, projections and
    rotary tables of the model that transformers built. The choice from recorded scores, on the runs
    of the current sequence and the counts of the record: no later stage depends on an earlier one
    here."""
    here = case.stages[case.stages.index(stage) - 1].kept
    hidden = case.out[f"hidden.after_layer{stage.layer}.before_drop"][None]
    scores = case.out[f"scores.after_layer{stage.layer}"]
    types, decoder = case.types[here], Decoder(model)
    tables = decoder.rotary_tables(hidden, case.out["position_ids"][:, :, here])
    kinds = types[None].to(torch.int8)
    tokens = Tokens(here[None], kinds, None, None, len(case.types), (0,), False)
    layout = SimpleNamespace(chunk=torch.zeros(1, 1))  # not looked at
    seats = Seats(Schedule(len(decoder.layers)))
    prefill = Prefill(decoder, seats, "evict", layout, (), [], tokens, None)
    close(prefill.scores(stage.layer - 1, hidden, tables)[0], scores)
    runs, n = runs_of(types.tolist())
    keep = stage2(scores[None], types[None], runs[None], n, totals[:1], totals[1:])[0]
    assert keep[types == 0].all() and int(keep[types > 0].sum()) == sum(totals)
    if sum(totals) == sum(stage.media) and not near(stage.gap):
        assert torch.equal(here[keep], stage.kept)


# ---------------------------------------------------------------- end to end: through prune


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pruned(model, request):
    """Every case through `prune`. The record was made with sdpa; another implementation differs by
    rounding only."""
    before = model.config._attn_implementation
    model.set_attn_implementation(request.param)
    with torch.no_grad():
        runs = {case.name: run_pruned(model, case) for case in e2e_cases()}
    model.set_attn_implementation(before)
    return runs


@each_case
def test_pruned_from_start_to_end(case, pruned):
    """Statistic, features, positions, hidden states, scores, logits, caches and a decode step, as
    far as the choices before can be compared."""
    run, entry = pruned[case.name], pruned[case.name].seen["stage1"]
    close(entry.attention, torch.cat([case.out[f"{f}_attn_mean"] for f in FILE_NAME.values()]))
    embedded = case.out["inputs_embeds"]
    close(entry.features, torch.cat([embedded[case.types == kind] for kind in (1, 2)]))
    planned = {s.name: sum(ours) + s.counts["text"] for s, _, ours in case.totals()}
    planned["stage1"] = sum(case.stages[0].counts.values())
    text = case.types == 0
    for name, kept in run.kept.items():  # flagged or not
        assert len(kept) == planned.get(name, len(kept))
        assert (kept.diff() > 0).all() and torch.isin(text.nonzero()[:, 0], kept).all()
    assert planned.keys() <= run.kept.keys()
    comparable = case.comparable
    for stage in case.stages[: len(comparable) + 1]:
        kind = "drop" if stage.ratios else "late"
        if stage.layer:
            hidden = case.out[f"hidden.after_layer{stage.layer}.before_{kind}"]
            close_at_scale(run.hidden[stage.name], hidden)
        if stage.ratios:
            close(run.seen[stage.name][0], case.out[f"scores.after_layer{stage.layer}"])
        if stage.name in comparable:
            assert torch.equal(run.kept[stage.name], stage.kept), stage.name
    # evict: every layer ends with what the last one holds
    assert run.cache_lengths == [run.tokens_per_layer[-1]] * len(run.cache_lengths)
    if len(comparable) == len(case.stages):
        assert run.cache_lengths == case.out["seats.cache_lengths"].tolist()
        close_at_scale(run.logits, case.out["seats.last_logits"].flatten())
        close_at_scale(run.decode, case.out["seats.decode_logits"].flatten())


# ---------------------------------------------------------------- odd settings

RESULTS = index("e2e_quirks.json", "results")


def quirk_case():
    "Inputs of the odd settings: the first case that interleaves sound with video."
    return next(c for c in e2e_cases() if c.inputs["use_audio_in_video"])


BASE = quirk_base()
ENTERING = dict(visual=BASE.visual, audio=BASE.audio)


def quirk_plan(**changes):
    settings = dict(
        num_layers=BASE.layers,
        drop_layers=BASE.drops,
        late_start=BASE.late,
        entering=ENTERING,
        keep_ratios=dict.fromkeys(MODALITIES, BASE.ratios),
    )
    return Schedule(**settings | changes)


def lengths_of(model, **changes):
    "stage -> tokens left, in order; and the tokens of every layer."
    with prune(model, quirk_plan(**changes)) as run:
        model(**quirk_case().inputs)
    return {name: len(rows[0]) for name, rows in run.kept.items()}, run.tokens_per_layer[0].tolist()


def expected_lengths(plan, windows, text):
    """[stage, tokens after it], from the rule alone. windows: modality -> sizes of its time
    windows."""
    full = {m: sum(sizes) for m, sizes in windows.items()}
    n = {m: sum(stage1_counts(windows[m], plan.entering[m])) for m in MODALITIES}
    steps = [] if n == full else [("stage1", text + sum(n.values()))]
    for i, d in enumerate(plan.drop_layers):
        n = {m: min(n[m], max(1, round(plan.keep_ratios[m][i] * n[m]))) for m in MODALITIES}
        steps.append((f"drop{d}", text + sum(n.values())))
    return [*steps, (f"late{plan.late_start}", text)]


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


def works(model, inputs, **changes):
    "Every stage runs, with the planned number of tokens."
    plan, layout = quirk_plan(**changes), layout_of(model, inputs)
    text = int((layout.modality == 0).sum())
    with prune(model, plan) as run:
        logits = model(**inputs).logits
    found = [(name, len(rows[0])) for name, rows in run.kept.items()]
    assert found == expected_lengths(plan, window_tokens(layout)[0], text)
    assert torch.isfinite(logits).all()


def prompt(model, case, *media, lead=True):
    """A prompt with other media than the case: 'video', or the frames of a sound that is cut from
    the case's."""
    whole, special = case.inputs, read_json("e2e_index.json")["token_ids"]
    ids = whole["input_ids"][0]
    words = ids[~torch.isin(ids, torch.tensor(list(special.values())))].tolist()
    ids, inputs = words[:2] if lead else [], {}
    sounds = [medium for medium in media if medium != "video"]
    for medium in media:
        if medium == "video":
            body, around = [special["video"]] * int((case.types == 1).sum()), "vision"
            names = "pixel_values_videos", "video_grid_thw", "video_second_per_grid"
            inputs |= {k: whole[k] for k in names}
        else:
            (n,) = adapter_for(model).audio_tokens(model, [medium])
            body, around = [special["audio"]] * n, "audio"
        ids += [special[f"{around}_start"], *body, special[f"{around}_end"]] if ids else body
    if sounds:
        features = whole["input_features"]
        mask = (torch.arange(features.shape[2]) < torch.tensor(sounds)[:, None]).long()
        inputs |= dict(feature_attention_mask=mask, input_features=features * mask[:, None])
    ids = torch.tensor([ids + words[-3:]])
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not lead:  # stock positions look for the token before a video
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    return inputs


def frames(case):
    return int(case.inputs["feature_attention_mask"].sum())


def on_one_ratio_1(model):
    "The record does not say which of the two it was."
    plans = [{**ENTERING, m: 1.0} for m in MODALITIES]
    found = [lengths_of(model, entering=entering)[0] for entering in plans]
    assert sum(agrees(f, RESULTS["one_encoder_ratio_1"]) for f in found) == 1


def on_late_after_last(model):
    "The reference shortens the last layer's output; no layer is shorter for it."
    record = RESULTS["late_L_plus_1"]
    _, per_layer = lengths_of(model, late_start=BASE.layers)
    found, _ = lengths_of(model, late_start=None)
    assert agrees(found, {**record, "drops": record["drops"][:-1]})
    assert per_layer[-1] == found[f"drop{BASE.drops[-1]}"]


def on_sounds(*odd):
    "Two sounds, with or without a video; an odd one has an odd number of frames after the stride."

    def check(model):
        case = quirk_case()
        lengths = frames(case), frames(case) // 2
        cut = [n - n % 4 - 2 * is_odd for n, is_odd in zip(lengths, odd)]
        works(model, prompt(model, case, "video", *cut))
        works(model, prompt(model, case, *cut))

    return check


def on_media(model, name):
    case = quirk_case()
    media = dict(audio=[frames(case)], video=["video"])
    media = media.get(name[:5]) if "only" in name else ["video", frames(case)]
    works(model, prompt(model, case, *media, lead="first_token" not in name))


# our plans that are refused, those that give the recorded lengths, and those that work
NO = dict(
    drop_layer_after_late=[dict(drop_layers=(*BASE.drops[:-1], BASE.late + 1))],
    encoder_ratio_above_1=[dict(entering={**ENTERING, m: 1.05}) for m in MODALITIES],
    empty_ratio_lists_default_085=[
        dict(keep_ratios=dict.fromkeys(MODALITIES, short)) for short in ((), BASE.ratios[:-1])
    ],
    late_L_plus_2=[dict(late_start=BASE.layers + 1)],
)
SAME = dict(baseline={}, late_L_plus_2=dict(late_start=None), late_none=dict(late_start=None))
WORKS = dict(
    drop_layer_equals_late_minus_1=dict(drop_layers=(*BASE.drops[:-1], BASE.late)),
    both_encoder_ratios_1_disables_all=dict(entering=dict.fromkeys(MODALITIES, 1.0)),
)
CHECKS = dict(
    one_encoder_ratio_1=on_one_ratio_1,
    late_L_plus_1=on_late_after_last,
    two_audios_even=on_sounds(False, False),
    two_audios_both_odd_after_cnn=on_sounds(True, True),
    two_audios_first_odd_after_cnn=on_sounds(True, False),
)
MEDIA = {
    "audio_only_first_call",
    "audio_only_after_av_call",
    "video_only_first_call",
    "video_only_after_av_call",
    "video_first_token_dropped",
}


@pytest.mark.parametrize("name", RESULTS)
def test_odd_setting(model, name):
    for changes in NO.get(name, ()):
        with pytest.raises(ValueError, match="1.05" if "above_1" in name else None):
            quirk_plan(**changes)
    if name in SAME:
        found, _ = lengths_of(model, **SAME[name])
        assert agrees(found, RESULTS[name]), (found, RESULTS[name])
    if name in WORKS:
        works(model, quirk_case().inputs, **WORKS[name])
    if name in MEDIA:
        on_media(model, name)
    if name in CHECKS:
        CHECKS[name](model)


# ---------------------------------------------------------------- nothing is skipped silently


def test_every_odd_setting_has_a_stated_behaviour():
    assert set(RESULTS) <= set(QUIRKS) == {*NO, *SAME, *WORKS, *MEDIA, *CHECKS}


def test_every_flag_has_a_reason():
    for flag in flagged():
        assert all((flag.file, flag.entry, flag.field, flag.reason, flag.ours))
        assert (GOLDEN / flag.file).exists()


def test_every_file_is_read():
    """No recorded file without a test, whatever the folder: index files name the tensors, and this
    module names the index files."""
    source = open(__file__).read() + open(__file__.replace("test_golden", "golden")).read()
    for pattern in ("*_index.json", "*_ties.json"):
        source += "".join(path.read_text() for path in GOLDEN.glob(pattern))
    for path in filter(Path.is_file, GOLDEN.iterdir()):
        named = path.name in source
        assert named, f"{path.name} is read by no test"
