"""Token selection against plain loops, and in full precision. Parity with the recorded reference is
in test_golden.py, properties over random layouts and exact counts in test_properties.py, and that
nothing waits for the device in the notebook, test_hot_path.py and test_pretend_gpu.py."""

import random
from threading import Event, Thread

import pytest
import torch
from plain import naive_budgets, naive_order, naive_repair, stage2
from torch.utils._python_dispatch import TorchDispatchMode
from seats_analysis import topk_in_groups
from seats_analysis.pruning.received import _full_precision, true_float32
from seats_analysis.pruning.select import plan_chunks, query_scores, select_in_clip, water_fill


@pytest.fixture
def g(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def r(seed):
    return random.Random(seed)


# ---------------------------------------------------------------- against plain loops


@pytest.mark.parametrize("seed", range(6))
def test_batched_windows_equal_one_by_one(seed, g, r):
    sizes = [r.randint(1, 23) for _ in range(7)]
    counts = [r.randint(0, size) for size in sizes]
    features = torch.randn(sum(sizes), 12, generator=g)
    attention = torch.rand(sum(sizes), generator=g) if seed % 2 else None
    keep = select_in_clip(features, attention, sizes, counts)
    for at, count in zip(torch.arange(sum(sizes)).split(sizes), counts):
        order, slack = naive_order(
            features[at], attention if attention is None else attention[at], count
        )
        assert int(keep[at].sum()) == count
        if slack > 1e-4:
            assert keep[at].nonzero()[:, 0].tolist() == sorted(order)


@pytest.mark.parametrize("seed", range(80))
def test_water_level_equals_the_one_at_a_time_repair(r):
    cap = [r.randint(1, 30) for _ in range(r.randint(1, 12))]
    budget = [r.randint(1, c) for c in cap]
    total = r.randint(len(cap), sum(cap))
    few = sum(budget) < total
    low, high = (budget, cap) if few else ([1] * len(cap), budget)
    priority = [-i if few else i for i in range(len(cap))]
    got = water_fill(*(torch.tensor([x]) for x in (low, high, [total], priority)))[0].tolist()
    assert got == naive_repair(budget, cap, total)


@pytest.mark.parametrize("seed", range(80))
def test_budgets_equal_the_published_plan_where_it_is_exact(r):
    w, tau = r.randint(1, 10), r.choice([0.003, 0.03, 0.1, 0.3])
    lows = r.choice([(1, 1), (0, 1), (1, 0)])
    size = [[r.randint(low, 30) for _ in range(w)] for low in lows]
    if not all(map(sum, size)):
        pytest.skip("one modality only: a plain top-k")
    total = [r.randint(1, sum(row)) for row in size]
    mean = [[r.random() * 0.1 if n else 0.0 for n in row] for row in size]
    given = torch.tensor([mean]).double(), torch.tensor([size]), torch.tensor([total])
    got = plan_chunks(*given, tau)[0].T.tolist()
    assert sum(map(sum, got)) == sum(total)
    plain = naive_budgets(*mean, *size, *total, tau)
    if sum(map(sum, plain)) == sum(total):
        assert got == [list(pair) for pair in plain]


@pytest.mark.parametrize("seed", range(10))
def test_an_emptied_window_takes_no_part(g):
    """Window ids are fixed on the full sequence: a run that an earlier drop emptied leaves a gap,
    and the gap changes nothing."""
    modality = torch.tensor([[1, 1, 2] * 32])
    window = torch.arange(4).repeat_interleave(24)[None]
    # some windows matter more
    scores = torch.rand(1, 96, generator=g) * torch.rand(4, generator=g)[window]
    dense = stage2(scores, modality, window, 4, (24,), (12,), 0.1)
    gaps = torch.tensor([1, 2, 5, 6])[window]
    assert torch.equal(dense, stage2(scores, modality, gaps, 9, (24,), (12,), 0.1))


@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_are_the_best_of_their_group(g):
    scores = torch.randint(0, 6, (3, 40), generator=g).float()  # many ties
    group = torch.randint(0, 5, (3, 40), generator=g)
    budget = torch.randint(0, 9, (3, 4), generator=g)
    keep = topk_in_groups(scores, group, budget)
    for b in range(3):
        for k, count in enumerate([*budget[b].tolist(), 0]):  # the last is in no group
            members = (group[b] == k).nonzero()[:, 0].tolist()
            best = sorted(members, key=lambda i: (-float(scores[b, i]), i))[:count]
            assert sorted(best) == [i for i in members if keep[b, i]]


@pytest.mark.parametrize("attention", (False, True))
def test_one_large_window_needs_its_table_once(attention):
    "Nothing else of that size is made: no copy, no second table, no mask."
    n, seen = 300, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            seen.extend(x.untyped_storage() for x in outs if isinstance(x, torch.Tensor))
            return out

    x, a = torch.randn(n, 8), torch.rand(n) if attention else None
    with Sizes():
        keep = select_in_clip(x, a, [n], [20])
    # bytes: a mask of the table, too
    large = {s.data_ptr(): s.nbytes() for s in seen if s.nbytes() >= n * n}
    assert keep.sum() == 20 and list(large.values()) == [(n * n + n) * 4]


# ---------------------------------------------------------------- settings of the process

PLACES = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SETTINGS = [
    "nothing",
    "allow_tf32",
    *(f"legacy {p}" for p in ("highest", "high", "medium")),
    *(f"{name} {p}" for name in ("all", "cuda", "mkldnn") for p in ("tf32", "ieee")),
    *("all bf16", "mkldnn bf16"),
]


def choose(name):
    "One of the settings, as a caller may have made it."
    kind, _, precision = name.partition(" ")
    if kind == "legacy":
        torch.set_float32_matmul_precision(precision)
    elif kind == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif kind != "nothing":
        place = dict(zip(("all", "cuda", "mkldnn"), PLACES))[kind]
        place.fp32_precision = precision


def settings():
    "What can be read of the setting, the old way and the new."

    def read(f):
        try:
            return f()
        except RuntimeError:
            return "refuses"

    old = torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32
    new = [place.fp32_precision for place in (*PLACES, torch.backends.cudnn.conv)]
    return [*map(read, old), *new]


@pytest.fixture
def setting():
    "Sets one; afterwards all is as before."
    before = settings()
    yield choose
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        place.fp32_precision = "none"
    assert settings() == before


def full():
    return all(place.fp32_precision in ("none", "ieee") for place in PLACES[1:])


@pytest.mark.parametrize("name", SETTINGS)
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


def test_threads_share_the_setting(setting):
    "The first to enter is the first to leave."
    setting("legacy high")
    before, found = settings(), []
    entered, second, left = Event(), Event(), Event()

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

    threads = [Thread(target=job) for job in (first, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] and settings() == before
