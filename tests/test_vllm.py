"""Stages I and III in an unmodified vLLM against `prune` in transformers, on the testbeds.

`make test-vllm` runs this in an environment of its own; SEATS_TESTBED names another testbed.
"""

import base64
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

import torch

from seats_analysis.models.encode import Prompt, encode
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule
from seats_analysis.serving.vllm import cache_bytes, late_layers
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.load import load_testbed, testbed_samples
from vllm_folder import full_checkpoint
from vllm_worker import answers_to

TESTS = Path(__file__).parent
FOLDER = shipped_folder("testbed") / "qwen2.5-omni"
QUESTIONS, TOKENS, CLOSE = int(os.environ.get("SEATS_QUESTIONS", 100)), 3, 1e-3
ENTERING = {"visual": 0.125, "audio": 0.4}
CHUNKS = dict(some=16, all=32)  # of the prefill: shorter than what stays of a clip's windows
FORKS = multiprocessing.get_context("forkserver")  # vLLM is imported once
FORKS.set_forkserver_preload(["vllm.entrypoints.llm"])
os.environ |= dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # without inductor


@pytest.fixture(scope="module")
def testbed():
    model, processor = load_testbed()
    model.generation_config.eos_token_id = None  # as many tokens for every request
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return full_checkpoint(FOLDER, tmp_path_factory.mktemp("testbed"))


@pytest.fixture(scope="module")
def schedules(testbed, tmp_path_factory):
    "Stage I only, other settings, and everything kept: as objects and as files."
    layers, made = testbed[0].config.text_config.num_hidden_layers, {}
    ratios = dict(some=ENTERING, fewer={"visual": 0.06, "audio": 0.4}, all=None)
    for name, entering in ratios.items():
        path = tmp_path_factory.mktemp("schedules") / f"{name}.json"
        made[name] = Schedule(layers, entering=entering), path
        made[name][0].save(path)
    return made


# ---------------------------------------------------------------- requests


def clip_of(sample, **changes):
    return replace(*sample.load_media(2.0, 16_000, None, None), **changes)


def samples():
    return testbed_samples("test", limit=QUESTIONS)


def request_of(processor, prompt, interleave=True, **settings):
    "A `Prompt` as vLLM takes it."
    media, content = {}, []
    for part in prompt.content:
        if isinstance(part, str):
            content.append(dict(type="text", text=part))
        elif isinstance(part, np.ndarray):
            content.append(dict(type="image"))
            media.setdefault("image", []).append(part)
        else:
            seen, heard = part.frames is not None, part.waveform is not None
            content += [dict(type="video")] * seen
            content += [dict(type="audio")] * (heard and not (seen and interleave))
            if seen:
                media.setdefault("video", []).append(np.asarray(part.frames))
                settings["fps"] = float(part.fps)
            if heard:
                media.setdefault("audio", []).append((part.waveform, 16_000))
            settings["use_audio_in_video"] = seen and heard and interleave
    turn = [dict(role="user", content=content)]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    made = dict(prompt=text)
    return made | (dict(multi_modal_data=media, mm_processor_kwargs=settings) if media else {})


@pytest.fixture(scope="module")
def kinds():
    "Name -> (Prompt, whether audio lies between the frames)."
    a, b, c = (clip_of(s) for s in samples()[::4][:3])
    half = replace(b, frames=b.frames[:8], waveform=b.waveform[: len(b.waveform) // 2])
    image = np.asarray(a.frames[3])[:84, :56].copy()
    ask = "what colour is the first object ?"
    prompts = dict(
        video_with_audio=((a, ask), True),
        video_then_audio=((a, ask), False),
        video=((replace(a, waveform=None), ask), True),
        audio=((replace(b, frames=None), ask), True),
        two_clips=((a, "then", half, ask), True),
        two_videos=((replace(c, waveform=None), replace(half, waveform=None), ask), True),
        text=((ask,), True),
        image=((image, ask), True),
        image_and_clip=((image, "then", half, ask), True),
        clip_and_image=((c, image, ask), True),
        short_clip=((half, ask), True),
        long_text=((half, *[ask] * 15), True),
        slow=((replace(a, fps=1.0), ask), True),
        odd=((replace(c, fps=1.3), ask), True),
        fast=((replace(a, fps=4.0), ask), True),
    )
    return {name: (Prompt(name, parts), how) for name, (parts, how) in prompts.items()}


# ---------------------------------------------------------------- both sides


def reference(testbed, prompt, schedule, interleave=True, tokens=TOKENS):
    "transformers under `prune`: generated ids, log-probabilities, kept media positions."
    model, processor = testbed
    batch = encode(model, processor, [prompt], interleave=interleave)
    with torch.no_grad(), prune(model, schedule) as run:
        out = model.generate(
            **batch.inputs,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    stays = run.kept.get("stage1", [torch.arange(batch.shape[1])])[0].tolist()
    ids, media = batch.inputs["input_ids"][0].tolist(), batch.layout.visual | batch.layout.audio
    c = model.config
    first = min(
        (ids.index(i) for i in (c.vision_start_token_id, c.audio_start_token_id) if i in ids),
        default=0,
    )
    return dict(
        ids=out.sequences[0, batch.shape[1] :].tolist(),
        logprobs=torch.stack(out.logits).log_softmax(-1)[:, 0].numpy(),
        prompt=len(stays),
        kept=[i - first for i in stays if media[0, i]],
    )


def engine(folder, batches, schedule=None, env=None, tokens=TOKENS, **settings):
    "A future of the batches, one after the other, in an engine of their own."
    defaults = dict(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        block_size=32,
        max_logprobs=-1,
        mm_processor_kwargs=dict(do_resize=False),
        limit_mm_per_prompt=dict(video=2, audio=2, image=2),
    )
    job = dict(engine=defaults | settings, batches=batches, tokens=tokens)
    pool = ProcessPoolExecutor(1, FORKS)
    found = pool.submit(answers_to, job | dict(env=environment(schedule) | (env or {})))
    pool.shutdown(wait=False)
    return found


def environment(schedule, plugins=None):
    # the plug-in as it is installed
    without = "SEATS_SCHEDULE", "SEATS_VLLM_LATE", "VLLM_PLUGINS", "PYTHONPATH"
    env = {k: v for k, v in os.environ.items() if k not in without}
    env |= {} if schedule is None else dict(SEATS_SCHEDULE=str(schedule))
    return env | ({} if plugins is None else dict(VLLM_PLUGINS=plugins))


def difference(got, want):
    "Largest difference of log-probabilities, up to the first token that is not the same."
    same = [a == b for a, b in zip(got["ids"], want["ids"])]
    n = same.index(False) + 1 if False in same else len(same)
    vocabulary = want["logprobs"].shape[1]
    return np.abs(got["logprobs"][:n, :vocabulary] - want["logprobs"][:n]).max()


def assert_equal(answers, references):
    off = {}
    for i, (got, want) in enumerate(zip(answers, references, strict=True)):
        if got["prompt"] != want["prompt"] or difference(got, want) > CLOSE:
            off[i] = got["prompt"], want["prompt"], difference(got, want)
    assert not off, off


# ---------------------------------------------------------------- in the engine's process


def pairs(of):  # questions -> first and last question on each clip
    by_clip = {}
    for s in of:
        by_clip.setdefault(s.video, []).append(s)
    return [(on[0], on[-1]) for on in by_clip.values()]


@pytest.mark.parametrize("name", ["some", "all"])
def test_answers_are_those_of_prune(name, testbed, folder, schedules, kinds):
    """Every kind of request alone, in chunks that are shorter than a window; two questions on each
    of 20 clips, of which the second hits the prefix, and a clip laid out otherwise, which does not;
    every kind in one batch of different lengths; all questions, eight at a time."""
    schedule, path = schedules[name]
    ask = lambda sample: Prompt(sample.id, (clip_of(sample), sample.prompt_text))
    asked = [ask(s) for s in samples()]
    twice = [ask(s) for pair in pairs(samples())[-20:] for s in pair]
    media, text = twice[0].content
    twice.append(Prompt("otherwise", (replace(media, fps=1.0), text)))
    requests = [request_of(testbed[1], p, how) for p, how in kinds.values()]
    alone = requests + [request_of(testbed[1], p) for p in twice]
    batches = [[r] for r in alone] + [requests, [request_of(testbed[1], p) for p in asked]]
    found = engine(folder, batches, path, max_num_batched_tokens=CHUNKS[name])
    wanted = [reference(testbed, p, schedule, how) for p, how in kinds.values()]
    by_id = {p.id: reference(testbed, p, schedule) for p in [*asked, twice[-1]]}
    found = found.result()
    assert_equal(found[-2]["answers"], wanted)
    assert_equal(found[-1]["answers"], [by_id[p.id] for p in asked])
    wanted += [by_id[p.id] for p in twice]
    assert_equal([f["answers"][0] for f in found[:-2]], wanted)
    for kind, batch, want in zip(kinds, found, wanted):
        if "image" not in kind and "two" not in kind and batch["kept"]:  # else known, or several
            assert kind == "video_then_audio" or batch["kept"] == [want["kept"]], kind
    found, wanted = found[len(kinds) : -2], wanted[len(kinds) :]
    for first, second, want in zip(found[::2], found[1::2], wanted[::2]):
        assert first["kept"] == [want["kept"]] and not second["kept"]
        assert second["answers"][0]["cached"] > 16 > first["answers"][0]["cached"]
    assert found[-1]["kept"] == [wanted[-1]["kept"]]


def test_settings_are_in_the_key(testbed, schedules):
    from seats_analysis.pruning.seats import Seats
    from seats_analysis.serving.vllm import Planner

    keys = {Planner(testbed[0].config, Seats(s)).key for s, _ in schedules.values()}
    assert len(keys) == len(schedules)


def test_switched_off_changes_nothing(testbed, folder, kinds):
    """Installed without a schedule, even with stage III asked for, against not loaded at all: equal
    to the last bit; both close to transformers without `prune`, but for vLLM's own positions of a
    video with its audio."""
    names = "video_with_audio", "video", "audio", "image", "text"
    asked = [kinds[name] for name in names]
    requests = [request_of(testbed[1], *kind) for kind in asked]
    on = dict(VLLM_PLUGINS="seats", SEATS_VLLM_LATE="1")
    both = [engine(folder, [requests], env=env) for env in (on, dict(VLLM_PLUGINS="none"))]
    (off,), (without,) = (found.result() for found in both)
    for a, b in zip(off["answers"], without["answers"], strict=True):
        assert a["ids"] == b["ids"] and a["prompt"] == b["prompt"]
        assert np.array_equal(a["logprobs"], b["logprobs"])
    whole = Schedule(testbed[0].config.text_config.num_hidden_layers, entering=None)
    wanted = [reference(testbed, prompt, whole, how) for prompt, how in asked]
    assert_equal(off["answers"][1:], wanted[1:])


def test_refused_at_the_start(folder, tmp_path):
    plan = Schedule(LAYERS, entering=ENTERING, cache=dict.fromkeys(ENTERING, (0, 4)))
    cases = {
        "3 layers": (Schedule(3, entering=ENTERING), {}),
        "enable_prefix_caching is True, but the schedule's": (plan, dict(SEATS_VLLM_LATE="1")),
    }
    for said, (schedule, env) in cases.items():
        schedule.save(tmp_path / "plan.json")
        with pytest.raises(ValueError, match=said):
            engine(folder, [], tmp_path / "plan.json", env).result()


def test_refused_without_an_engine(monkeypatch):
    from seats_analysis.serving.omni import PrunedOmni, PrunedProcessor
    from seats_analysis.serving.vllm import register

    monkeypatch.setenv("SEATS_SCHEDULE", "plan.json")
    with pytest.raises(ValueError, match="plan.json"):
        register()
    two = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=2), compilation_config=object
    )
    with pytest.raises(ValueError, match="tensor_parallel_size is 2"):
        PrunedOmni(vllm_config=two)
    processor = object.__new__(PrunedProcessor)
    with pytest.raises(ValueError, match="send the video itself"):
        processor._get_mm_fields_config({"video_embeds": None}, {})
    processor.info = SimpleNamespace(ctx=SimpleNamespace(get_merged_mm_kwargs=dict))
    uneven = SimpleNamespace(
        hf_processor_mm_kwargs=dict(use_audio_in_video=True),
        mm_data_items=dict(video=[0, 0], audio=[np.zeros(9)]),
    )
    with pytest.raises(ValueError, match="2 videos and 1 audio tracks"):
        processor.apply(uneven, None)


def test_media_are_encoded_one_by_one():
    "A batch of several, as the second runner makes it: each clip with its own track and rate."
    from seats_analysis.serving.omni import PrunedOmni

    seen = []
    double = SimpleNamespace(_select=lambda *medium: seen.append(medium))
    for modality in ("image", "video", "audio"):
        name = f"_parse_and_validate_{modality}_input"
        setattr(double, name, partial(getattr(PrunedOmni, name), double))
    grids, lengths = torch.tensor([[2, 4, 4], [1, 2, 4], [3, 2, 2]]), torch.tensor([7, 4, 9])
    pixels = [torch.randn(n, 6) for n in (32, 8, 12)]
    sounds = [torch.randn(5, n) for n in (7, 4, 9)]
    rates = 1.0, 0.5, 2.0
    videos = dict(pixel_values_videos=torch.cat(pixels), video_grid_thw=grids)
    videos |= dict(second_per_grid_ts=torch.tensor(rates))
    tracks = dict(clip_audio_features=torch.cat(sounds, 1), clip_audio_lengths=lengths)
    alone = dict(input_audio_features=torch.cat(sounds, 1), audio_feature_lengths=lengths)
    alone |= dict(feature_attention_mask=torch.ones(3, 9))
    for given in (videos | tracks, videos, alone):
        seen.clear()
        assert len(PrunedOmni.embed_multimodal(double, **given)) == len(seen) == 3
        for i, (clip, track, seconds) in enumerate(seen):
            assert seconds == (None if given is alone else rates[i])
            assert (clip is None) == (given is alone) and (track is None) == (given is videos)
            for got, want in (
                (clip, (grids[i : i + 1], pixels[i])),
                (track, (lengths[i], sounds[i])),
            ):
                assert got is None or all(map(torch.equal, got, map(torch.atleast_1d, want)))


# ---------------------------------------------------------------- stage III

LAYERS = 16  # of both testbeds
STAGE_3 = dict(  # family, plan, tokens of an answer, settings of the engine
    chunks=("qwen2.5-omni", dict(late_start={"visual": 9, "audio": 10}), TOKENS, {}),
    preempted=(  # two groups of whole layers, one for the prompt, six of text
        "qwen2.5-omni",
        dict(late_start=6, cache={"visual": (0, 4), "audio": (0, 4)}),
        24,
        dict(max_model_len=256, num_gpu_blocks_override=90),
    ),
    nowhere=("qwen2.5-omni", dict(cache={"visual": (0, 0), "audio": (0, 0)}), 8, {}),
    qwen3=("qwen3-omni", dict(late_start=4), TOKENS, {}),
    compiled=("qwen2.5-omni", dict(late_start=9), TOKENS, dict(enforce_eager=False)),
    compiled3=("qwen3-omni", dict(late_start=2), TOKENS, dict(enforce_eager=False)),
)


@pytest.mark.parametrize("case", STAGE_3)
def test_stage_3_is_that_of_prune(case, kinds, tmp_path):
    """Questions and every kind of request in one batch, read in chunks that end anywhere; alone, a
    request takes as many blocks as `cache_bytes` says. Parts that vLLM compiles are traced only,
    or compiled: VLLM_CPU_CI_ENV=0 python tests/run_vllm.py -k compiled."""
    family, plan, tokens, settings = STAGE_3[case]
    testbed = load_testbed(family)
    testbed[0].generation_config.eos_token_id = None
    folder = full_checkpoint(shipped_folder("testbed") / family, tmp_path / "model")
    given = Schedule(LAYERS, entering=ENTERING if family == "qwen2.5-omni" else None, **plan)
    given.save(tmp_path / "plan.json")
    late, split, _ = late_layers(given)
    wanted = replace(given, late_start=late, trr=None, scale=None)
    few = samples()[: 20 if split else None]
    asked = [(Prompt(s.id, (clip_of(s), s.prompt_text)), True) for s in few]
    if family == "qwen3-omni":  # there, vLLM's own towers hear audio a little otherwise
        silent = [(replace(p.content[0], waveform=None), p.content[1]) for p, _ in asked]
        asked = [(Prompt("silent", parts), True) for parts in silent] + [kinds["image"]]
    else:
        asked += [k for name, k in kinds.items() if not split or "two" not in name]
    caching = "cache" not in plan  # then the first request is found again in the batch
    settings = dict(max_num_batched_tokens=24, enable_prefix_caching=caching) | settings
    requests = [request_of(testbed[1], *question) for question in asked]
    env = dict(SEATS_VLLM_LATE="1")
    batches = [requests[:1], requests]
    found = engine(folder, batches, tmp_path / "plan.json", env, tokens, **settings)
    references = [reference(testbed, p, wanted, how, tokens) for p, how in asked]
    alone, found = found.result()
    assert_equal(alone["answers"] + found["answers"], references[:1] + references)
    assert (found["answers"][0]["cached"] > 0) == settings["enable_prefix_caching"]
    assert (found["preempted"] > 0) == (case == "preempted")
    n = references[0]["prompt"]
    text = n - len(references[0]["kept"]) + tokens - 1
    kinds_of = dict(whole=late - len(split), prompt=len(split), text=LAYERS - late + len(split))
    held = dict(whole=n + tokens - 1, prompt=0, text=text)
    size = cache_bytes(kinds_of, dict.fromkeys(held, 1), 1, 1) // len(alone["left"])
    assert sum(alone["left"]) * size * 32 == cache_bytes(kinds_of, held, 32, 1)


def medium(modality, offset, length, is_embed=None):
    from vllm.multimodal.inputs import PlaceholderRange

    where = PlaceholderRange(offset, length, is_embed)
    return SimpleNamespace(modality=modality, mm_position=where)


def test_marks_of_tokens(monkeypatch):
    """Of a prompt of 16 and its answer: in the scheduler, in the first runner, and in a double of
    the second, which needs a GPU. An image stays; a clip has text of its own, and holds audio."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState as Stock

    from seats_analysis.serving import late

    media = [
        medium("image", 2, 3),
        medium("video", 7, 4, torch.tensor([1, 0, 1, 1]).bool()),
        medium("audio", 7, 4, torch.zeros(4).bool()),
        medium("audio", 12, 2),
    ]
    gone = 7, 9, 10, 12, 13
    wanted = [4 * sum(j < i for j in gone) + 2 * (i in gone) + (i < 16) for i in range(22)]
    marks = late.marks_of(16, media)
    manager = object.__new__(late.PartManager)
    request = type("Request", (), dict(num_prompt_tokens=16, marks=marks))()
    manager.requests["a"] = request
    for prompt in (True, False):
        manager.kv_cache_spec = SimpleNamespace(prompt=prompt)
        for n in range(20):
            text = sum(i not in gone for i in range(n))
            assert manager._held("a", n) == (min(n, 16) if prompt else text)

    class Stage(SimpleNamespace):
        def get_mrope_input_positions(self, tokens, features):
            return torch.arange(len(tokens)).repeat(3, 1), 5

    Model = type("Model", (late.LateLayers, Stage), dict(__init__=Stage.__init__))
    model = Model(engine=SimpleNamespace(use_v2_model_runner=False))
    positions, delta = model.get_mrope_input_positions([0] * 16, media)
    plain = torch.tensor([*range(16), *range(21, 27)])
    answer = torch.arange(16, 22) + torch.tensor(delta)
    assert (
        torch.cat([positions[0], answer]).tolist()
        == (plain + (torch.tensor(wanted) << 32)).tolist()
    )
    model.engine.use_v2_model_runner = True
    assert int(model.get_mrope_input_positions([0] * 16, media)[0].max()) == 15
    state = object.__new__(model.get_model_state_cls())
    monkeypatch.setattr(Stock, "add_request", lambda *given: None)
    state.add_request(7, SimpleNamespace(prompt_token_ids=[0] * 16, mm_features=media))
    for begin, end in ((0, 9), (9, 16), (14, 20)):
        made = dict(positions=plain[begin:end].repeat(3, 1))
        monkeypatch.setattr(Stock, "prepare_inputs", lambda *given, made=made: made)
        names = "idx_mapping_np", "num_computed_tokens_np", "num_scheduled_tokens"
        counts = np.array([[7], [begin], [end - begin]], np.int32)
        batch = SimpleNamespace(**dict(zip(names, counts)))
        got = state.prepare_inputs(batch, None)["positions"][0]
        assert torch.equal(got % 2**32, plain[begin:end])
        assert (got >> 32).tolist() == wanted[begin:end]


# ---------------------------------------------------------------- the server


class Server:
    "`vllm serve` in a process group of its own."

    env = {}  # besides

    def __init__(self, folder, schedule, log, *options):
        self.log = log
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        settings = dict(do_resize=False, fps=2.0, use_audio_in_video=True)
        # `vllm serve` asks for the version of a package that vllm-cpu does not bring along
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder), "--port", str(self.port), "--dtype", "float32"]
        command += ["--enforce-eager"]
        command += ["--max-model-len", "1024", "--max-num-batched-tokens", "64"]
        command += ["--mm-processor-kwargs", json.dumps(settings), "--served-model-name", "omni"]
        command += options
        self.process = subprocess.Popen(
            command,
            env=environment(schedule, "seats") | self.env,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )

    def ready(self):
        until = time.monotonic() + 1200
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.get("health")
                return self
            except OSError:
                time.sleep(0.5)
        self.stop(signal.SIGKILL)
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, page):
        url = f"http://127.0.0.1:{self.port}/{page}"
        return urllib.request.urlopen(url, timeout=60).read().decode()

    def post(self, body):
        "The open response to a chat request."
        body = dict(model="omni", temperature=0, max_tokens=1) | body
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=300
        )

    def ask(self, body):
        return json.load(self.post(body))

    def stop(self, how=signal.SIGTERM):
        try:
            os.killpg(self.process.pid, how)
        except ProcessLookupError:
            pass
        self.process.wait(60)


def wav(waveform, rate=16_000):
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((waveform * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def chat(sample, audio=True, **more):
    "A question by `video_url` and, where asked for, `input_audio`."
    code = lambda data: base64.b64encode(data).decode()
    video = f"data:video/mp4;base64,{code(Path(sample.video).read_bytes())}"
    parts = [dict(type="video_url", video_url=dict(url=video))]
    if audio:
        track = dict(data=code(wav(clip_of(sample).waveform)), format="wav")
        parts.append(dict(type="input_audio", input_audio=track))
    parts.append(dict(type="text", text=sample.prompt_text))
    return dict(messages=[dict(role="user", content=parts)]) | more


WITHIN = dict(mm_processor_kwargs=dict(use_audio_in_video=True))  # asked for by the client


def refused(server, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.ask(body)
    return json.load(error.value)["error"]["message"]


def page():
    page = json.loads((TESTS.parent / "nbs/tutorials/07_serve_with_vllm.ipynb").read_text())
    return "\n".join("".join(cell["source"]) for cell in page["cells"])


def tutorial(server, sample, folder, without):
    "The tutorial's lines with these servers, clip and question in them: usages by client and curl."
    (folder / "clip.mp4").write_bytes(Path(sample.video).read_bytes())
    (folder / "clip.wav").write_bytes(wav(clip_of(sample).waveform))
    text = page()
    here = {
        "port in 8000 8001": f"port in {server.port} {without.port}",
        "localhost:8000": f"127.0.0.1:{server.port}",
        "localhost:$port": "127.0.0.1:$port",
        "Qwen/Qwen2.5-Omni-7B": "omni",
        "https://example.org": f"file://{folder}",
        "What is said while the door opens?": sample.prompt_text,
    }
    for name, own in here.items():
        text = text.replace(name, own)
    blocks = re.findall(r"```(?:bash|python)\n((?:curl|for port|from openai).*?)```", text, re.S)
    curl, client, both = blocks
    names = {}
    exec(client, names)
    yield names["answer"].usage.prompt_tokens
    for command in (curl, both) if shutil.which("curl") else ():
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        for line in run.stdout.split("\n"):
            if line:
                yield json.loads(line)["usage"]["prompt_tokens"]


def odd_requests(sample):
    "Requests that are refused, with what is said; sounds of other rates, which are not."
    waveform = clip_of(sample).waveform

    def sounding(samples, rate=16_000, video=True):
        body = chat(sample)
        parts = body["messages"][0]["content"]
        parts[1]["input_audio"]["data"] = base64.b64encode(wav(samples, rate)).decode()
        del parts[: not video]
        return body

    wrong = [
        (chat(sample, audio=audio, mm_processor_kwargs=dict(fps=fps)), "from its fps")
        for audio in (True, False)
        for fps in (1e-9, -1.0, float("nan"))
    ]
    for video in (True, False):
        wrong.append((sounding(waveform[:0], video=video), "audio 1 is empty"))
        wrong.append((sounding(waveform[:800], video=video), "1 mel frames"))
    right = []
    for rate in (8_000, 44_100, 48_000):
        time = np.arange(len(waveform) * rate // 16_000) * 16_000 / rate
        resampled = np.interp(time, np.arange(len(waveform)), waveform)
        right.append(sounding(resampled, rate))
    return wrong, right


def test_server(testbed, folder, schedules, tmp_path):
    """Eight at a time, streamed, over HTTP; a refused request harms nobody; killed in mid-request,
    it starts again and answers as before; the tutorial's comparison with a server without."""
    schedule, path = schedules["some"]
    asked = samples()[:16]
    server = Server(folder, path, tmp_path / "first.log")
    try:
        wanted = [
            reference(testbed, Prompt(s.id, (clip_of(s), s.prompt_text)), schedule) for s in asked
        ]
        server.ready()
        found = [None] * len(asked)

        def ask(of):
            for i in range(of, len(asked), 8):
                found[i] = server.ask(chat(asked[i]))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert [f["usage"]["prompt_tokens"] for f in found] == [w["prompt"] for w in wanted]
        words = [f["choices"][0]["message"]["content"] for f in found]
        assert [w.strip() for w in words] == [
            testbed[1].tokenizer.decode(w["ids"][:1]).strip() for w in wanted
        ]
        silent = chat(asked[0], audio=False)
        alone = Prompt("alone", (clip_of(asked[0], waveform=None), asked[0].prompt_text))
        got = server.ask(silent)["usage"]["prompt_tokens"]
        assert got == reference(testbed, alone, schedule)["prompt"]
        assert "trust-request" in refused(server, silent | WITHIN)
        long = dict(stream=True, max_tokens=400, ignore_eos=True)
        lines = iter(server.post(chat(asked[0], **long)))
        assert next(lines).startswith(b"data: ")
    finally:
        server.stop(signal.SIGKILL)
    options = "--trust-request-mm-kwargs", "--allowed-local-media-path", str(tmp_path)
    server = Server(folder, path, tmp_path / "second.log", *options)
    *_, settings = re.findall("--mm-processor-kwargs '(.*)'", page())
    options += "--mm-processor-kwargs", json.dumps(json.loads(settings) | dict(do_resize=False))
    without = Server(folder, None, tmp_path / "third.log", *options)
    try:
        server.ready()
        streamed = server.post(chat(asked[1], stream=True)).read().decode()
        assert json.dumps(words[1]) in streamed
        assert server.ask(chat(asked[0]))["usage"] == found[0]["usage"]
        trusted = server.ask(chat(asked[1], audio=False, **WITHIN))  # audio from the video's file
        assert trusted["choices"][0]["message"]["content"] == words[1]
        assert trusted["usage"] == found[1]["usage"]
        assert "1 videos and 2 audio tracks" in refused(server, chat(asked[1], **WITHIN))
        wrong, right = odd_requests(asked[0])
        for body, said in wrong:
            message = refused(server, body)
            assert said in message and "\n" not in message and len(message) < 200
        for body in right:
            assert server.ask(body)["usage"]["prompt_tokens"] == wanted[0]["prompt"]
        without.ready()
        found = [*tutorial(server, asked[2], tmp_path, without)]
        found.append(without.ask(chat(asked[2]))["usage"]["prompt_tokens"])
        whole = encode(*testbed, [Prompt("whole", (clip_of(asked[2]), asked[2].prompt_text))])
        pruned, unpruned = wanted[2]["prompt"], whole.shape[1]
        many = bool(shutil.which("curl"))
        assert found == [pruned] * (1 + 2 * many) + [unpruned] * (1 + many)
    finally:
        server.stop()
        without.stop()


def test_stage_3_in_a_server(tmp_path, monkeypatch):
    "Of either family: there the scheduler has a process of its own. Somebody hangs up."
    env = dict(SEATS_VLLM_LATE="1", VLLM_LOGGING_LEVEL="INFO")
    monkeypatch.setattr(Server, "env", env)
    silent = "--mm-processor-kwargs", '{"do_resize": false, "fps": 2}'
    long = dict(stream=True, max_tokens=400, ignore_eos=True)
    servers = {}
    try:
        for family, entering in {"qwen2.5-omni": ENTERING, "qwen3-omni": None}.items():
            schedule = Schedule(LAYERS, late_start=4, entering=entering)
            schedule.save(tmp_path / f"{family}.json")
            folder = full_checkpoint(shipped_folder("testbed") / family, tmp_path / family)
            given = folder, tmp_path / f"{family}.json", tmp_path / f"{family}.log"
            servers[family] = schedule, Server(*given, *() if entering else silent)
        for family, (schedule, server) in servers.items():
            sound = family == "qwen2.5-omni"
            testbed = load_testbed(family)
            testbed[0].generation_config.eos_token_id = None
            server.ready()
            server.post(chat(samples()[0], sound, **long)).close()
            for s in samples()[:4]:
                clip = clip_of(s) if sound else clip_of(s, waveform=None)
                want = reference(testbed, Prompt(s.id, (clip, s.prompt_text)), schedule)
                got = server.ask(chat(s, sound, max_tokens=TOKENS, ignore_eos=True))
                assert got["usage"]["prompt_tokens"] == want["prompt"]
                words = testbed[1].tokenizer.decode(want["ids"], skip_special_tokens=True)
                assert got["choices"][0]["message"]["content"].split() == words.split()
            assert "stage III: 12 of 16 layers hold no media" in server.log.read_text()
    finally:
        for _, server in servers.values():
            server.stop()
