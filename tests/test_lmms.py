"""The plug-in for lmms-eval: its own logic always; lmms-eval itself, unmodified, in the
nightly run of an environment that has it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from conftest import ROOT
import numpy as np
import pytest
import torch
from clips import write_wav

from seats_analysis import (
    Schedule,
    encode,
    evaluate,
    load_model,
    testbed_samples as shipped_samples,
)
from seats_analysis.evaluation import evaluate as module
from seats_analysis.evaluation.evaluate import parse_answer
from seats_analysis.schedules.file import PUBLISHED
from seats_analysis.serving import lmms
from seats_analysis.serving.lmms import Answerer, ModelArgs, doc_to_messages, prompt_of, task_docs
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.load import TESTBEDS

has_lmms = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(
    not has_lmms, reason="lmms-eval is not installed (pip install '.[eval]' in a clone)"
)


def method_for(*given, **more):
    return ModelArgs(*given, **more).pruner()


@pytest.fixture(scope="module")
def answerer():
    return Answerer(*load_model("testbed", "cpu"))


@pytest.fixture(scope="module")
def docs():
    return [
        d for d in task_docs("testbed") if d["family"] in ("tone", "pattern") and not d["lettered"]
    ][:8]


@pytest.mark.parametrize("seconds, samples, tokens", [(1, 16000, 5), (2, 32000, 10), (2, 1500, 0)])
def test_short_clips_keep_their_sound(answerer, docs, seconds, samples, tokens):
    "One chunk or two, and too little for a token, beside a longer prompt."
    whole = answerer.prompt(doc_to_messages(docs[0]), "q")
    clip = whole.content[0]
    clip = replace(clip, frames=clip.frames[: 2 * seconds], waveform=clip.waveform[:samples])
    prompts = [replace(whole, content=(clip, *whole.content[1:])), whole]
    counts = encode(answerer.model, answerer.processor, prompts).layout.counts()["audio"]
    assert counts.tolist() == [tokens, 40] and len(answerer(prompts, max_new_tokens=1)) == 2


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_checkpoint_of_published_sizes(tmp_path, key):
    "Whatever its folder is called; and a folder that is called so, of another size, has none."
    config = PUBLISHED[key]["config"]
    home, old = tmp_path / "my-sft", tmp_path / f"{key}-old"
    for place, layers in (home, config["num_hidden_layers"]), (old, 12):
        place.mkdir()
        told = dict(thinker_config=dict(text_config=config | dict(num_hidden_layers=layers)))
        (place / "config.json").write_text(json.dumps(told))
    assert method_for(str(home), trr=10).schedule == Schedule.published(key, 10)
    for place in home, old:
        with pytest.raises(ValueError, match=r"12\.5: neither a file nor a shipped schedule"):
            method_for(str(place), trr=12.5)
    with pytest.raises(ValueError, match="old/10: neither a file"):
        method_for(str(old), trr=10)


@pytest.mark.parametrize("name", TESTBEDS)
def test_one_prompt_for_one_question(name, monkeypatch):
    """Open or lettered, what lmms-eval asks is what `evaluate` asks, tensor by tensor, and what the
    full model writes is read as the choice that it ranks first there; pruned, nearly always."""
    model, processor = load_model(name, "cpu")
    samples = shipped_samples("test", 12)
    assert 3 <= sum(s.lettered for s in samples) <= 9
    asked = [lmms.doc_to_messages(d) for d in task_docs("testbed", 12)]
    built = []
    take = lambda *given: built.append(encode(*given)) or built[-1]
    monkeypatch.setattr(module, "encode", take)
    for method, differ in ("full", 0), ("seats", 1):
        plan = method_for(name, method, None if method == "full" else 10)
        answerer = Answerer(model, processor, plan)
        prompts = [answerer.prompt(turn, str(i)) for i, turn in enumerate(asked)]
        built.clear()
        picks = evaluate(model, processor, samples, plan, batch_size=12).prediction
        mine = encode(model, processor, prompts).inputs
        assert all(torch.equal(mine[k], v) for k, v in built[0].inputs.items()) and mine
        texts = answerer(prompts)
        read = [parse_answer(t, s.choices, s.lettered) for t, s in zip(texts, samples)]
        said = [None if i is None else s.choices[i] for i, s in zip(read, samples)]
        assert sum(a != b for a, b in zip(said, picks)) <= differ, list(zip(texts, picks))


def test_separate_sound_replaces_that_of_the_video(tmp_path, docs):
    from seats_analysis.inputs.media import decode_clip

    sound = decode_clip(docs[1]["video"]).waveform
    write_wav(tmp_path / "s.wav", sound)
    clip = prompt_of(
        doc_to_messages(dict(docs[0], sound=str(tmp_path / "s.wav"))), "q", 16000
    ).content[0]
    np.testing.assert_allclose(clip.waveform, sound, atol=1e-4)
    np.testing.assert_array_equal(clip.frames, decode_clip(docs[0]["video"]).frames)


def test_module_prints_the_task_folder():
    out = subprocess.run(
        [sys.executable, "-m", "seats_analysis.serving.lmms"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(out.strip()).joinpath("daily_omni.yaml").is_file()


def daily_omni(folder, samples):
    "The testbed's clips in the layout of Daily-Omni, sounds as files of their own."
    from seats_analysis.inputs.media import decode_clip

    rows = []
    for s in samples:
        name = Path(s.video).stem
        place = folder / "Videos" / name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(s.video, place / f"{name}_video.mp4")
        write_wav(place / f"{name}_audio.wav", decode_clip(s.video).waveform)
        rows.append(
            dict(
                Question=s.question,
                Choice=[f"{'ABCD'[i]}. {c}" for i, c in enumerate(s.choices)],
                Answer="ABCD"[s.answer],
                video_id=name,
                Type=s.family,
            )
        )
    (folder / "qa.json").write_text(json.dumps(rows))


def test_daily_omni_documents(tmp_path, monkeypatch):
    daily_omni(tmp_path / "daily-omni", shipped_samples("test", 4))
    monkeypatch.setenv("SEATS_DATA", str(tmp_path))
    docs = task_docs("daily-omni")
    assert len(docs) == 4 and all(d["sound"].endswith("_audio.wav") and d["lettered"] for d in docs)
    assert [d["choices"][d["answer"]] for d in docs] == [
        s.choices[s.answer] for s in shipped_samples("test", 4)
    ]
    text = doc_to_messages(docs[0])[0]["content"][1]["text"]
    assert (
        text.startswith(shipped_samples("test", 1)[0].question)
        and f"A. {docs[0]['choices'][0]}" in text
        and text.endswith(docs[0]["choices"][-1])
    )


# ---------------------------------------------------------------- lmms-eval itself


def run_lmms(out, args, tasks, limit=8, **env):
    "`python -m lmms_eval`, and the results that it stored."
    words = f"-m lmms_eval --model seats_omni --tasks {tasks} --batch_size 4 --limit {limit}"
    command = [sys.executable, *words.split(), "--log_samples", "--device", "cpu"]
    command += [
        "--model_args",
        args,
        "--include_path",
        str(shipped_folder("tasks")),
        "--output_path",
        out,
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE="1") | env,
        cwd=out.parent,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(next(out.rglob("*results.json")).read_text())["results"]


@needs_lmms
@pytest.mark.nightly
def test_model_is_registered():
    from importlib.metadata import entry_points

    assert [e.value for e in entry_points(group="lmms_eval.models") if e.name == "seats_omni"] == [
        "seats_analysis.serving.lmms:manifests"
    ]
    from lmms_eval.models import get_model

    assert get_model("seats_omni") is lmms.SeatsOmni and lmms.SeatsOmni.is_simple is False


@needs_lmms
@pytest.mark.nightly
@pytest.mark.parametrize("method, low, high", [("seats", 0.8, 1.0), ("random", 0.0, 0.8)])
def test_end_to_end(tmp_path, method, low, high):
    "SEATS keeps the answers at 10 %, random tokens do not: so the method really ran."
    found = run_lmms(
        tmp_path / "out",
        f"pretrained=testbed,method={method},trr=10,n_visual=128,n_audio=80",
        "seats_testbed",
        32,
    )["seats_testbed"]
    assert low <= found["accuracy,none"] <= high


@needs_lmms
@pytest.mark.nightly
def test_benchmark_end_to_end(tmp_path):
    daily_omni(tmp_path / "data" / "daily-omni", shipped_samples("test", 8))
    found = run_lmms(
        tmp_path / "out",
        "pretrained=testbed,method=full",
        "daily_omni",
        SEATS_DATA=str(tmp_path / "data"),
    )["daily_omni"]
    assert 0 <= found["accuracy,none"] <= 1 and 0 <= found["unparsable,none"] <= 1
