"""Hostile clips, question files and schedules: refused in one line or read, never more than that.

The cases that an attack found stand as examples; `make nightly` draws seeded ones like them."""

import copy
import json
import pickle
import random
import struct
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="decoding needs PyAV")

from seats_analysis.inputs import media
from seats_analysis.inputs.benchmarks import load_benchmark
from seats_analysis.inputs.media import decode_clip
from seats_analysis.inputs.samples import Sample, read_samples
from seats_analysis.schedules.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]


def refused(call, *parts):
    "A ValueError of one line that holds all parts."
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text, text


# ---------------------------------------------------------------- clips


def sound(seconds):
    "(first sample, block) pairs of a silent track at 16 kHz."
    return [(s, np.zeros(1024, np.float32)) for s in range(0, int(seconds * 16000), 1024)]


def write_clip(path, times, blocks=(), size=(64, 64)):
    "Grey frames at `times` (s) and blocks of audio at their positions, as the muxer takes them."
    with av.open(str(path), "w") as out:
        v = out.add_stream("libx264", rate=10, options=dict(preset="ultrafast", crf="30"))
        (v.width, v.height), v.pix_fmt = size, "yuv420p"
        v.codec_context.time_base, v.codec_context.max_b_frames = Fraction(1, 1000), 0
        v.codec_context.thread_count = 1
        a = out.add_stream("aac", rate=16000, layout="mono") if blocks else None
        for k, at in enumerate(times):
            grey = np.full((size[1], size[0], 3), 7 * k % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24")
            frame.pts, frame.time_base = round(1000 * at), Fraction(1, 1000)
            out.mux(v.encode(frame))
        out.mux(v.encode(None))
        for at, block in blocks:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block[None]), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, at, Fraction(1, 16000)
            out.mux(a.encode(frame))
        if a:
            out.mux(a.encode(None))
    return path


def patch(path, box, offset, value):
    "Overwrite a 32-bit number behind the first box of a name."
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, data.index(box) + offset, value)
    path.write_bytes(data)
    return path


EVEN = [k / 10 for k in range(80)]
LATE = [k / 10 + (36000 if k >= 40 else 0) for k in range(80)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("times", [LATE, [*EVEN[:-1], 36000.0]], ids=["jump", "last"])
def test_video_time_stamps_that_jump_by_hours(tmp_path, name, times):
    path = write_clip(tmp_path / name, times, sound(8))
    with pytest.raises(ValueError, match=rf"{name}: a corrupt time stamp, its video jumps from "):
        decode_clip(path)


def test_audio_time_stamps_that_jump_by_hours(tmp_path):
    blocks = [(at + (16000 * 36000 if at > 64000 else 0), block) for at, block in sound(8)]
    with pytest.raises(ValueError, match="a.mkv: a corrupt time stamp, its audio jumps from 3."):
        decode_clip(write_clip(tmp_path / "a.mkv", EVEN, blocks))


@pytest.mark.parametrize(
    "box, offset, value",
    [(b"mdhd", 16, 1), (b"stts", 16, 2**27 - 1)],
    ids=["time scale of 1", "length of a frame"],
)
def test_seconds_that_the_container_does_not_know_of(tmp_path, box, offset, value):
    path = patch(write_clip(tmp_path / "a.mp4", EVEN, sound(8)), box, offset, value)
    with pytest.raises(ValueError, match=r"its packets end at \d+.\d+ s, its container says 8.0"):
        decode_clip(path)


def test_a_clip_that_would_not_fit(tmp_path, monkeypatch):
    "Frames at their final size, the waveform, and frames however small they are."
    path = write_clip(tmp_path / "a.mkv", EVEN, sound(8))
    monkeypatch.setattr(media, "_MAX_BYTES", 2**20)
    assert decode_clip(path).frames.nbytes == 16 * 64 * 64 * 3
    with pytest.raises(ValueError, match="a.mkv: 160 frames of 64x64 would take .* fewer frames"):
        decode_clip(path, fps=20)
    with pytest.raises(ValueError, match="a.mkv: 8 s of audio would take"):
        decode_clip(path, sample_rate=48000)
    with pytest.raises(ValueError, match="a.mkv: 8000 frames would take"):
        decode_clip(path, fps=1000)
    assert len(decode_clip(path, fps=1000, max_frames=3).frames) == 3


def test_frames_larger_than_any_camera(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", [0], size=(256, 256))
    monkeypatch.setattr(media, "_MAX_PIXELS", 2**14)
    with pytest.raises(ValueError, match="a.mkv: "):
        decode_clip(path)


def test_memory_is_what_is_kept(tmp_path):
    "Large frames, shown for long: at no time more than the clip and a few frames in passing."
    path, size = write_clip(tmp_path / "a.mkv", [0, 1, 2, 300], size=(640, 480)), 640 * 480 * 3
    tracemalloc.start()
    clip = decode_clip(path, max_frames=40)
    peak = tracemalloc.get_traced_memory()[1]
    assert clip.frames.nbytes == 40 * size and peak < 44 * size
    tracemalloc.reset_peak()
    small = decode_clip(path, resize=lambda frame, n: frame[::8, ::8])
    peak = tracemalloc.get_traced_memory()[1] - clip.frames.nbytes
    tracemalloc.stop()
    assert small.resized and len(small.frames) == 601 and peak < small.frames.nbytes + 4 * size


@pytest.mark.parametrize("family", ["qwen2.5-omni", "qwen3-omni"])
def test_resizing_on_the_way_changes_no_number(family):
    "Shrunk or enlarged, with a budget per clip or without: as the processor resizes whole clips."
    import tiny
    import torch
    from seats_analysis.models.encode import frame_resizer

    processor, r = tiny.processor(family), np.random.default_rng(0)
    video = processor.video_processor
    for least, most, cap in ((1, 64, False), (32, 36, False), (1, 64, True)):
        video.size = dict(video.size, shortest_edge=least * 784, longest_edge=most * 784)
        video.max_video_tokens = 40
        for h, w in ((90, 200), (411, 172), (33, 57)):
            frames = r.integers(0, 256, (3, h, w, 3), np.uint8)
            options = dict(size=dict(video.size), do_sample_frames=False, return_tensors="pt")
            if hasattr(video, "cap_pixels_per_frame"):
                options["cap_pixels_per_frame"] = video.cap_pixels_per_frame = cap
            resize = frame_resizer(processor)
            small = np.stack([resize(frame, 3) for frame in frames])
            ours, theirs = (
                video(videos=[torch.as_tensor(x).permute(0, 3, 1, 2)], **options, **extra)
                for x, extra in ((small, dict(do_resize=False)), (frames, {}))
            )
            assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
            assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])


BOXES = b"mdhd mvhd tkhd stts ctts stsz stco stsc elst stsd avcC esds fmt avih strh strf".split()
NUMBERS = [0, 1, 4095, 65536, 2**31 - 1, 2**32 - 1]


def damaged(r, data):
    "A copy with one to four numbers overwritten, mostly where containers keep theirs."
    data = bytearray(data)
    places = [data.index(box) + 4 for box in BOXES if box in data]
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        known = places and r.random() < 0.75
        at = r.choice(places) + 4 * r.randrange(8) if known else r.randrange(len(data))
        value = r.choice([*NUMBERS, r.randrange(2**32)]).to_bytes(4, r.choice(["big", "little"]))
        data[at : at + 4] = value
    return data


@pytest.mark.parametrize("n", [30, pytest.param(400, marks=pytest.mark.nightly)])
def test_damaged_clips(tmp_path, n):
    "A clip or one line that names the file, soon, and in little memory."
    r, whole = random.Random(6), []
    for suffix in ("mp4", "mkv", "mov", "avi", "ts"):
        whole.append(write_clip(tmp_path / f"whole.{suffix}", EVEN[:20], sound(2)))
    for _ in range(n):
        source = r.choice(whole)
        path = tmp_path / f"bad{source.suffix}"
        path.write_bytes(damaged(r, source.read_bytes()))
        began = time.monotonic()
        try:
            clip = decode_clip(path)
            arrays = [x for x in (clip.frames, clip.waveform) if x is not None]
            assert sum(x.nbytes for x in arrays) < 2**30, clip
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error)
        assert time.monotonic() - began < 20


# ---------------------------------------------------------------- question files

GOOD = dict(id="g", video="v.mp4", question="?", choices=["a", "b"], answer="b", lettered=True)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def questions(tmp_path):
    "Writes lines to a question file beside one clip; returns what reads it."
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "v.mp4").touch()
    (tmp_path / "away.mp4").touch()
    path = tmp_path / "data" / "q.jsonl"

    def read(*rows, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines))
        return lambda: read_samples(path, **options)

    return read


def test_more_choices_than_letters(questions):
    many = [f"choice {i}" for i in range(27)]
    refused(questions(GOOD | dict(choices=many, answer=26)), "line 1", "27 choices", "at most 26")
    refused(questions(GOOD | dict(choices=many, answer="?")), "a letter up to Z")
    assert len(questions(GOOD | dict(choices=many[:26], answer=25))()[0].answer_texts) == 26
    plain = Sample("s", None, "?", many, 26)  # without letters there is no limit
    assert len(plain.answer_texts) == 27


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(video="v" * 5000 + ".mp4"), "no such file"),
        (dict(audio="v\0.wav"), "no such file"),
        (dict(question="\ud800"), "question"),
        (dict(choices=["a", "\udfff"]), "expected a list of texts"),
    ],
)
def test_names_and_texts_that_cannot_be(questions, change, part):
    refused(questions(GOOD | change), "q.jsonl, line 1", part)


def test_questions_nested_too_deeply(questions):
    refused(questions(GOOD, DEEP), "q.jsonl, line 2: nested too deeply")


@pytest.mark.parametrize("field", ["video", "audio"])
@pytest.mark.parametrize("name", ["../away.mp4", "x/../../away.mp4", "{tmp}/away.mp4"])
def test_media_stay_below_the_folder(questions, tmp_path, field, name):
    row = GOOD | {field: name.format(tmp=tmp_path)}
    refused(questions(row), "q.jsonl, line 1", "lies outside of", "--allow-outside")
    if "x/" not in name:
        assert len(questions(row, allow_outside=True)()) == 1
    inside = GOOD | dict(video=f"{tmp_path}/data/v.mp4", audio="x/../v.mp4")
    assert questions(inside)()[0].audio == str(tmp_path / "data" / "v.mp4")


def test_videos_of_a_benchmark_stay_below_its_folder(questions, tmp_path):
    root = tmp_path / "data"
    row = dict(question_id=0, question="?", options=["A. a", "B. b"], correct_option="B")
    for video in ("../away.mp4", str(tmp_path / "away.mp4")):
        (root / "data.json").write_text(json.dumps([row | dict(video_id=video)]))
        refused(lambda: load_benchmark("lvomnibench", root), "question 0", "lies outside of")
        assert load_benchmark("lvomnibench", root, allow_outside=True)[0].clip == "away"
    for wrong in ({"a": 1}, ["v.mp4"], "v" * 5000):
        (root / "data.json").write_text(json.dumps([row | dict(video_id=wrong)]))
        refused(lambda: load_benchmark("lvomnibench", root), "v")
    (root / "data.json").write_text(DEEP)
    refused(lambda: load_benchmark("lvomnibench", root), "data.json: not readable JSON")


ODD = [None, True, -1, 27, 10**400, 1e308, float("nan"), "", "\0", "\ud800", "a" * 5000, "../x"]
ODD += ["B", "v.mp4", "/etc/passwd", [], {}, [[]], ["a"] * 3, [f"{i}" for i in range(40)], [None]]


def mutated(r, data, values):
    "A copy with one or two values of a tree replaced or removed."
    data = copy.deepcopy(data)
    for _ in range(r.choice([1, 1, 2])):
        at = data
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = r.choice(keys)
            deeper = isinstance(at[key], dict | list) and at[key]
            if not deeper or r.random() < 0.5:
                break
            at = at[key]
        if r.random() < 0.1 and len(keys) > 1:
            del at[key]
        else:
            at[key] = copy.deepcopy(r.choice(values))
    return data


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.nightly)])
def test_mutated_questions(questions, tmp_path, n):
    "Read, and then usable, or refused in one line with its number; media never from outside."
    r, read = random.Random(7), 0
    for _ in range(n):
        text = json.dumps(mutated(r, GOOD, ODD))
        if r.random() < 0.2:
            at = r.randrange(len(text))
            text = text[:at] + r.choice('{}[]",:\\0\t') + text[at + 1 :]
        began = time.monotonic()
        try:
            (sample,) = questions(text)()
            assert len(sample.answer_texts) == len(sample.choices) > sample.answer
            sample.prompt_text.encode()
            for path in filter(None, (sample.video, sample.audio)):
                assert Path(path).resolve().is_relative_to(tmp_path / "data")
            read += 1
        except ValueError as error:
            assert "q.jsonl" in str(error) and "\n" not in str(error)
        assert time.monotonic() - began < 20
    assert 0 < read < n


# ---------------------------------------------------------------- code of a checkpoint


def test_python_of_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    "Neither asked for nor run, whatever waits on standard input; with the option it is."
    import io
    from seats_analysis.evaluation.load import load_model

    config = dict(model_type="evil", auto_map=dict(AutoConfig="evil.Evil"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    refused(lambda: load_model(str(tmp_path), "cpu"), "--trust-remote-code")
    assert not (tmp_path / "ran").exists()
    refused(lambda: load_model(str(tmp_path), "cpu", trust_remote_code=True), "no architecture")
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- schedules


def schedules():
    return [json.loads(p.read_text()) for p in sorted((ROOT / "data" / "schedules").glob("*.json"))]


@pytest.mark.parametrize(
    "change",
    [
        dict(temperature=10**400),
        dict(entering=dict(visual=10**400, audio=1.0)),
        dict(scale=float("nan")),
        dict(scale=dict(visual=10**400, audio=1.0)),
        dict(windows=dict(visual_grids=2, seconds=10**400)),
        dict(model=0.5),
        dict(model={"a": 1}),
        dict(revision=["x"]),
        dict(seed=float("inf")),
        dict(seed="x"),
        dict(evidence=[["a", 1]]),
        dict(evidence=dict(scale_requested="x")),
        dict(evidence=dict(kind=[])),
    ],
    ids=lambda change: next(iter(change)),
)
def test_schedules_with_unusable_fields(tmp_path, change):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schedules()[0] | change))
    refused(lambda: Schedule.load(path), "s.json is not a usable schedule: ", "must be ")


def test_schedule_nested_too_deeply(tmp_path):
    path, plan = tmp_path / "s.json", schedules()[0]
    path.write_text(json.dumps(plan | dict(evidence="@")).replace('"@"', DEEP))
    refused(lambda: Schedule.load(path), "s.json is not a usable schedule", "nested too deeply")


NUMBERS_AND_MORE = [None, True, 0, -1, 10**9, 10**400, 1e-320, 1e308, 0.5, float("nan"), "x", [1]]
NUMBERS_AND_MORE += [[], {}, {"visual": 0.5, "audio": 10**400}, {"visual": "a", "audio": None}]
NUMBERS_AND_MORE += [[["a", 1]], "a" * 5000, "\ud800", float("inf"), {"scale_requested": "x"}]


@pytest.mark.parametrize("n", [120, pytest.param(500, marks=pytest.mark.nightly)])
@pytest.mark.filterwarnings("ignore")
def test_mutated_schedules(tmp_path, n):
    "Refused in one line, or a plan with which everything works and that comes back from its file."
    r, path, whole, loaded = random.Random(8), tmp_path / "s.json", schedules(), 0
    for _ in range(n):
        path.write_text(json.dumps(mutated(r, r.choice(whole), NUMBERS_AND_MORE)))
        began = time.monotonic()
        try:
            plan = Schedule.load(path)
        except ValueError as error:
            assert "s.json" in str(error) and "\n" not in str(error)
            continue
        finally:
            assert time.monotonic() - began < 20
        plan.tokens(100, 50, 10), plan.to_table(), plan.stages, plan.model.lower(), hash(plan)
        plan.nearest(0.5, 0.5), plan.token_trr(10, 5), plan.check_model(plan.num_layers)
        assert pickle.loads(pickle.dumps(plan)) == plan
        plan.save(path)
        assert Schedule.load(path) == plan
        loaded += 1
    assert 0 < loaded < n
