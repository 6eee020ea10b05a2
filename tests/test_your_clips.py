"""Clips of one's own, several in a question, and pictures, in stock models beside the testbeds:
prompts are those of the stock processor, answers those of the stock model; all commands."""

import json
import re
from pathlib import Path

import kinds, numpy as np, pytest, tiny, torch
from PIL import Image
from test_cli import done, seats

from seats_analysis import METHODS, Clip, Sample, encode, load_profile, prune, read_samples
from seats_analysis.evaluation.prepared import PreparedBatch
from seats_analysis.inputs.media import check_media, decode_clip
from seats_analysis.models.families import adapter_for
from seats_analysis.models.scoring import last_logits_only, score_choices
from seats_analysis.tuning.space import measured_space

PICTURE = Clip("p", tiny.image(3, (56, 84))[None], fps=0.0)
MEDIA = {"a": tiny.clip(0, 2.0), "b": tiny.clip(1, 4.0), "c": tiny.clip(2, 2.0), "p": PICTURE}
# what is shown, in order; in short rows clips of one length, no picture, one clip, or sound alone
TABLE = dict.fromkeys(
    "qwen2-vl qwen2.5-vl qwen3-vl gemma4 video-llama-3 qwen3.5 minicpm-v-4.6 exaone4.5 muse-spark "
    "llava-onevision internvl perception-lm molmo2 qwen2-audio granite-speech".split(),
    "apb",
)
TABLE = dict.fromkeys(tiny.FAMILIES, "apb") | TABLE
TABLE |= {"llava-onevision": "ac", "internvl": "apc", "perception-lm": "apc", "molmo2": "a"}
TABLE |= {"qwen2-audio": "ab", "granite-speech": "ab"}
EVAL = "seats_out/own/results/eval_model.json"
ASKED = "what colour is the circle ?", "where ?"
CHOICES = "red circle", "blue"


def part(family):
    return tiny if family in tiny.FAMILIES else kinds


def questions(family):
    media = [MEDIA[name] for name in TABLE[family]]
    return [Sample(media, q, CHOICES, i) for i, q in enumerate(ASKED)]


def stock_inputs(family, model, processor):
    "The processor asked once for everything, by its chat template."
    takes = adapter_for(model).modalities(model)
    clips = [MEDIA[name] for name in TABLE[family]]
    content = []
    given = dict(images=[], videos=[], audio=[])
    for clip in clips:
        if clip.picture:
            content.append(dict(type="image"))
            given["images"].append(torch.tensor(clip.frames[0]).permute(2, 0, 1))
            continue
        if "visual" in takes:
            content.append(dict(type="video"))
            given["videos"].append(torch.tensor(clip.frames).permute(0, 3, 1, 2))
        if "audio" in takes:
            if family not in tiny.FAMILIES:  # there the sound lies within its video
                content.append(dict(type="audio"))
            given["audio"].append(clip.waveform)
    content.append(dict(type="text", text=ASKED[0]))
    turn = [dict(role="user", content=content)]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    more = dict(do_sample_frames=False, return_metadata=True)
    if family in tiny.FAMILIES:
        more |= dict(fps=2.0, size=dict(processor.video_processor.size))
        given["images_kwargs"] = dict(size=dict(processor.image_processor.size))
        newer = hasattr(processor, "load_audio_from_video")
        both = dict(load_audio_from_video=True, audio_from_video_indices=[0, 1])
        rates = adapter_for(model).rates(model)
        given |= both if newer else dict(use_audio_in_video=True)
        given["position_id_per_seconds"] = rates.positions_per_second
        given["seconds_per_chunk"] = rates.seconds_per_chunk
    elif given["videos"]:
        n = [len(v) for v in given["videos"]]
        more["video_metadata"] = [
            dict(total_num_frames=k, fps=2.0, frames_indices=list(range(k))) for k in n
        ]
    given = {k: v for k, v in given.items() if v}
    if "videos" in given:
        given["videos_kwargs"] = more
    made = dict(processor(text=[text], return_tensors="pt", **given))
    made.pop("video_metadata", None)
    return made


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.usefixtures("no_grad")
def test_several_clips_and_pictures_in_one_question(family):
    model = part(family).thinker(family) if family in tiny.FAMILIES else kinds.model(family)
    processor = part(family).processor(family)
    samples = questions(family)
    one = encode(model, processor, samples[:1])
    stock = stock_inputs(family, model, processor)
    assert stock["input_ids"].tolist() == one.inputs["input_ids"].tolist()
    if family in tiny.FAMILIES:
        stock["use_audio_in_video"] = True
    with last_logits_only(model):
        answer = model(**stock).logits[:, -1]
        torch.testing.assert_close(model(**one.inputs).logits[:, -1], answer, atol=1e-5, rtol=0)
    # clips that are encoded once for all questions on them
    plan = tiny.schedule(weighted=False)
    with prune(model, plan) as run, last_logits_only(model):
        alone = [score_choices(model, encode(model, processor, [s])).total for s in samples]
    batch = PreparedBatch.of(model, processor, samples, [plan])
    with batch.prune(plan) as (_, encoded), last_logits_only(model):
        together = score_choices(model, encoded).total
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert run.tokens_per_layer[0, 0] > run.tokens_per_layer[0, -1]


def test_a_picture_is_a_file_like_others(tmp_path):
    "As it is shown: what a camera noted of its turn is obeyed; in a list sounds may stand, too."
    pixels = tiny.image(0, (28, 56))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    shown = decode_clip(tmp_path / "turned.png")
    assert shown.picture
    assert np.array_equal(shown.frames[0], np.rot90(pixels, -1))
    MEDIA["a"].save(tmp_path / "a.mp4")
    tiny.clip(5, 1.0, sight=False).save(tmp_path / "heard.mp4")
    row = dict(video=["a.mp4", "turned.png", "heard.mp4"], question="?", choices=["x", "y"])
    lines = [row | dict(answer=0), row | dict(answer=0, video="turned.png")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    several, alone = read_samples(tmp_path / "own.jsonl")
    assert (several.clip, alone.clip) == ("a+turned+heard", "turned")
    assert [c.id for c in several.load_media()] == ["a", "turned", "heard"]
    spoken = Sample(tmp_path / "turned.png", "?", audio=str(tmp_path / "heard.mp4")).load_media()
    assert [(c.picture, c.waveform is None) for c in spoken] == [(True, True), (False, False)]
    wrong = {
        "picture, or broken": lambda: decode_clip(bad),
        "holds no video": lambda: check_media(tmp_path / "heard.mp4", "video"),
        "stands among them": lambda: Sample(several.video, "?", audio="heard.mp4"),
        "expected a positive number": lambda: Clip("x", MEDIA["a"].frames, fps=0.0),
    }
    bad = tmp_path / "bad.png"
    bad.write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    for said, call in wrong.items():
        with pytest.raises(ValueError, match=said):
            call()


# family -> what a line names as its video; what else is measured
COMMANDS = {
    "qwen3-vl": (lambda i: [f"{i}.mp4", "p.png"], False),
    "llava-onevision": (lambda i: f"{i}.mp4", False),
    "gemma4": (lambda i: [f"{i}.mp4", "p.png"], False),
    "qwen2-audio": (lambda i: f"{i}.mp4", True),
}


@pytest.mark.parametrize("family", COMMANDS)
def test_commands_on_a_folder_with_a_checkpoint(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds.model(family).save_pretrained("model")
    kinds.processor(family).save_pretrained("model")
    named, whole = COMMANDS[family]
    Image.fromarray(PICTURE.frames[0]).save("p.png")
    lines = []
    for i in range(7):
        tiny.clip(i, 2.0).save(f"{i}.mp4")
        row = dict(video=named(i), question=ASKED[0], choices=CHOICES, answer=i % 2)
        lines.append(json.dumps(row | dict(split="derive" if i < 5 else "test")))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    both = "--model model --data own.jsonl".split()
    done("probe", *both)
    profile = tmp_path / "seats_out/own/profiles/model.nc"
    done("schedule {p} --trr 30 --blocks 2,5 --out s.json", p=profile)
    shown = named(0) if isinstance(named(0), list) else [named(0)]
    run = "--question where --choice red --choice blue --schedule s.json --json --model model"
    answer = json.loads(done(f"run {run} --max-tokens 2", *shown).stdout)
    assert answer["tokens_per_layer"][0] > answer["tokens_per_layer"][-1]
    assert set(answer["choices"]) == {"red", "blue"}
    found = done("eval --schedule s.json --limit 2", *both)
    hidden = not adapter_for(kinds.model(family)).received
    (said,) = [line for line in found.stderr.splitlines() if "note: left out" in line]
    assert ("visionzip" in said) is hidden and "downsample" in said
    labels = [r["label"] for r in json.loads((tmp_path / EVAL).read_text())["rows"]]
    assert ("visionzip" in labels) is not hidden and {"full", "seats", "vtw"} <= set(labels)
    tuned = seats("tune --schedule s.json --max-change 98 --budget 2", *both)
    assert tuned.exit_code in (0, 1)  # whether answers of random weights change is not ours
    assert "FLOPs of full (causal)" in tuned.stdout
    if whole:  # of a model that only hears
        done("probe --answers text --out text.nc", *both)
        space = measured_space("", tmp_path / "text.nc", text=True)
        assert set(space.facts["cache"]) == {"visual", "audio"}


@pytest.mark.parametrize("heard_or_seen", ["audio", "visual"])
def test_vtw_goes_by_the_one_modality_that_a_profile_has(heard_or_seen):
    rule = METHODS["vtw"].from_profile(load_profile("testbed").sel(removed=[heard_or_seen]), 16)
    late = {m: rule.schedule.late(m) for m in ("visual", "audio")}
    assert 0 < late.pop(heard_or_seen) <= 16 and set(late.values()) == {16}


def test_a_row_of_ones_own_takes_at_most_25_lines():
    "The page runs among the notebooks; here the cell that holds class and row is counted."
    page = Path(__file__).parents[1] / "nbs/tutorials/10_bring_your_model.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(page.read_text())["cells"]]
    (own,) = [s for s in cells if re.search("^    seats_family = ", s, re.M)]
    assert len([line for line in own.splitlines() if line.strip()]) <= 25
