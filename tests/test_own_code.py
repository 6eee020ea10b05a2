"""`prune` in transformers code of one's own: every feature works, or is refused in one line. The
table that the tutorial `nbs/tutorials/09_your_code.ipynb` prints is `FEATURES` here, the list that
these tests run.

Works means: the answer is that of plain greedy generation under the same plan; or, where a feature
changes the weights or who computes with them, the logits are those of a plain loop without hooks
(`naive.py`)."""

import copy
import inspect
import json
import queue
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import naive
import pytest
import tiny
import torch
from tiny import close
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, pipeline

from seats_analysis import (
    Schedule,
    adapter_for,
    encode,
    follow_up,
    load_model,
    prune,
    testbed_samples,
)
from seats_analysis.pruning.session import as_pruner
from seats_analysis.serving.pipeline import TASK

PLAN, NEW = tiny.PLANS["together"], 5
GREEDY = dict(
    max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=list(range(10))
)
WHOLE = dict(return_dict_in_generate=True)
CLIP = tiny.clip(4, 3)
QUESTION = "assistant what colour is the circle ?"


@dataclass(frozen=True)
class Feature:
    "A row of the table."

    name: str
    code: str  # what it is in code
    refused: str  # words of the message; "" = works
    note: str
    run: Callable  # (Case) -> tokens of the answer, or None where it has checked by itself


FEATURES = []


def feature(name, code, refused="", note=""):
    "Add a row; the function under it tests it."

    def add(run):
        FEATURES.append(Feature(name, code, refused, note, run))
        return run

    return add


@dataclass(frozen=True)
class Case:
    "A small model of a family, and one question on a clip."

    family: str
    model: object
    processor: object
    one: object  # `Encoded`

    def answer(self, inputs=None, model=None, **options):
        "What is generated under the plan."
        given = self.one.inputs if inputs is None else inputs
        with prune(self.model, PLAN):
            out = (model or self.model).generate(**given, **GREEDY | options)
        return out[:1, self.one.shape[1] :]

    def as_naive(self, changed=None, call=None):
        "Check a changed model against a plain loop over its layers."
        model = changed or self.model
        with prune(model, PLAN) as run:
            logits = (call or model)(**self.one.inputs).logits[:, -1]
        kept, _, want = naive.prefill(model, self.one, PLAN)
        close(logits, want, 1e-4)
        assert {stage: rows[0].tolist() for stage, rows in run.kept.items()} == kept

    def processed(self):
        "As the processor makes them, with a chat template; no function of ours."
        content = [dict(type="video"), dict(type="text", text=QUESTION)]
        turn = [dict(role="user", content=content)]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        if hasattr(self.processor, "load_audio_from_video"):  # transformers 5.23
            sound = dict(load_audio_from_video=True, audio_from_video_indices=[0])
        else:
            sound = dict(use_audio_in_video=True)
        frames = torch.as_tensor(CLIP.frames).permute(0, 3, 1, 2)
        rates = adapter_for(self.model).rates(self.model)
        own = self.processor.video_processor  # transformers' defaults would win over its settings
        size = dict(size=dict(own.size))
        if hasattr(own, "cap_pixels_per_frame"):
            size |= dict(cap_pixels_per_frame=own.cap_pixels_per_frame or False)
        inputs = self.processor(
            text=[text],
            videos=[frames],
            audio=[CLIP.waveform],
            videos_kwargs=dict(fps=CLIP.fps, do_sample_frames=False, **size),
            audio_kwargs=dict(truncation=False),
            position_id_per_seconds=rates.positions_per_second,
            seconds_per_chunk=rates.seconds_per_chunk,
            return_tensors="pt",
            **sound,
        )
        return dict(inputs) | dict(use_audio_in_video=True)


# ---------------------------------------------------------------- inputs and answers


@feature(
    "the processor's own inputs, by a chat template",
    "processor(text=[template], videos=..., audio=..., ...)",
    note="with the sound of the video: `load_audio_from_video=True, audio_from_video_indices=[0]` "
    "(5.23) or `use_audio_in_video=True` (5.17), and `use_audio_in_video=True` for `generate`",
)
def own_inputs(case):
    return case.answer(case.processed())


@feature(
    "embeddings without ids",
    "model(inputs_embeds=...)",
    "reads from `input_ids` which positions",
    "pass `input_ids` as well",
)
def embeddings(case):
    width = case.model.config.get_text_config().hidden_size
    with prune(case.model, PLAN):
        case.model(inputs_embeds=torch.zeros(1, 4, width))


@feature("sampling", "generate(do_sample=True)", note="`top_k=1` is greedy")
def sampling(case):
    return case.answer(do_sample=True, top_k=1)


@feature("beams", "generate(num_beams=3)", note="one beam is greedy")
def beams(case):
    with prune(case.model, PLAN):
        found = case.model.generate(**case.one.inputs, **GREEDY | dict(num_beams=3))
    assert found.shape == (1, case.one.shape[1] + NEW)
    return case.answer(num_beams=1)


@feature("a streamer, read in the block", "generate(streamer=TextIteratorStreamer(...))")
def streamer(case):
    stream = TextIteratorStreamer(case.processor.tokenizer, skip_prompt=True)
    with prune(case.model, PLAN):
        options = {**case.one.inputs, **GREEDY, "streamer": stream}
        Thread(target=case.model.generate, kwargs=options).start()
        text = "".join(stream)
    return torch.tensor([case.processor.tokenizer(text).input_ids])


@feature(
    "a thread that goes on after the block",
    "with prune(...): thread.start()",
    "left while a thread was generating",
    "read the streamer to its end within the block",
)
def thread(case):
    tokens = queue.Queue()

    class Streamer:
        put = tokens.put

        def end(self):
            pass

    def work():
        with pytest.raises(ValueError, match="left while a thread"):
            case.model.generate(
                **{**case.one.inputs, **GREEDY, "max_new_tokens": 99}, streamer=Streamer()
            )

    worker = Thread(target=work)
    try:
        with prune(case.model, PLAN):
            worker.start()
            tokens.get()
            tokens.get()
    finally:
        worker.join(60)


@feature("several turns", "generate(**follow_up(cache, conversation))")
def turns(case):
    with prune(case.model, PLAN):
        out = case.model.generate(**case.one.inputs, **GREEDY, **WHOLE)
        more = torch.cat([out.sequences, out.sequences[:, -4:]], 1)
        again = case.model.generate(**follow_up(out.past_key_values, more), **GREEDY)
    assert torch.equal(again[:, : more.shape[1]], more)
    return out.sequences[:, case.one.shape[1] :]


@feature("prompt lookup", "generate(prompt_lookup_num_tokens=3)", note='not with `kv="evict"`')
def lookup(case):
    return case.answer(prompt_lookup_num_tokens=3)


@feature(
    "an assistant model",
    "generate(assistant_model=small)",
    note="outside of the block; `generate` shows it no media, so it guesses from text",
)
def assistant(case):
    small = tiny.thinker(case.family, layers=2)
    small.generation_config.num_assistant_tokens = 2
    return case.answer(assistant_model=small)


@feature(
    "an assistant model that is pruned",
    "with prune(small, plan): model.generate(assistant_model=small)",
    "gives an assistant model no media",
    "take it out of its block",
)
def pruned_assistant(case):
    case.answer(assistant_model=case.model)


# ---------------------------------------------------------------- caches


@feature("a dynamic cache", "generate(past_key_values=DynamicCache())")
def dynamic(case):
    return case.answer(past_key_values=DynamicCache())


@feature("no cache", "generate(use_cache=False)", note="every step is a prefill, and pruned")
def no_cache(case):
    return case.answer(use_cache=False)[:, :1]


@feature(
    "a static cache",
    'generate(cache_implementation="static")',
    "prune needs a dynamic cache",
    "layers of a pruned cache differ in length",
)
def static(case):
    case.answer(cache_implementation="static")


@feature(
    "a static cache of one's own",
    "model(past_key_values=StaticCache(...))",
    "prune needs a dynamic cache",
)
def own_static(case):
    config = case.model.config.get_text_config()
    case.answer(past_key_values=StaticCache(config=config, max_cache_len=400))


@feature(
    "an offloaded cache",
    'generate(cache_implementation="offloaded")',
    "prune needs a dynamic cache",
)
def offloaded(case):
    cache = DynamicCache()
    cache.offloading = True
    case.answer(past_key_values=cache)


@feature(
    "chunked prefill",
    "generate(prefill_chunk_size=64)",
    "prefill_chunk_size",
    "tokens are chosen from the whole prompt",
)
def chunks(case):
    if "mm_encoder_outputs" not in inspect.signature(case.model.forward).parameters:
        pytest.skip("this version of transformers has no chunks with media")
    case.answer(prefill_chunk_size=3)


@feature(
    "hidden states and speech",
    "model(output_hidden_states=True)",
    "hidden states of different lengths",
    '`generation_mode="text"`, `return_audio=False`',
)
def hidden_states(case):
    with prune(case.model, PLAN):
        case.model(**case.one.inputs, output_hidden_states=True)


# ---------------------------------------------------------------- other weights, other places


class Int8(torch.nn.Module):
    "A linear layer that stores int8: whatever replaces `Linear`."

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("int8", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.int8 * self.scale, self.bias)


class Lora(torch.nn.Module):
    "A linear layer with a low-rank addition."

    def __init__(self, linear):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = linear
        out, n = linear.weight.shape
        self.a = torch.nn.Parameter(torch.randn(4, n, generator=generator) / n**0.5)
        self.b = torch.nn.Parameter(torch.randn(out, 4, generator=generator) / 4)

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def replaced(model, cls):
    "A copy of the model, its linear layers in decoder and towers replaced."
    model = copy.deepcopy(model)
    ad = adapter_for(model)
    for part in (*ad.layers(model), *ad.encoders(model).values()):
        for name, child in list(part.named_modules()):
            if type(child) is torch.nn.Linear:
                part.set_submodule(name, cls(child))
    return model


@feature(
    "weights quantised by other modules",
    "Linear -> a module with int8 weights (bitsandbytes, quanto do so)",
)
def quantised(case):
    case.as_naive(replaced(case.model, Int8))


@feature(
    "weights quantised by torchao",
    "quantize_(model, Int8WeightOnlyConfig())",
    note="seen with torchao 0.18; tested where it is installed",
)
def torchao(case):
    quantization = pytest.importorskip("torchao.quantization", reason="no torchao here")
    model = copy.deepcopy(case.model)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    case.as_naive(model)


@feature("LoRA, as a module around a linear layer", "Linear -> Linear + B A")
def lora(case):
    case.as_naive(replaced(case.model, Lora))


@feature(
    "LoRA by peft",
    "get_peft_model(model, LoraConfig(...))",
    note="`prune(model, ...)` takes the model that peft was given; seen "
    "with peft 0.21, tested where it is installed",
)
def peft(case):
    peft = pytest.importorskip("peft", reason="no peft here")
    model = copy.deepcopy(case.model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    case.as_naive(model, peft.get_peft_model(model, config).eval())


@feature("torch.compile, layer by layer", "for layer in layers: layer.compile()")
def compiled_layers(case):
    model = copy.deepcopy(case.model)
    for layer in adapter_for(model).layers(model):
        layer.compile(backend="eager")
    case.as_naive(model)


@feature(
    "torch.compile of the whole model",
    "model.compile()",
    "compile the decoder's layers one by one",
    "hooks do not run in it",
)
def compiled_model(case):
    model = copy.deepcopy(case.model)
    model.compile(backend="eager")
    with prune(model, PLAN):
        model(**case.one.inputs)


@feature("device_map on one device", 'dispatch_model(model, {"": device})')
def one_device(case):
    from accelerate import dispatch_model

    case.as_naive(dispatch_model(copy.deepcopy(case.model), {"": "cpu"}, force_hooks=True))


@feature(
    "offloaded weights",
    "cpu_offload(model), disk_offload(model)",
    note="or a `device_map` with `cpu` and `disk`; over several GPUs it is refused",
)
def offload(case):
    from accelerate import cpu_offload, disk_offload

    def logits(model):
        with prune(model, PLAN):
            return model(**case.one.inputs).logits

    want = logits(case.model)
    here = dict(execution_device=torch.device("cpu"))
    assert torch.equal(logits(cpu_offload(copy.deepcopy(case.model), **here)), want)
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(logits(disk_offload(copy.deepcopy(case.model), folder, **here)), want)


# ---------------------------------------------------------------- the table and its test


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["testbed", "testbed-qwen3"])
def test_on_a_testbed(name):
    "Speculative decoding as the plain way; the pipeline prunes as by hand, by a TRR or a schedule."
    model, processor = load_model(name, "cpu")
    parts = dict(model=model, processor=processor, device="cpu")
    sample = next(s for s in testbed_samples() if s.family == "shape" and not s.lettered)
    one = encode(model, processor, [sample])
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 2
    with prune(model, Schedule.load(f"{name}/10")) as run:
        out = model.generate(**one.inputs, max_new_tokens=2, do_sample=False)
        longer = GREEDY | dict(suppress_tokens=None)
        plain = model.generate(**one.inputs, **longer)
        for how in (dict(prompt_lookup_num_tokens=2), dict(assistant_model=assistant)):
            assert torch.equal(model.generate(**one.inputs, **longer, **how), plain)
    text = processor.tokenizer.decode(out[0, one.shape[1] :], skip_special_tokens=True).strip()
    asked = dict(type="video", url=str(sample.video)), dict(type="text", text=sample.prompt_text)
    messages = [dict(role="user", content=list(asked))]
    for given in dict(trr=10), dict(schedule=Schedule.load(f"{name}/10")):
        pipe = pipeline(TASK, **given, **parts)
        assert pipe(messages, max_new_tokens=2) == dict(generated_text=text)
        assert pipe.answerer.method.schedule.plan_sha256 == run.method.schedule.plan_sha256
    assert pipeline(TASK, trr=7, **parts).answerer.method == as_pruner(None, model, 7)
    with pytest.raises(ValueError, match="neither a file nor a shipped schedule"):
        pipeline(TASK, schedule=f"{name}/7", **parts)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pipeline_of_a_checkpoint(family, tmp_path):
    "From a folder: the thinker, also of a model with all its parts."
    full = tiny.full(family)
    full.save_pretrained(tmp_path)
    tiny.processor(family).save_pretrained(tmp_path)
    plan = tmp_path / "plan.json"
    PLAN.save(plan)
    pipe = pipeline(TASK, model=str(tmp_path), schedule=str(plan), device="cpu")
    assert type(pipe.model) is type(full.thinker) and not pipe.model.training
    weights = zip(pipe.model.parameters(), full.thinker.parameters())
    assert all(torch.equal(a, b) for a, b in weights) and pipe.answerer.method.schedule == PLAN


def table():
    "The rows for people, in Markdown: feature, code, what happens, what to know."
    lines = ["| feature | in code | works? | to know |", "|---|---|---|---|"]
    for f in FEATURES:
        said = f"refused: *... {f.refused} ...*" if f.refused else "works"
        lines.append(f"| {f.name} | `{f.code}` | {said} | {f.note} |")
    return "\n".join(lines)


def test_the_tutorial_shows_this_table():
    page = Path(__file__).parents[1] / "nbs" / "tutorials" / "09_your_code.ipynb"
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    outputs = (out.get("data", {}) for cell in cells for out in cell.get("outputs", ()))
    assert table() in ["".join(data.get("text/markdown", ())) for data in outputs]


@pytest.fixture(scope="module")
def cases():
    found = {}
    for family in tiny.FAMILIES:
        model, processor = tiny.thinker(family), tiny.processor(family)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        case = Case(
            family, model, processor, encode(model, processor, [tiny.ask("x", CLIP, QUESTION)])
        )
        with torch.no_grad():
            found[family] = case, case.answer()
    return found


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("row", FEATURES, ids=lambda f: f.run.__name__)
def test_feature(cases, family, row):
    case, want = cases[family]
    if row.refused:
        with pytest.raises(ValueError, match=row.refused) as error:
            row.run(case)
        assert "\n" not in str(error.value)
        assert torch.equal(case.answer(), want)  # the model goes on
    elif (found := row.run(case)) is not None:
        assert found.tolist() == want[:, : found.shape[1]].tolist()
