"""Before and after, part by part: what each change to the hot path gains on this machine's CPU.
Run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/micro.py [--json] [PART ...]

Processor milliseconds, the least of some runs. "before" is the plain way written out here. Shapes
are those of Qwen2.5-Omni-7B with a video of 64 frames and 32 s of audio where nothing else is said.
The notes on them are in data/results/bench_notes.md."""

import json
import sys
import time
from collections import Counter

import torch


from plain import stage2
from seats_analysis.pruning.base import stage1_counts
from seats_analysis.pruning.received import attention_received
from seats_analysis.pruning.select import _distances, select_in_clip

WINDOWS = 16  # of 2 s


def cpu_ms(call, runs=3):
    "Least processor time of some runs, after one that does not count."
    times = []
    for _ in range(runs + 1):
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    return min(times[1:])


# ---------------------------------------------------------------- selection


def padded(features, attention, n, sizes):
    """Stage I with all windows (G, N) padded to one width: distances to padding, a mask over them,
    and steps for whole windows, too."""
    valid = torch.arange(features.shape[1]) < torch.tensor(sizes)[:, None]
    distance, taken, order = _distances(features, attention), ~valid, []
    gap = distance.masked_fill(taken[..., None], torch.inf).topk(2, 1, largest=False).values[:, -1]
    for step in range(max(n)):
        order.append(gap.masked_fill(taken, -torch.inf).argmax(1, keepdim=True))
        row = distance.take_along_dim(order[-1][..., None], 1)[:, 0]
        gap, taken = torch.minimum(gap, row) if step else row, taken.scatter(1, order[-1], True)
    order = torch.cat(order, 1).masked_fill(
        torch.arange(max(n)) >= torch.tensor(n)[:, None], features.shape[1]
    )
    return torch.zeros(len(n), features.shape[1] + 1, dtype=torch.bool).scatter(1, order, True)[
        :, :-1
    ]


def stage1():
    "Windows of both modalities, padded to one width, against tables of their own size."
    sizes = [288] * WINDOWS + [50] * WINDOWS
    x, a = torch.randn(sum(sizes), 3584), torch.rand(sum(sizes))
    n = stage1_counts(sizes[:WINDOWS], 0.084) + stage1_counts(sizes[WINDOWS:], 0.49)
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    table = (starts[:, None] + torch.arange(288)).clamp(max=len(x) - 1)
    return lambda: padded(x[table], a[table], n, sizes), lambda: select_in_clip(x, a, sizes, n)


def statistic():
    """A softmax over blocks of 64 MiB, then its column sums, against blocks that fit a cache,
    divided while they are summed."""
    q, k = torch.randn(2, WINDOWS, 16, 1152, 80)

    def before():
        for a, b in zip(q.flatten(0, 1).split(12), k.flatten(0, 1).split(12)):
            torch.softmax(a @ b.mT * 80**-0.5, -1).sum(1)

    flat = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k)]
    return before, lambda: attention_received(*flat, [1152] * WINDOWS)


def projections():
    """Queries and keys of the last vision layer projected once more for the statistic, against
    nothing."""
    layers, x = [torch.nn.Linear(1280, 1280) for _ in range(2)], torch.randn(WINDOWS * 1152, 1280)
    return lambda: [layer(x) for layer in layers], lambda: None


def scores():
    """Queries of all positions, against the query of one (the keys are needed either way and are
    in neither)."""
    layer, x = torch.nn.Linear(3584, 3584), torch.randn(900, 3584)
    return lambda: layer(x), lambda: layer(x[-1:])


def eviction():
    """Caches of all earlier layers at every cut, against each layer once; the published plan at 10
    % (cuts at 16, 18, 20 and 23 of 28)."""
    lengths, starts = [1300, 1220, 1000, 380, 80], [0, 16, 18, 20, 23, 28]
    owner = [i for i, (a, b) in enumerate(zip(starts, starts[1:])) for _ in range(a, b)]
    full = [(torch.randn(1, 4, lengths[i], 128), torch.randn(1, 4, lengths[i], 128)) for i in owner]
    cuts = [torch.randperm(a)[:b].sort().values[None] for a, b in zip(lengths, lengths[1:])]

    def before():
        kv = list(full)
        for i, index in enumerate(cuts):
            for l in range(starts[i + 1]):
                kv[l] = tuple(
                    x.transpose(1, 2).index_select(1, index[0]).transpose(1, 2) for x in kv[l]
                )

    def after():
        held = []
        for i, index in enumerate(cuts):
            held = [h.gather(1, index) for h in held] + [index]
        for l in range(starts[-2]):
            [x.index_select(2, held[owner[l]][0]) for x in full[l]]

    return before, after


# ---------------------------------------------------------------- a whole request


def request(seconds=240):
    """The embedded model on a clip of 4,575 tokens: processor ms by section of the timings, for
    the full prompt and for 10 %."""
    from pathlib import Path

    import tiny
    from seats_analysis import Schedule, encode, load_testbed, prune
    from seats_analysis.models.scoring import last_logits_only
    from seats_analysis.pruning import timing

    model, processor = load_testbed()
    inputs = encode(model, processor, [tiny.ask("x", tiny.clip(0, seconds, size=(84, 84)))]).inputs
    plan = Schedule.load(Path(__file__).parents[1] / "data" / "schedules" / "testbed_trr10.json")
    timing.perf_counter = time.process_time  # the timings counts the processor's time here
    rows = {}
    for name, p in (("full", None), ("10 %", plan)):
        found = []
        for _ in range(3):
            with last_logits_only(model), prune(model, p) as run:
                model(**inputs)
            found.append(run.timings.ms)
        rows[name] = {
            k: round(min(ms[k] for ms in found), 1) for k in ("encoders", "selection", "prefill")
        }
    return rows


# ---------------------------------------------------------------- launches


def launches():
    """Operations of one drop of stage II, and of stage I for 24 tokens a window, as the profiler
    counts them."""

    def count(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        leaves = [
            e
            for e in seen.events()
            if e.name.startswith("aten::")
            and not any(c.name.startswith("aten::") for c in e.cpu_children)
        ]
        return sum(Counter(e.name for e in leaves if e.name not in VIEWS).values())

    modality, window = (
        torch.tensor([[1] * 24 + [2] * 24]).repeat(1, WINDOWS),
        torch.arange(WINDOWS).repeat_interleave(48)[None],
    )
    scores, half = torch.rand(1, 48 * WINDOWS), [12 * WINDOWS]
    return {
        "stage I": count(stage1()[1]),
        "stage II, a drop": count(
            lambda: stage2(scores, modality, window, WINDOWS, half, half, ratio=0.5)
        ),
    }


VIEWS = (
    "aten::as_strided aten::view aten::expand aten::slice aten::select aten::unsqueeze "
    "aten::squeeze aten::transpose aten::t aten::unflatten aten::flatten "
    "aten::split aten::permute aten::empty aten::empty_strided aten::empty_like "
    "aten::resize_ aten::alias aten::detach "
    "aten::reshape aten::_unsafe_view aten::narrow aten::lift_fresh aten::_reshape_alias"
).split()

PARTS = dict(
    stage1=stage1, statistic=statistic, projections=projections, scores=scores, eviction=eviction
)
OTHERS = dict(launches=launches, request=request)


def main(names, others):
    torch.manual_seed(0)
    rows = {}
    with torch.no_grad():
        for name in names:
            before, after = PARTS[name]()
            rows[name] = dict(before=round(cpu_ms(before), 1), after=round(cpu_ms(after), 1))
            if "--json" not in sys.argv:
                print(
                    f"{name:12} {rows[name]['before']:9.1f} {rows[name]['after']:9.1f} ms   ",
                    PARTS[name].__doc__,
                    flush=True,
                )
        for name in others:
            rows[name] = OTHERS[name]()
            if "--json" not in sys.argv:
                print(name, *(f"{k}: {v}" for k, v in rows[name].items()), sep="\n    ", flush=True)
    if "--json" in sys.argv:
        print(json.dumps(rows))


if __name__ == "__main__":
    asked = [a for a in sys.argv[1:] if a != "--json"] or [*PARTS, *OTHERS]
    main([a for a in asked if a in PARTS], [a for a in asked if a in OTHERS])
