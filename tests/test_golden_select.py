"""Token selection: parity with the recorded reference, our own rules where they differ, and properties on random input.

The recorded cases are read from the folder named by SEATS_GOLDEN (default: tests/fixtures/golden). What to leave out is decided
by the fields of an entry, never by its name, so the same tests run on any folder with the same set of files.
"""
import json, math, os, random, re
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from seats_analysis.select import (attention_received, diverse_order, kept_positions, plan_budgets, pool_groups, query_scores,
    select_diverse, select_in_clip, select_in_windows, stage1_counts, stage2_counts, topk_in_groups, undo_order, water_fill, window_sizes)

GOLDEN = Path(os.environ.get("SEATS_GOLDEN") or Path(__file__).parent/"fixtures"/"golden")
NEAR_TIE = 2e-5 # closer decisions than this depend on the order of summation
FLOAT32, BF16_STATISTIC, BF16_SCORE = 1e-5, 1e-2, 2e-3

def index(name, key="cases"): return json.loads((GOLDEN/name).read_text())[key]

def tensors(case, folder={}):
    "The tensors of one index entry, without its prefix."
    if case["file"] not in folder: folder[case["file"]] = load_file(GOLDEN/case["file"])
    p = case["prefix"]
    return {k.removeprefix(p): v for k, v in folder[case["file"]].items() if k.startswith(p)}

def near(gap): return gap is not None and gap < NEAR_TIE
def cases(name, key="cases", **where):
    return [pytest.param(c, id=c["prefix"]+c.get("name", "")) for c in index(name, key) if all(c[k] == v for k, v in where.items())]

# ---------------------------------------------------------------- statistic

@pytest.mark.parametrize("case", cases("attn_qk_index.json", "vision"))
def test_vision_statistic(case):
    t, tol = tensors(case), FLOAT32 if case["dtype"] == "float32" else BF16_STATISTIC
    stat = attention_received(t["q"], t["k"], window_sizes(len(t["q"]), case["window_tokens_patches"]))
    torch.testing.assert_close(stat, t["patch_stat"].float(), atol=tol, rtol=0)
    merged = undo_order(pool_groups(stat, case["spatial_merge_size"]**2), t["window_index"])
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
    keep = select_diverse(features, attention, n)
    assert keep.sum(1).tolist() == [n]*case["B"]
    order = diverse_order(features, attention, n)
    gaps = case["min_rel_gap_per_row"] or [None]*case["B"]
    for row in range(case["B"]):
        if near(gaps[row]): continue
        assert kept_positions(keep, n)[row].tolist() == t["keep_indices"][row].tolist()
        if "greedy_order" in t: assert order[row].tolist() == t["greedy_order"][row].tolist()

def check_windows(case, keep, golden):
    "Exact count in every window; the same tokens unless the window's closest decision was a near tie."
    for (start, end), count, gap in zip(case["windows"], case["intended_per_window"], case["min_rel_gap_per_window"]):
        assert int(keep[start:end].sum()) == count
        if not near(gap): assert keep[start:end].tolist() == golden[start:end].tolist()

@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="windows"))
def test_diverse_windows(case):
    t, sizes = tensors(case), window_sizes(case["T"], case["window_tokens"])
    counts = stage1_counts(sizes, case["ratio"])
    assert list(counts) == case["intended_per_window"]
    check_windows(case, select_in_clip(t["features"], t.get("attention"), sizes, counts), t["keep_mask"])

@pytest.mark.parametrize("case", cases("windivprune_index.json", kind="video") + cases("windivprune_index.json", kind="audio"))
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
    attention = t["attention"][None] if "attention" in t else None
    keep = select_diverse(t["features"][None], attention, n)[0]
    assert int(keep.sum()) == n # ours: exactly n distinct tokens, whatever the reference did
    if case["exact_arithmetic"]: assert kept_positions(keep, n).tolist() == t["keep_indices"].tolist()

# ---------------------------------------------------------------- Stage II scores

def rms_norm(x, weight, eps):
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)

def rotate(x, cos, sin): return x*cos + torch.cat((-x[..., x.shape[-1]//2:], x[..., :x.shape[-1]//2]), -1)*sin

def sectioned(table, section):
    "Qwen2.5's rotary table: block i of the frequencies follows axis i mod 3 (t, h, w)."
    return torch.cat([part[i % 3] for i, part in enumerate(table.split(list(section)*2, -1))], -1)

def projected(t, case):
    "Query and key heads (1, S, heads, d) of one recorded layer."
    hidden = rms_norm(t["hidden_states"], t["input_layernorm.weight"], case["rms_norm_eps"])
    for name in "qk":
        x = torch.nn.functional.linear(hidden, t[f"{name}_proj.weight"], t.get(f"{name}_proj.bias")).unflatten(-1, (-1, case["head_dim"]))
        yield rms_norm(x, t[f"{name}_norm.weight"], case["rms_norm_eps"]) if f"{name}_norm.weight" in t else x

@pytest.mark.parametrize("case", cases("qk_index.json"))
def test_query_scores(case):
    t = tensors(case)
    cos, sin = (sectioned(t[n], case["mrope_section"]) if t[n].dim() == 4 else t[n] for n in ("cos", "sin"))
    q, k = (rotate(x.transpose(1, 2), cos[:, None], sin[:, None]) for x in projected(t, case))
    scores = query_scores(q[:, :, case["query_position"]], k)[0]
    tol = FLOAT32 if case["dtype"] == "float32" else BF16_SCORE
    torch.testing.assert_close(scores, t["scores"].float(), atol=tol, rtol=0)

# ---------------------------------------------------------------- Stage II choice

def runs_of(types):
    "Ordinal of each token's run of consecutive same-modality tokens, -1 for text; and how many windows that makes."
    ids, seen, last = [], {1: 0, 2: 0}, 0
    for kind in types:
        if kind in seen and kind != last: seen[kind] += 1
        ids.append(seen[kind]-1 if kind in seen else -1)
        last = kind
    return torch.tensor(ids), max(seen.values())

def per_window(keep, types, runs, kind, n): return [int((keep & (types == kind) & (runs == i)).sum()) for i in range(n)]

@pytest.mark.parametrize("case", cases("topdown_index.json"))
def test_stage2(case):
    t = tensors(case)
    scores, types, golden = t["scores"], t["token_type"], t["keep_mask"]
    runs, n = runs_of(types.tolist())
    assert n == case["n_windows"]
    totals = stage2_counts(sum(case["video_sizes"]), sum(case["audio_sizes"]), case["video_keep_ratio"], case["audio_keep_ratio"])
    assert totals == (case["intended_video"], case["intended_audio"])
    keep = select_in_windows(scores[None], types[None], runs[None], n, totals[:1], totals[1:], case["temperature"])[0]
    assert keep[types == 0].all()
    assert int(keep[types > 0].sum()) == case["intended_total"] # ours: exact for every entry
    for kind, field in ((1, "video_sizes"), (2, "audio_sizes")):
        assert all(k <= s for k, s in zip(per_window(keep, types, runs, kind, n), case[field]))
    if case["total_mismatch"] or near(case.get("min_distance_to_rounding_tie")): return
    for kind, field in ((1, "video_kept"), (2, "audio_kept")): assert per_window(keep, types, runs, kind, n) == case[field]
    if case["tie_order_defined"]: assert keep.tolist() == golden.tolist()
    else: assert scores[keep].sort().values.tolist() == scores[golden].sort().values.tolist()

def test_stage2_fewer_tokens_than_windows():
    "Recorded entries with more windows than tokens: one token in each of the best-scored windows, none in the others."
    seen = 0
    for case in index("topdown_index.json"):
        total, n = case["intended_total"], case["n_windows"]
        if total >= n or n < 2 or not (case["intended_video"] and case["intended_audio"]): continue
        t = tensors(case)
        runs, _ = runs_of(t["token_type"].tolist())
        totals = [case["intended_video"]], [case["intended_audio"]]
        keep = select_in_windows(t["scores"][None], t["token_type"][None], runs[None], n, *totals, case["temperature"])[0]
        kept = [a+b for a, b in zip(*(per_window(keep, t["token_type"], runs, kind, n) for kind in (1, 2)))]
        share = sum(torch.softmax(torch.stack([t["scores"][(t["token_type"] == m) & (runs == i)].double().mean()
                    for i in range(n)])/case["temperature"], 0) for m in (1, 2))
        assert sorted(kept) == [0]*(n-total) + [1]*total
        assert {i for i in range(n) if kept[i]} == set(share.topk(total).indices.tolist())
        seen += 1
    assert seen # the recorded set holds such entries

# ---------------------------------------------------------------- against plain loops

def naive_order(features, attention, steps):
    "One window, one token at a time, as the formula reads; the closest distance between best and second best is returned too."
    u = features.double()/(features.double().norm(dim=1, keepdim=True) + 1e-8)
    d = 1 - u @ u.T
    if attention is not None: d = d * (attention.double()*1e6)
    gap, chosen, slack = [sorted(d[:, j].tolist())[min(1, len(d)-1)] for j in range(len(d))], [], math.inf
    for _ in range(steps):
        free = sorted((j for j in range(len(d)) if j not in chosen), key=lambda j: (-gap[j], j))
        if len(free) > 1: slack = min(slack, (gap[free[0]]-gap[free[1]])/max(abs(gap[free[0]]), 1e-12))
        pick = free[0]
        gap = [float(d[pick, j]) if not chosen else min(gap[j], float(d[pick, j])) for j in range(len(d))]
        chosen.append(pick)
    return chosen, slack

def naive_repair(budget, cap, total):
    "One token at a time till the sum is right."
    budget = list(budget)
    while sum(budget) > total and max(budget) > 1: budget[budget.index(max(budget))] -= 1
    while sum(budget) < total:
        room = [b for b, c in zip(budget, cap) if b < c]
        i = next(i for i, (b, c) in enumerate(zip(budget, cap)) if b < c and b == min(room))
        budget[i] += 1
    return budget

def naive_split(b, f, size_v, size_a):
    "Visual and audio part of one window's budget, with the published floors."
    v = min(round(b*f), size_v)
    a = min(b-v, size_a)
    v += min(b-v-a, size_v-v)
    a += min(b-v-a, size_a-a)
    if size_v and v < 1: v, a = 1, max(1, min(size_a, b-1)) if a > 1 else a
    if size_a and a < 1: a, v = 1, max(1, min(size_v, b-1)) if v > 1 else v
    return v, a

def softmax(x, tau):
    e = [math.exp((v-max(x))/tau) for v in x]
    return [v/sum(e) for v in e]

def naive_budgets(mean_v, mean_a, size_v, size_a, t_v, t_a, tau):
    "The published plan of one step, token by token."
    p_v, p_a = softmax(mean_v, tau), softmax(mean_a, tau)
    cap = [v+a for v, a in zip(size_v, size_a)]
    budget = [min(max(round((t_v+t_a)*(x+y)/2), 1), c) for x, y, c in zip(p_v, p_a, cap)]
    budget = naive_repair(budget, cap, t_v+t_a)
    split = [x*t_v/(x*t_v + y*t_a + 1e-12) for x, y in zip(p_v, p_a)]
    return [naive_split(*row) for row in zip(budget, split, size_v, size_a)]

@pytest.mark.parametrize("seed", range(6))
def test_batched_windows_equal_one_by_one(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 24, (7,), generator=g).tolist()
    counts = [int(torch.randint(0, s+1, (1,), generator=g)) for s in sizes]
    features, attention = torch.randn(7, 24, 12, generator=g), torch.rand(7, 24, generator=g) if seed % 2 else None
    keep = select_diverse(features, attention, counts, sizes) # what lies in the padding must not matter
    for i, (size, count) in enumerate(zip(sizes, counts)):
        order, slack = naive_order(features[i, :size], None if attention is None else attention[i, :size], count)
        assert int(keep[i].sum()) == count and not keep[i, size:].any()
        if slack > 1e-4: assert keep[i].nonzero()[:, 0].tolist() == sorted(order)

@pytest.mark.parametrize("seed", range(20))
def test_selection_is_exact_among_duplicates(seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 5, generator=g)*10**float(torch.randint(-6, 6, (1,), generator=g))
    features = base[torch.randint(0, 3, (4, 30), generator=g)] + (1e-7*torch.randn(4, 30, 5, generator=g) if seed % 2 else 0)
    n = [int(x) for x in torch.randint(0, 31, (4,), generator=g)]
    keep = select_diverse(features, 1e5*torch.rand(4, 30, generator=g), n)
    assert keep.sum(1).tolist() == n

@pytest.mark.parametrize("seed", range(200))
def test_water_level_equals_the_one_at_a_time_repair(seed):
    r = random.Random(seed)
    cap = [r.randint(1, 30) for _ in range(r.randint(1, 12))]
    budget = [r.randint(1, c) for c in cap]
    total = r.randint(len(cap), sum(cap))
    few = sum(budget) < total
    low, high = (budget, cap) if few else ([1]*len(cap), budget)
    priority = [-i if few else i for i in range(len(cap))]
    got = water_fill(*(torch.tensor([x]) for x in (low, high, [total], priority)))[0].tolist()
    assert got == naive_repair(budget, cap, total)

@pytest.mark.parametrize("seed", range(200))
def test_budgets_equal_the_published_plan_where_it_is_exact(seed):
    r = random.Random(seed)
    w, tau = r.randint(1, 10), r.choice([.003, .03, .1, .3])
    size_v, size_a = ([r.randint(low, 30) for _ in range(w)] for low in r.choice([(1, 1), (0, 1), (1, 0)]))
    if not sum(size_v) or not sum(size_a): pytest.skip("one modality only: a plain top-k")
    t_v, t_a = r.randint(1, sum(size_v)), r.randint(1, sum(size_a))
    mean_v, mean_a = ([r.random()*.1 if s else 0. for s in size] for size in (size_v, size_a))
    v, a = plan_budgets(*(torch.tensor([x]).double() for x in (mean_v, mean_a)), torch.tensor([size_v]), torch.tensor([size_a]), [t_v], [t_a], tau)
    v, a = v[0].tolist(), a[0].tolist()
    assert sum(v) + sum(a) == t_v + t_a
    assert all(0 <= x <= s for x, s in zip(v+a, size_v+size_a))
    plain = naive_budgets(mean_v, mean_a, size_v, size_a, t_v, t_a, tau)
    if sum(map(sum, plain)) == t_v + t_a: assert list(zip(v, a)) == plain

def random_batch(r, samples):
    "Interleaved samples of unequal length, left-padded, some runs empty; scores of any shape."
    rows = []
    for _ in range(samples):
        runs = [(kind, w) for w in range(5) for kind in (1, 2) for _ in range(r.randint(0, 7))]
        rows.append([(0, -1)] + runs + [(0, -1)])
    width = max(map(len, rows))
    rows = [[(-1, -1)]*(width-len(row)) + row for row in rows]
    return (torch.tensor([[x[i] for x in row] for row in rows]) for i in (0, 1))

@pytest.mark.parametrize("seed", range(60))
def test_stage2_is_exact_on_any_batch(seed):
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    modality, window = random_batch(r, 4)
    counts = [[int((row == m).sum()) for row in modality] for m in (1, 2)]
    totals = [[min(n, max(1, round(r.random()*n))) for n in side] for side in counts]
    scores = torch.rand(modality.shape, generator=g)*10.**r.randint(-6, 3)
    if seed % 4 == 1: scores = torch.zeros_like(scores)
    if seed % 4 == 2: scores = scores.bfloat16()
    if seed % 4 == 3: scores[torch.rand(scores.shape, generator=g) < .2] = torch.nan # prune refuses these; the counts hold all the same
    args = 5, *totals, r.choice([1e-4, .1, .3]), bool(seed % 2)
    keep = select_in_windows(scores, modality, window, *args)
    assert (keep & (modality > 0)).sum(1).tolist() == [v+a for v, a in zip(*totals)]
    assert keep[modality <= 0].all()
    for i in range(4): # one by one: the same choice
        alone = select_in_windows(scores[i:i+1], modality[i:i+1], window[i:i+1], 5, totals[0][i:i+1], totals[1][i:i+1], *args[3:])
        assert torch.equal(alone[0], keep[i])

@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale_free", (False, True))
def test_an_emptied_window_takes_no_part(seed, scale_free):
    "Window ids are fixed on the full sequence: a run that an earlier drop emptied leaves a gap, and the gap changes nothing."
    g = torch.Generator().manual_seed(seed)
    modality = torch.tensor([[1, 1, 2]*32])
    window = torch.arange(4).repeat_interleave(24)[None]
    scores = torch.rand(1, 96, generator=g) * torch.rand(1, 4, generator=g)[0, window] # some windows matter more
    args = (24,), (12,), .1, scale_free
    dense = select_in_windows(scores, modality, window, 4, *args)
    gaps = select_in_windows(scores, modality, torch.tensor([1, 2, 5, 6])[window], 9, *args)
    assert torch.equal(dense, gaps)

@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_are_the_best_of_their_group(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (3, 40), generator=g).float() # many ties
    group, budget = torch.randint(0, 5, (3, 40), generator=g), torch.randint(0, 9, (3, 4), generator=g)
    keep = topk_in_groups(scores, group, budget)
    for b in range(3):
        best = lambda i: (-float(scores[b, i]), i)
        for k in range(4):
            members = sorted((i for i in range(40) if group[b, i] == k), key=best)
            assert sorted(members[:int(budget[b, k])]) == [i for i in range(40) if keep[b, i] and group[b, i] == k]
        assert not keep[b, group[b] == 4].any()

# ---------------------------------------------------------------- no host sync

def public_calls():
    "Each tensor function of the module, once, on small inputs."
    tokens, stat, heads = torch.rand(40, 8), torch.rand(40), torch.rand(40, 2, 4)
    modality, scores, size = torch.tensor([[0] + [1]*6 + [2]*4]*2), torch.rand(2, 11), torch.full((2, 1), 6)
    window = torch.zeros_like(modality)
    return dict(
        attention_received=lambda: attention_received(heads, heads, (16, 16, 8)),
        pool_groups=lambda: pool_groups(stat, 2, (21, 19)),
        undo_order=lambda: undo_order(stat, torch.arange(40)),
        diverse_order=lambda: diverse_order(tokens[None], stat[None], 5),
        select_diverse=lambda: select_diverse(tokens.view(2, 20, 8), stat.view(2, 20), (3, 7), (15, 20)),
        select_in_clip=lambda: select_in_clip(tokens, stat, (16, 16, 8), (3, 16, 2)),
        query_scores=lambda: query_scores(torch.rand(2, 4, 8), torch.rand(2, 2, 11, 8), scores > 0),
        water_fill=lambda: water_fill(size*0, size, size, size),
        plan_budgets=lambda: plan_budgets(size.float(), size.float(), size, size, (3, 6), (2, 1), scale_free=True),
        topk_in_groups=lambda: topk_in_groups(scores, window, size),
        select_in_windows=lambda: select_in_windows(scores, modality, window, 1, (3, 2), (2, 1)),
        kept_positions=lambda: kept_positions(scores > .5, 3))

HOST_ONLY = {"window_sizes", "stage1_counts", "stage2_counts"}

def test_no_function_needs_a_value_from_the_device():
    with FakeTensorMode():
        for name, call in public_calls().items(): call()

def test_every_public_function_is_covered():
    import seats_analysis.select as module
    assert set(public_calls()) | HOST_ONLY == set(module.__all__)

def test_the_check_itself_can_fail():
    with FakeTensorMode():
        x = torch.rand(8)
        with pytest.raises(DynamicOutputShapeException): x[x > .5]
        with pytest.raises(DynamicOutputShapeException): x.nonzero()
        with pytest.raises(DataDependentOutputException): x.sum().item()

def test_exported_source_has_no_host_sync():
    import seats_analysis.select as module
    source = Path(module.__file__).read_text()
    assert not re.search(r"\.(item|tolist|cpu|numpy|nonzero|masked_select|unique)\(", source)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_runs_without_sync_and_agrees():
    cpu = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        f, a, s = (torch.rand(shape).to(device) for shape in ((4, 30, 16), (4, 30), (2, 11)))
        m = torch.tensor([[0] + [1]*6 + [2]*4]*2).to(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try: out = select_diverse(f, a, (3, 30, 7, 1)), select_in_windows(s, m, m*0, 1, (3, 2), (2, 1))
        finally: torch.cuda.set_sync_debug_mode("default")
        if device == "cpu": cpu = out
    assert all(torch.equal(x, y.cpu()) for x, y in zip(cpu, out))
