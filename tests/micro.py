"""Before and after, part by part: what each change to the hot path gains on this machine's CPU.
Run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/micro.py [PART ...]

Processor milliseconds, the least of some runs: "before", the plain way written out here where there
is one, and after. Shapes are those of Qwen2.5-Omni-7B with a video of 64 frames and 32 s of audio
where nothing else is said. The notes on them are in data/results/bench_notes.md."""

import json
import sys
import time
from collections import Counter

import torch


from plain import stage2
from seats_analysis.pruning.base import stage1_counts
from seats_analysis.pruning.received import attention_received
from seats_analysis.pruning.select import select_in_clip

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


def stage1():
    "Stage I over the windows of both modalities."
    sizes = [288] * WINDOWS + [50] * WINDOWS
    x, a = torch.randn(sum(sizes), 3584), torch.rand(sum(sizes))
    n = stage1_counts(sizes[:WINDOWS], 0.084) + stage1_counts(sizes[WINDOWS:], 0.49)
    return [lambda: select_in_clip(x, a, sizes, n)]


def statistic():
    """A softmax over blocks of 64 MiB, then its column sums, against blocks that fit a cache,
    divided while they are summed."""
    q, k = torch.randn(2, WINDOWS, 16, 1152, 80)

    def before():
        for a, b in zip(q.flatten(0, 1).split(12), k.flatten(0, 1).split(12)):
            torch.softmax(a @ b.mT * 80**-0.5, -1).sum(1)

    flat = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k)]
    return before, lambda: attention_received(*flat, [1152] * WINDOWS)


# ---------------------------------------------------------------- towers


def tower():
    """A vision tower of Qwen2.5-Omni, its width 320 and its depth 8 instead of 1280 and 32, on 16
    frames of 336x336."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
    from seats_analysis.testbed.load import build_config

    config = build_config(layers=1)
    changes = dict(depth=8, hidden_size=320, num_heads=4, intermediate_size=856, window_size=112)
    config.vision_config.update({**changes, "fullatt_block_indexes": [3, 7]})
    model = Thinker._from_config(config, attn_implementation="sdpa").eval()
    grid = torch.tensor([[8, 24, 24]])

    def call(pixels, grids=grid):
        return model.model.visual(pixels, grid_thw=grids)

    return model, call, grid


def windows():
    "One call of attention per window, against one per size."
    from seats_analysis.pruning.encoders import batched_windows

    model, visual, _ = tower()
    pixels = torch.randn(8 * 24 * 24, 1176)

    def after():
        with batched_windows(model):
            visual(pixels)

    return lambda: visual(pixels), after


def repeats(new=4):
    "A clip in which every second temporal grid repeats the one before it."
    from seats_analysis.pruning.encoders import find_repeats

    _, visual, grid = tower()
    pixels = torch.randn(new, 24 * 24 * 1176).repeat_interleave(8 // new, 0).view(-1, 1176)

    def after():
        found = find_repeats(pixels, grid.tolist(), 4)
        if found is None:
            visual(pixels)
        else:
            found.spread(visual(pixels[found.first], torch.tensor(found.grids)))

    return lambda: visual(pixels), after


def no_repeats():
    "What looking for repeated grids costs where there are none."
    return repeats(new=8)


# ---------------------------------------------------------------- a whole request


def request(seconds=240):
    """The embedded model on a clip of 4,575 tokens: processor ms by section of the timings, for
    the full prompt and for 10 %, with and without the options for the towers."""
    import tiny
    from seats_analysis.pruning import timing
    from seats_analysis.models.encode import encode
    from seats_analysis.models.decoder import last_logits_only
    from seats_analysis.pruning.session import prune
    from seats_analysis.schedules.schedule import Schedule
    from seats_analysis.testbed.load import load_testbed

    model, processor = load_testbed()
    question = tiny.ask("x", tiny.clip(0, seconds, size=(84, 84)))
    inputs = encode(model, processor, [question]).inputs
    plan = Schedule.load("data/schedules/testbed_trr10.json")
    timing.perf_counter = time.process_time  # the timings counts the processor's time here
    rows = {}
    for name, p in {"full": None, "10 %": plan}.items():
        for encoders in ((), "batch"):
            found = []
            for _ in range(3):
                with last_logits_only(model), prune(model, p, encoders=encoders) as run:
                    model(**inputs)
                found.append(run.timings.ms)
            parts = "encoders", "selection", "prefill"
            least = {k: round(min(ms[k] for ms in found), 1) for k in parts}
            rows[f"{name} {encoders or ''}"] = least
    return rows


# ---------------------------------------------------------------- launches


def launches():
    """Operations of one drop of stage II, and of stage I for 24 tokens a window, as the profiler
    counts them."""

    def count(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        names = Counter()
        for e in seen.events():
            inner = any(c.name.startswith("aten::") for c in e.cpu_children)
            if e.name.startswith("aten::") and not inner:
                names[e.name] += 1
        return sum(n for name, n in names.items() if name not in VIEWS)

    modality = torch.tensor([[1] * 24 + [2] * 24]).repeat(1, WINDOWS)
    window = torch.arange(WINDOWS).repeat_interleave(48)[None]
    scores, half = torch.rand(1, 48 * WINDOWS), [12 * WINDOWS]
    return {
        "stage I": count(stage1()[0]),
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

PARTS = {call.__name__: call for call in (stage1, statistic, windows, repeats, no_repeats)}
OTHERS = dict(launches=launches, request=request)


@torch.no_grad()
def main(names):
    torch.manual_seed(0)
    for name in names:
        if name in PARTS:
            found = [round(cpu_ms(call), 1) for call in PARTS[name]()]
        else:
            found = OTHERS[name]()
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*PARTS, *OTHERS])
