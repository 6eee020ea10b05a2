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
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import CUDAGraphMode, ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from seats_analysis.schedules.schedule import Schedule
from seats_analysis.serving import late
from seats_analysis.serving.omni import PrunedOmni
from seats_analysis.serving.prefix import PartManager
from seats_analysis.serving.vllm import Planner, method_of_environment, register
from test_vllm import ENTERING, FOLDER, TESTS
from vllm_folder import full_checkpoint


class TextManager(PartManager):
    def _held(self, request_id, tokens):
        return sum(token < MEDIA for token in self.requests[request_id].all_token_ids[:tokens])


class TextSpec(late.PartSpec):
    pass


SIZE, MEDIA = 4, 1000  # tokens of a block; ids of media begin here


@pytest.mark.parametrize("blocks", [50, 10_000])
def test_blocks_of_text_are_shared(blocks):
    """vLLM's manager, with random requests about few clips: every slot of text holds what its
    request says, with evictions and preemptions; without, all is found that ended requests had."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(TextSpec, TextManager)
    sizes = dict(block_size=SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    specs = FullAttentionSpec(**sizes), TextSpec(**sizes), TextSpec(**sizes)
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    manager = KVCacheManager(KVCacheConfig(blocks, [], groups), 512, SIZE, SIZE)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(SIZE, sha256)
    rng = random.Random(0)
    text = lambda most: rng.choices(range(3), k=rng.randrange(most))
    clips = [text(9) + rng.choices([MEDIA, 2000], k=rng.randrange(40)) for _ in range(12)]
    waiting, running, pages, ended, preempted = [], [], {}, [[]], 0
    for i in range(400):
        ids = rng.choice(clips) + rng.choice([[], *clips]) + text(9) + [0]
        waiting.append(Request(str(i), ids, SamplingParams(), None, block_hasher=hasher))
        PartManager.requests[str(i)] = waiting[-1]
    while waiting or running:
        step = []
        for r in [*running, *waiting]:
            found, hit, first = None, 0, r.num_computed_tokens
            if r in waiting:
                if len(running) > 3:
                    break
                found, hit, _ = manager.get_computed_blocks(r)
                same = max(len(os.path.commonprefix([r.all_token_ids[:-1], e])) for e in ended)
                assert blocks == 50 or hit >= same // SIZE * SIZE
            n = min(10, r.num_tokens - first - hit)
            if manager.allocate_slots(r, n, hit, found) is not None:
                step.append((r, first + hit, n))
                if r in waiting:
                    waiting.remove(r)
                    running.append(r)
            elif r in waiting:
                break
            else:
                preempted += 1
                manager.free(r)
                r.num_computed_tokens = 0
                running.remove(r)
                waiting.insert(0, r)
        copies, retained = manager.take_kv_cache_block_copies()
        for copy in copies:
            pages[copy.dst_block_id] = dict(pages[copy.src_block_id])
        for writing in (True, False):
            for r, first, n in step:
                ids = list(r.all_token_ids[: first + n])
                for group in manager.get_blocks(r.request_id).blocks[1:]:
                    for slot, i in enumerate(i for i, token in enumerate(ids) if token < MEDIA):
                        page = pages.setdefault(group[slot // SIZE].block_id, {})
                        if writing and i >= first:
                            page[slot % SIZE] = ids[: i + 1]
                        assert writing or page[slot % SIZE] == ids[: i + 1]
        manager.block_pool.free_blocks(retained)
        for r, first, n in step:
            r.num_computed_tokens = first + n
            if r.num_computed_tokens == r.num_tokens and rng.random() < 0.5:
                manager.free(r)
                running.remove(r)
                ended.append(list(r.all_token_ids))
            elif r.num_computed_tokens == r.num_tokens:
                r.append_output_token_ids(rng.randrange(3))
    assert manager.block_pool.get_num_free_blocks() == blocks - 1
    assert (preempted > 50) == (blocks == 50)


def test_start_up_measures_the_longest_clip(tmp_path, monkeypatch):
    Schedule(16, entering=ENTERING).save(tmp_path / "plan.json")
    monkeypatch.setenv("SEATS_SCHEDULE", str(tmp_path / "plan.json"))
    register()
    folder = full_checkpoint(FOLDER, tmp_path / "model")
    info = MULTIMODAL_REGISTRY.create_processor(ModelConfig(str(folder), max_model_len=256)).info
    width, height = (side // 14 for side in info.get_image_size_with_most_features())
    planner = Planner(info.get_hf_config(), method_of_environment())
    kept = lambda frames: planner.plan((-(-frames // 2), height, width), None, 1.0).budgets[0].keep
    longest = info.get_num_frames_with_most_features(1024, {"video": 1})
    assert sum(kept(longest)) <= 1024 < sum(kept(longest + 2))
    assert info.get_mm_max_tokens_per_item(1024, {"video": 1})["video"] == 1024
    most = info.get_num_frames_with_most_features(32_768, {"video": 1})
    assert most > longest and kept(most)  # as long as its time has positions, else it is refused


def test_second_runner_does_not_wait(monkeypatch):
    "It takes the place of what follows the prompt from the host: positions without values do."
    double = SimpleNamespace(media_ids=(5, 6, 7), width=4)
    with FakeTensorMode():
        ids, positions = torch.ones(9).long(), torch.ones(3, 9).long()
        *_, delta = PrunedOmni.recompute_mrope_positions(double, ids, [], positions, 0)
    state = object.__new__(PrunedOmni.get_model_state_cls())
    known, device = np.array([-40, -7]), np.zeros(2)
    state.rope_state = SimpleNamespace(
        prefill_delta=SimpleNamespace(np=known),
        apply_staged_writes=lambda: np.copyto(device, known),
    )
    stock = lambda self, *given: known.put(1, delta) or given
    monkeypatch.setattr(type(state).__base__, "prepare_inputs_embeds", stock)
    assert state.prepare_inputs_embeds(1, 2) == (1, 2)
    assert device.tolist() == known.tolist() == [-40, -7]


def test_graphs_read_where_they_did(monkeypatch):
    """Doubles of the parts and of steps of six tokens, padded to eight: without media each part
    reads its rows where it did before; with them, the late one runs on text alone and without a
    graph, and so does the mask of the padding."""
    model, seen = type("Model", (late.LateLayers,), dict(__init__=object.__init__))(), []
    model.late, model.split, model.held = 2, [], torch.zeros(8, 4)
    model.language_model = SimpleNamespace(model=SimpleNamespace(norm=lambda h: 2 * h))

    class Part(SimpleNamespace):
        def __call__(self, positions, h):
            assert positions.max() < 8
            mode = context.cudagraph_runtime_mode
            seen.append((mode.name, len(h), positions.data_ptr(), h.data_ptr()))
            return h + 1

    model.parts = [Part(first=0), Part(first=2)]
    positions, steps = torch.zeros(3, 8).long(), []
    for text in (range(6), range(6), (0, 3, 5), ()):
        here = slice(None) if len(text) == 6 else list(text)
        context = SimpleNamespace(attn_metadata=True, is_padding=torch.arange(8) > 5)
        context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        monkeypatch.setattr(late, "get_forward_context", lambda: context)
        model._rows = lambda *given: (6, {False: torch.tensor(text).long()})
        rows, wanted = torch.randn(8, 4), torch.zeros(8, 4)
        wanted[here] = 2 * rows[here] + 4
        positions[:, :6] = torch.arange(6) << 32
        assert torch.allclose(model.forward(None, positions, None, rows), wanted)
        assert len(context.is_padding) == len(wanted[here])
        steps.append(list(seen))
        seen.clear()
    whole, again, some, none = steps
    assert whole == again and some[:1] == none == whole[:1]
    assert whole[1][:2] == ("PIECEWISE", 8) and some[1][:2] == ("NONE", 3)


@pytest.mark.skipif(shutil.which("patch") is None, reason="no patch")
@pytest.mark.parametrize("name", ["pruning_registry", "encoder_budget", "positions_on_cpu"])
def test_what_is_sent_upstream_applies(name):
    text = (TESTS.parent / "docs" / "upstream" / f"{name}.md").read_text()
    site = Path(importlib.util.find_spec("vllm").origin).parents[1]
    command = ["patch", "-p1", "--fuzz=0", "--dry-run", "-d", site]
    diff = text.split("```diff\n")[1].split("```")[0]
    run = subprocess.run(command, input=diff, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
