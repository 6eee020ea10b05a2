"""Token selection against plain loops, and without a host sync. Parity with the recorded reference
is in test_golden.py, properties over random layouts in
test_properties.py."""

import random, re
from pathlib import Path
from threading import Barrier, Event, Thread
import pytest, torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from plain import naive_budgets, naive_order, naive_repair, stage2
from seats_analysis.pruning.prefill import finite_rows
from seats_analysis.pruning.received import (
    _full_precision,
    attention_received,
    pool_groups,
    true_float32,
)
from seats_analysis.pruning.select import (
    divide_total,
    plan_chunks,
    query_scores,
    text_scores,
    select_in_clip,
    topk_in_groups,
    water_fill,
)

# ---------------------------------------------------------------- against plain loops


@pytest.mark.parametrize("seed", range(6))
def test_batched_windows_equal_one_by_one(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 24, (7,), generator=g).tolist()
    counts = [int(torch.randint(0, s + 1, (1,), generator=g)) for s in sizes]
    features, attention = (
        torch.randn(sum(sizes), 12, generator=g),
        torch.rand(sum(sizes), generator=g) if seed % 2 else None,
    )
    keep = select_in_clip(features, attention, sizes, counts).split(sizes)
    for x, a, kept, count in zip(
        features.split(sizes),
        [None] * 7 if attention is None else attention.split(sizes),
        keep,
        counts,
    ):
        order, slack = naive_order(x, a, count)
        assert int(kept.sum()) == count
        if slack > 1e-4:
            assert kept.nonzero()[:, 0].tolist() == sorted(order)


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_exact_among_duplicates(seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 5, generator=g) * 10 ** float(torch.randint(-6, 6, (1,), generator=g))
    features = base[torch.randint(0, 3, (4, 30), generator=g)] + (
        1e-7 * torch.randn(4, 30, 5, generator=g) if seed % 2 else 0
    )
    n = [int(x) for x in torch.randint(0, 31, (4,), generator=g)]
    keep = select_in_clip(features.flatten(0, 1), 1e5 * torch.rand(120, generator=g), [30] * 4, n)
    assert keep.view(4, 30).sum(1).tolist() == n


@pytest.mark.parametrize("seed", range(80))
def test_water_level_equals_the_one_at_a_time_repair(seed):
    r = random.Random(seed)
    cap = [r.randint(1, 30) for _ in range(r.randint(1, 12))]
    budget = [r.randint(1, c) for c in cap]
    total = r.randint(len(cap), sum(cap))
    few = sum(budget) < total
    low, high = (budget, cap) if few else ([1] * len(cap), budget)
    priority = [-i if few else i for i in range(len(cap))]
    got = water_fill(*(torch.tensor([x]) for x in (low, high, [total], priority)))[0].tolist()
    assert got == naive_repair(budget, cap, total)


@pytest.mark.parametrize("seed", range(80))
def test_budgets_equal_the_published_plan_where_it_is_exact(seed):
    r = random.Random(seed)
    w, tau = r.randint(1, 10), r.choice([0.003, 0.03, 0.1, 0.3])
    size_v, size_a = (
        [r.randint(low, 30) for _ in range(w)] for low in r.choice([(1, 1), (0, 1), (1, 0)])
    )
    if not sum(size_v) or not sum(size_a):
        pytest.skip("one modality only: a plain top-k")
    t_v, t_a = r.randint(1, sum(size_v)), r.randint(1, sum(size_a))
    mean_v, mean_a = ([r.random() * 0.1 if s else 0.0 for s in size] for size in (size_v, size_a))
    mean, size = torch.tensor([[mean_v, mean_a]]).double(), torch.tensor([[size_v, size_a]])
    v, a = plan_chunks(mean, size, torch.tensor([[t_v, t_a]]), tau)[0].tolist()
    assert sum(v) + sum(a) == t_v + t_a
    assert all(0 <= x <= s for x, s in zip(v + a, size_v + size_a))
    plain = naive_budgets(mean_v, mean_a, size_v, size_a, t_v, t_a, tau)
    if sum(map(sum, plain)) == t_v + t_a:
        assert list(zip(v, a)) == plain


def random_batch(r, samples):
    "Interleaved samples of unequal length, left-padded, some runs empty; scores of any shape."
    rows = []
    for _ in range(samples):
        runs = [(kind, w) for w in range(5) for kind in (1, 2) for _ in range(r.randint(0, 7))]
        rows.append([(0, -1)] + runs + [(0, -1)])
    width = max(map(len, rows))
    rows = [[(-1, -1)] * (width - len(row)) + row for row in rows]
    return (torch.tensor([[x[i] for x in row] for row in rows]) for i in (0, 1))


@pytest.mark.parametrize("seed", range(30))
def test_stage2_is_exact_on_any_batch(seed):
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    modality, window = random_batch(r, 4)
    counts = [[int((row == m).sum()) for row in modality] for m in (1, 2)]
    totals = [[min(n, max(1, round(r.random() * n))) for n in side] for side in counts]
    scores = torch.rand(modality.shape, generator=g) * 10.0 ** r.randint(-6, 3)
    if seed % 4 == 1:
        scores = torch.zeros_like(scores)
    if seed % 4 == 2:
        scores = scores.bfloat16()
    if seed % 4 == 3:
        scores[torch.rand(scores.shape, generator=g) < 0.2] = (
            torch.nan
        )  # prune refuses these; the counts hold all the same
    args = 5, *totals, r.choice([1e-4, 0.1, 0.3])
    keep = stage2(scores, modality, window, *args)
    assert (keep & (modality > 0)).sum(1).tolist() == [v + a for v, a in zip(*totals)]
    assert keep[modality <= 0].all()
    for i in range(4):  # one by one: the same choice
        alone = stage2(
            scores[i : i + 1],
            modality[i : i + 1],
            window[i : i + 1],
            5,
            totals[0][i : i + 1],
            totals[1][i : i + 1],
            *args[3:],
        )
        assert torch.equal(alone[0], keep[i])


@pytest.mark.parametrize("seed", range(30))
def test_a_planned_total_is_divided_by_what_is_there(seed):
    "As if the totals had been rounded from the present counts, where those have the planned sum."
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    modality = torch.tensor([[1] * r.randint(4, 9) + [2] * r.randint(4, 9)]).repeat(1, 3)
    window = torch.arange(3).repeat_interleave(modality.shape[1] // 3)[None]
    n = [int((modality == m).sum()) for m in (1, 2)]
    ratio = [r.choice((0.3, 0.55, 0.8)) for _ in n]
    there = [max(1, round(x * k)) for x, k in zip(ratio, n)]
    shift = r.randint(1 - there[0], there[1] - 1)
    planned, scores = [there[0] + shift, there[1] - shift], torch.rand(modality.shape, generator=g)
    keep = lambda totals, **kw: stage2(
        scores, modality, window, 3, *([t] for t in totals), 0.1, **kw
    )
    assert torch.equal(keep(planned, ratio=ratio[0]), keep(there))


@pytest.mark.parametrize("seed", range(10))
def test_an_emptied_window_takes_no_part(seed):
    """Window ids are fixed on the full sequence: a run that an earlier drop emptied leaves a gap,
    and the gap changes nothing."""
    g = torch.Generator().manual_seed(seed)
    modality = torch.tensor([[1, 1, 2] * 32])
    window = torch.arange(4).repeat_interleave(24)[None]
    scores = (
        torch.rand(1, 96, generator=g) * torch.rand(1, 4, generator=g)[0, window]
    )  # some windows matter more
    args = (24,), (12,), 0.1
    dense = stage2(scores, modality, window, 4, *args)
    gaps = stage2(scores, modality, torch.tensor([1, 2, 5, 6])[window], 9, *args)
    assert torch.equal(dense, gaps)


@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_are_the_best_of_their_group(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (3, 40), generator=g).float()  # many ties
    group, budget = (
        torch.randint(0, 5, (3, 40), generator=g),
        torch.randint(0, 9, (3, 4), generator=g),
    )
    keep = topk_in_groups(scores, group, budget)
    for b in range(3):
        best = lambda i: (-float(scores[b, i]), i)
        for k in range(4):
            members = sorted((i for i in range(40) if group[b, i] == k), key=best)
            assert sorted(members[: int(budget[b, k])]) == [
                i for i in range(40) if keep[b, i] and group[b, i] == k
            ]
        assert not keep[b, group[b] == 4].any()


@pytest.mark.parametrize("attention", (False, True))
def test_one_large_window_needs_its_table_once(attention):
    "Nothing else of that size is made: no copy, no second table, no mask."
    n, seen = 300, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                x.untyped_storage()
                for x in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(x, torch.Tensor)
            )
            return out

    x, a = torch.randn(n, 8), torch.rand(n) if attention else None
    with Sizes():
        keep = select_in_clip(x, a, [n], [20])
    large = {
        s.data_ptr(): s.nbytes() for s in seen if s.nbytes() >= n * n
    }  # bytes: a mask of the table, too
    assert keep.sum() == 20 and list(large.values()) == [(n * n + n) * 4]


# ---------------------------------------------------------------- settings of the process

PLACES = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SET = {
    "nothing": lambda: None,
    **{
        f"legacy {p}": lambda p=p: torch.set_float32_matmul_precision(p)
        for p in ("highest", "high", "medium")
    },
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    **{
        f"{name} {p}": lambda place=place, p=p: setattr(place, "fp32_precision", p)
        for name, place in zip(("all", "cuda", "mkldnn"), PLACES)
        for p in ("tf32", "bf16", "ieee")
        if (name, p) != ("cuda", "bf16")
    },
}


def settings():
    "What can be read of the setting, the old way and the new."

    def read(f):
        try:
            return f()
        except RuntimeError:
            return "refuses"

    old = [
        read(torch.get_float32_matmul_precision),
        read(lambda: torch.backends.cuda.matmul.allow_tf32),
    ]
    return old + [place.fp32_precision for place in (*PLACES, torch.backends.cudnn.conv)]


@pytest.fixture
def setting():
    "Sets one; afterwards all is as before."
    before = settings()
    yield lambda name: SET[name]()
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        place.fp32_precision = "none"
    assert settings() == before


def full():
    return all(place.fp32_precision in ("none", "ieee") for place in PLACES[1:])


@pytest.mark.parametrize("name", SET)
def test_products_are_full_float32_and_the_setting_stays(setting, name):
    "However it was set, nested, and when the block raises; the same scores as without it."
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, 64), torch.randn(1, 2, 200, 64)
    want = query_scores(q, k)
    setting(name)
    before = settings()
    assert torch.equal(query_scores(q, k), want) and settings() == before
    with true_float32("cpu"):
        with pytest.raises(ZeroDivisionError), true_float32("cpu"):
            1 / 0
        assert full()
    assert settings() == before and _full_precision.inside == 0


def test_what_follows_the_general_setting_still_does(setting):
    setting("all tf32")
    query_scores(torch.randn(1, 2, 4), torch.randn(1, 2, 5, 4))
    setting("all ieee")
    assert settings()[2:5] == ["ieee"] * 3


def test_threads_share_the_setting(setting):
    "The first to enter is the first to leave."
    setting("legacy high")
    before, entered, second, left = settings(), Event(), Event(), Event()
    found = []

    def first():
        with true_float32("cpu"):
            entered.set()
            second.wait()
        left.set()

    def other():
        entered.wait()
        with true_float32("cpu"):
            second.set()
            left.wait()
            found.append(full())

    threads = [Thread(target=f) for f in (first, other)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] and settings() == before


def test_many_threads(setting):
    setting("all tf32")
    before, start, found = settings(), Barrier(4), []

    def run():
        start.wait()
        for _ in range(300):
            with true_float32("cpu"):
                found.append(full())

    threads = [Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 1200 and all(found) and settings() == before


# ---------------------------------------------------------------- no host sync


def public_calls():
    "Each tensor function of the two modules, once, on small inputs."
    tokens, stat, heads = torch.rand(40, 8), torch.rand(40), torch.rand(40, 2, 4)
    modality, scores, size = (
        torch.tensor([[0] + [1] * 6 + [2] * 4] * 2),
        torch.rand(2, 11),
        torch.full((2, 1), 6),
    )
    window, totals = torch.zeros_like(modality), torch.tensor([[3, 2], [6, 1]])
    sizes = torch.full((2, 2, 1), 6)
    return dict(
        attention_received=lambda: attention_received(heads, heads, (16, 16, 8)),
        pool_groups=lambda: pool_groups(stat, 2, (21, 19)),
        select_in_clip=lambda: select_in_clip(tokens, stat, (16, 16, 8), (3, 16, 2)),
        text_scores=lambda: text_scores(
            torch.rand(2, 4, 3, 8), torch.rand(2, 2, 11, 8), scores[:, :3] > 0, scores > 0
        ),
        query_scores=lambda: query_scores(torch.rand(2, 4, 8), torch.rand(2, 2, 11, 8), scores > 0),
        water_fill=lambda: water_fill(size * 0, size, size, size),
        plan_chunks=lambda: plan_chunks(torch.rand(2, 2, 1), sizes, totals),
        topk_in_groups=lambda: topk_in_groups(scores, window, size),
        select_in_chunks=lambda: stage2(scores, modality, window, 1, (3, 2), (2, 1)),
        divide_total=lambda: divide_total(totals, totals, 0.5),
    )


HOST_ONLY = {"window_sizes", "equal_runs", "on_device", "true_float32", "triton_kernels"}


def test_no_function_needs_a_value_from_the_device():
    with FakeTensorMode():
        for name, call in public_calls().items():
            call()
        finite_rows(torch.rand(40, 8))


def test_every_public_function_is_covered():
    from seats_analysis.pruning import received, select

    defined = {
        name
        for module in (received, select)
        for name, f in vars(module).items()
        if getattr(f, "__module__", "") == module.__name__
    }
    assert set(public_calls()) | HOST_ONLY == {n for n in defined if not n.startswith("_")}


def test_the_check_itself_can_fail():
    with FakeTensorMode():
        x = torch.rand(8)
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0.5]
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


def test_exported_source_has_no_host_sync():
    from seats_analysis.pruning import select as module

    source = Path(module.__file__).read_text()
    assert not re.search(r"\.(item|tolist|cpu|numpy|nonzero|masked_select|unique)\(", source)


@pytest.mark.cuda
def test_cuda_runs_without_sync_and_agrees():
    cpu = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        f, a, s = (torch.rand(shape).to(device) for shape in ((120, 16), (120,), (2, 11)))
        m = torch.tensor([[0] + [1] * 6 + [2] * 4] * 2).to(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            out = (
                select_in_clip(f, a, [30] * 4, (3, 30, 7, 1)),
                stage2(s, m, m * 0, 1, (3, 2), (2, 1)),
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if device == "cpu":
            cpu = out
    assert all(torch.equal(x, y.cpu()) for x, y in zip(cpu, out))
