"""What the plug-in hands to vLLM's own classes, without an engine; what is sent upstream."""

import importlib.util
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

import torch

from seats_analysis.schedules.schedule import Schedule
from test_vllm import ENTERING, FOLDER, TESTS
from vllm_folder import full_checkpoint


class Pages:
    "What a worker would have written: in each slot of text, the prompt up to its token."

    def __init__(self, manager):
        self.manager, self.held = manager, {}

    def run(self, step):  # of (request, first token, number of tokens)
        copies, retained = self.manager.take_kv_cache_block_copies()
        for copy in copies:
            self.held[copy.dst_block_id] = dict(self.held[copy.src_block_id])
        for writing in (True, False):
            for request, first, n in step:
                ids = list(request.all_token_ids)[: first + n]
                text = [tuple(ids[: i + 1]) for i, token in enumerate(ids) if token < MEDIA]
                for group in self.manager.get_blocks(request.request_id).blocks[1:]:
                    for i, prefix in enumerate(text):
                        page = self.held.setdefault(group[i // SIZE].block_id, {})
                        if writing and len(prefix) > first:
                            page[i % SIZE] = prefix
                        assert writing or page[i % SIZE] == prefix
        self.manager.block_pool.free_blocks(retained)


SIZE, MEDIA = 4, 1000  # tokens of a block; ids of media begin here


@pytest.mark.parametrize("blocks", [50, 10_000])
def test_blocks_of_text_are_shared(blocks):
    """vLLM's manager with random requests about few clips: what a request reads is what its prompt
    says, with evictions and preemptions; without, it finds all that ended requests computed."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
    from vllm.v1.request import Request

    from seats_analysis.serving.prefix import SharedPart

    class TextManager(SharedPart):
        def _held(self, request_id, tokens):
            return sum(token < MEDIA for token in known[request_id].all_token_ids[:tokens])

    class TextSpec(AttentionSpec):
        def max_memory_usage_bytes(self, config):
            return 0

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(TextSpec, TextManager)
    sizes = dict(block_size=SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    specs = FullAttentionSpec(**sizes), TextSpec(**sizes), TextSpec(**sizes)
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(SIZE, sha256)
    hits, preempted = 0, 0
    for seed in range(20):
        rng = random.Random(seed)
        text = lambda most: [rng.randrange(3) for _ in range(rng.randrange(most))]
        media = lambda: [MEDIA + rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        clips = [text(9) + media() + text(3) for _ in range(3)]
        prompts = [rng.choice(clips) + rng.choice([[], *clips]) + text(9) + [0] for _ in range(30)]
        waiting = [
            Request(str(i), ids, SamplingParams(), None, block_hasher=hasher)
            for i, ids in enumerate(prompts)
        ]
        known, running, ended = {r.request_id: r for r in waiting}, [], [[]]
        manager = KVCacheManager(config, 512, SIZE, SIZE)
        pages = Pages(manager)
        while waiting or running:
            step = []
            for r in [*running]:
                n = min(10, r.num_tokens - r.num_computed_tokens)
                while r in running and manager.allocate_slots(r, n) is None:
                    waiting.insert(0, running.pop())
                    manager.free(waiting[0])
                    waiting[0].num_computed_tokens = 0
                    preempted += 1
                if r in running:
                    step.append((r, r.num_computed_tokens, n))
            while waiting and len(running) < 4:
                r = waiting[0]
                found, hit, _ = manager.get_computed_blocks(r)
                n = min(10, r.num_tokens - hit)
                if manager.allocate_slots(r, n, hit, found) is None:
                    break
                common = [len(os.path.commonprefix([r.all_token_ids[:-1], e])) for e in ended]
                assert blocks < 10_000 or hit >= max(common) // SIZE * SIZE
                running.append(waiting.pop(0))
                step.append((r, hit, n))
                hits += hit > 0
            pages.run(step)
            for r, first, n in step:
                r.num_computed_tokens = first + n
                if r.num_computed_tokens == r.num_tokens and rng.random() < 0.5:
                    manager.free(r)
                    running.remove(r)
                    ended.append(list(r.all_token_ids))
                elif r.num_computed_tokens == r.num_tokens:
                    r.append_output_token_ids(rng.randrange(3))
        assert manager.block_pool.get_num_free_blocks() == blocks - 1
    assert hits > 100 and (preempted > 100) == (blocks == 50)


def test_start_up_measures_the_longest_clip(tmp_path, monkeypatch):
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from seats_analysis.serving.vllm import register

    Schedule(16, entering=ENTERING).save(tmp_path / "plan.json")
    monkeypatch.setenv("SEATS_SCHEDULE", str(tmp_path / "plan.json"))
    register()
    folder = full_checkpoint(FOLDER, tmp_path / "model")
    processor = MULTIMODAL_REGISTRY.create_processor(ModelConfig(str(folder), max_model_len=256))
    made = processor.get_dummy_mm_inputs({"video": 1})
    (place,) = made["mm_placeholders"]["video"]
    grid = made["mm_kwargs"]["video"][0]["video_grid_thw"].data
    unpruned = int(grid.prod()) // 4
    one = unpruned // int(grid[0])
    assert 256 / ENTERING["visual"] - one <= unpruned <= 256 / ENTERING["visual"]
    most = processor.info.get_mm_max_tokens_per_item(256, {"video": 1})["video"]
    assert place.get_num_embeds() <= most == 256


def test_second_runner_does_not_wait(monkeypatch):
    "It takes the place of what follows the prompt from the host: positions without values do."
    from torch._subclasses.fake_tensor import FakeTensorMode

    from seats_analysis.serving.omni import PrunedOmni

    double = SimpleNamespace(media_ids=(5, 6, 7), width=4)
    with FakeTensorMode():
        ids, positions = torch.ones(9).long(), torch.ones(3, 9).long()
        *_, delta = PrunedOmni.recompute_mrope_positions(double, ids, [], positions, 0)
    state = object.__new__(PrunedOmni.get_model_state_cls())
    known = np.array([-40, -7])
    uva = []
    state.rope_state = SimpleNamespace(
        prefill_delta=SimpleNamespace(np=known),
        apply_staged_writes=lambda: uva.append(known.tolist()),
    )

    def stock(self, *args):
        known[1] = delta
        self.rope_state.apply_staged_writes()
        return args

    monkeypatch.setattr(type(state).__base__, "prepare_inputs_embeds", stock)
    assert state.prepare_inputs_embeds(1, 2) == (1, 2)
    assert uva == [[-40, delta], [-40, -7]]


@pytest.mark.skipif(shutil.which("patch") is None, reason="no patch")
@pytest.mark.parametrize("name", ["pruning_registry", "encoder_budget", "positions_on_cpu"])
def test_what_is_sent_upstream_applies(name):
    text = (TESTS.parent / "docs" / "upstream" / f"{name}.md").read_text()
    site = Path(importlib.util.find_spec("vllm").origin).parents[1]
    command = ["patch", "-p1", "--fuzz=0", "--dry-run", "-d", site]
    diff = text.split("```diff\n")[1].split("```")[0]
    run = subprocess.run(command, input=diff, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
