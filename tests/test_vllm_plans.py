"""What the plug-in for vLLM does without vLLM: plans of media, positions, refused options."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_vllm import VLLM
from torch._subclasses.fake_tensor import FakeTensorMode

from seats_analysis.pruning.seats import Seats
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.serving import vllm
from seats_analysis.serving.vllm import Planner, check_engine, pack, place
from seats_analysis.testbed.load import load_testbed

SHAPES = {  # grid, mel frames, seconds of a grid; None: an image
    "video": ((7, 8, 6), None, 1.0),
    "one_grid": ((1, 4, 4), None, 2.0),
    "audio": (None, 731, 1.0),
    "both": ((9, 8, 6), 1601, 1.0),
    "sound_is_longer": ((2, 8, 6), 1601, 1.0),
    "video_is_longer": ((30, 4, 6), 300, 1.0),
    "slow": ((5, 12, 4), 1200, 7.3),  # a frame passes several chunks
    "fast": ((40, 4, 4), 1200, 0.07),
    "wide": ((3, 64, 64), 150, 0.5),  # height and width pass the time
    "image": ((1, 8, 10), None, None),
}


@pytest.fixture(scope="module")
def planner():
    return Planner(load_testbed()[0].config, Seats(Schedule.load("testbed/10")))


@pytest.mark.parametrize("name", SHAPES)
def test_positions_are_those_of_transformers(planner, name):
    grid, frames, seconds = SHAPES[name]
    plan = planner.plan(*SHAPES[name])
    grids = None if grid is None else torch.tensor([grid])
    wanted, _ = planner.thinker.get_rope_index(
        plan.ids[None],
        attention_mask=torch.ones_like(plan.ids)[None],
        image_grid_thw=grids if seconds is None else None,
        video_grid_thw=None if seconds is None else grids,
        use_audio_in_video=grid is not None and frames is not None,
        audio_seqlens=None if frames is None else torch.tensor([frames]),
        second_per_grids=torch.tensor([seconds or 1.0]),
    )
    assert torch.equal(plan.positions, wanted[:, 0].long())
    visual, audio = (plan.layout.visual | plan.layout.image)[0], plan.layout.audio[0]
    c = planner.config
    edges = [plan.ids[0], plan.ids[-1]]
    assert edges == (
        [c.audio_start_token_id, c.audio_end_token_id]
        if grid is None
        else [c.vision_start_token_id, c.vision_end_token_id]
    )
    assert visual.sum() == (0 if grid is None else grid[0] * grid[1] * grid[2] // 4)
    assert audio.sum() == (0 if frames is None else ((frames - 1) // 2 - 1) // 2 + 1)


@pytest.mark.parametrize("fps", [1e-9, 1e-3, -1.0, float("nan"), float("inf")])
def test_a_frame_rate_out_of_reach_is_refused(planner, fps):
    with pytest.raises(ValueError, match="its fps") as error:
        planner.plan(torch.tensor([8, 4, 4]), None, torch.tensor(2 / fps))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("frames", [0, 1, 2])
@pytest.mark.parametrize("grid", [None, torch.tensor([2, 4, 4])])
def test_audio_without_a_token_is_refused(planner, grid, frames):
    with pytest.raises(ValueError, match=f"{frames} mel frames"):
        planner.plan(grid, torch.tensor(frames), None)


def test_plans_are_bounded_by_bytes(planner, monkeypatch):
    plan = planner.plan((40, 16, 16), None, 1.0)
    size = sum(t.nbytes for t in (plan.ids, plan.positions, *vars(plan.layout).values()))
    assert size == vllm.BYTES * len(plan.ids)
    monkeypatch.setattr(vllm, "PLANS", 3 * size)
    for seconds in range(1, 9):
        shape = (40, 16, 16), None, seconds / 8
        assert planner.plan(*shape) is planner.plan(*shape)
        assert sum(len(p.ids) for p in planner.plans.values()) <= 3 * len(plan.ids)
    monkeypatch.setattr(vllm, "PLANS", 9 * vllm.PLAIN)
    for frames in range(100, 200):
        planner.plan(None, frames, None)
        assert len(planner.plans) < 9


def test_what_is_installed_is_tested():
    "The extra for vLLM takes the minor version that `make test-vllm` installs, and no other."
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    minor = int(VLLM[0].split(".")[1])
    assert f'"vllm[audio]>=0.{minor},<0.{minor + 1}"' in setup


@pytest.mark.parametrize(
    "shape, tokens, most",
    [(((60, 26, 26), 6000, 1.0), 11_644, 0.02), (((900, 34, 46), 36_000, 1.0), 360_904, 0.3)],
)
def test_long_clips_are_planned_at_once(planner, monkeypatch, shape, tokens, most):
    "60 s and 15 min of a real model; seconds of this thread, the best of five."
    monkeypatch.setattr(vllm, "LONGEST", 30)  # the testbed's model has fewer positions
    took = []
    for _ in range(5):
        start = time.thread_time()
        assert len(planner._plan(*shape).ids) == tokens
        took.append(time.thread_time() - start)
    assert min(took) < most, took


REFUSED = dict(  # option: what serves, what does not; always, with stage III, with two caches
    tensor_parallel_size=("1", 2, 0),
    pipeline_parallel_size=("1", 2, 0),
    compile_mm_encoder=("False", True, 0),
    cudagraph_mm_encoder=("False", True, 0),
    kv_transfer_config=("None", "a connector", 1),
    speculative_config=("None", "a draft", 1),
    cache_dtype=("auto", "fp8", 1),
    kv_events_config=("None", "events", 1),
    lora_config=("None", "an adapter", 1),
    data_parallel_size=("1", 2, 1),
    disable_hybrid_kv_cache_manager=("False", True, 1),
    cudagraph_mode=("PIECEWISE or NONE", "FULL", 1),
    enable_prefix_caching=("False", True, 2),
    enforce_eager=("True", False, 2),
)


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("level", range(3))
def test_options_that_are_refused(option, level):
    best, wrong, since = REFUSED[option]
    good = {name: best for name, (best, *_) in REFUSED.items()}
    for value in (*best.split(" or "), wrong):
        own = SimpleNamespace(**good | dict(cudagraph_mode="NONE") | {option: value})
        parts = "parallel", "compilation", "cache", "scheduler", "model"  # whichever has it
        config = SimpleNamespace(**vars(own), **{f"{part}_config": own for part in parts})
        if value != wrong or level < since:
            check_engine(config, level > 0, level > 1)
            continue
        without = "SEATS_VLLM_LATE" if level else "a schedule"
        end = f"serve with {best}, or without {without}"
        with pytest.raises(ValueError, match=f"^{option} is {wrong}, but [^\n]*: {end}$"):
            check_engine(config, level > 0, level > 1)


LATE = dict(  # plan -> first layer without media, layers with them for the prompt only, said
    as_one=(dict(late_start=23), 23, [], "of memory 11% less for a media token, 7% more"),
    never=({}, 28, [], "0 of 28 layers hold no media; memory is not saved"),
    half=(dict(late_start=14), 14, [], "50% less for a media token, 0% more .*from 0 media"),
    apart=(dict(late_start={"visual": 20, "audio": 23}), 23, [], "stays up to layer 23 as well"),
    prefix=(
        dict(late_start=23, cache={"visual": (0, 20), "audio": (0, 20)}),
        23,
        [20, 21, 22],
        "3 layers keep them for the prompt only",
    ),
    suffix=(
        dict(late_start=20, cache={"visual": (2, 28), "audio": (2, 20)}),
        20,
        [0, 1],
        "2 layers keep",
    ),
    nowhere=(dict(cache={"visual": (0, 0), "audio": (5, 5)}), 28, [*range(28)], "28 layers keep"),
)


@pytest.mark.parametrize("name", LATE)
def test_what_stage_3_does_with_a_plan(name):
    plan, first, split, said = LATE[name]
    late, prompt, line = vllm.late_layers(Schedule(28, **plan))
    assert (late, prompt) == (first, split) and re.search(said, line) and "\n" not in line


def test_caches_of_two_modalities_are_refused():
    plan = Schedule(28, cache={"visual": (0, 20), "audio": (0, 21)})
    with pytest.raises(ValueError, match="vLLM takes one range for both"):
        vllm.late_layers(plan)


def test_positions_are_placed_chunk_by_chunk():
    "Against a loop over the prompt, wherever the chunk begins; images bring no positions."
    media = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0]).bool()
    before, own = torch.arange(12).expand(3, -1) * 10, torch.arange(3 * 5).reshape(3, 5)
    rows = torch.randn(5, 4)
    image = torch.randn(2, 4)
    for first in range(4):
        n = 3 - max(first - 1, 0)
        packed = [pack(rows[3 - n : 3], own[:, 3 - n : 3]), image, pack(rows[3:], own[:, 3:])]
        found, positions = place(packed, before, media, first, 4)
        assert [torch.equal(a, b) for a, b in zip(found, (rows[3 - n : 3], image, rows[3:]))]
        wanted = before.clone()
        slots = [s for s in range(12) if media[s] and s >= first]
        for slot, column in zip(slots, [*range(3 - n, 3), None, None, 3, 4]):
            text = max(s for s in range(slot) if not media[s])
            if column is not None:
                wanted[:, slot] = before[:, text] + own[:, column]
        assert torch.equal(positions, wanted)


def test_nothing_waits_for_the_device(planner):
    "Shapes follow from the plan alone: on tensors without values, a wait is an error."
    plan = planner.plan(*SHAPES["both"])
    n = len(plan.ids) - 2 * plan.edge
    method = SimpleNamespace(select=lambda inputs: inputs.features[:, 0] > 0)
    double = SimpleNamespace(method=method)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.empty(n, 8)
        rows, stay = Planner.select(double, plan, features, features[:, 0])
        count = sum(sum(b.keep) for b in plan.budgets)
        assert rows.shape == (count, 8 + 3) and stay.shape == (count,)
        media = torch.empty(len(plan.ids)).bool()
        found, positions = place([rows], torch.empty(3, len(plan.ids)).long(), media, 0, 8)
        assert found[0].shape == (count, 8) and positions.shape == (3, len(plan.ids))
