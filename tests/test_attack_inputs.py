"""Hostile clips, question files and schedules: refused in one line or read, never more than that.

The cases that an attack found stand as examples; `make nightly` draws seeded ones like them."""

import copy
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

from conftest import ROOT
import numpy as np
import pytest
from clips import audio_frame, av, blocks, more_at_night, patch, refused, write_clip

from seats_analysis import Sample, Schedule, decode_clip, load_benchmark, load_profile, read_samples
from seats_analysis.inputs import media
from seats_analysis.inputs.media import check_media
from seats_analysis.inputs.questions import check_clips
from seats_analysis.storage.schemas import save_profile


# ---------------------------------------------------------------- clips


SECOND = np.zeros(16000, np.float32)


def film(path, times, seconds=8, **options):
    "Frames at `times` (s) and a silent track."
    return write_clip(
        path, range(len(times)), times, sound=blocks(np.tile(SECOND, seconds)), **options
    )


EVEN = [k / 10 for k in range(80)]
LATE = [k / 10 + (36000 if k >= 40 else 0) for k in range(80)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("times", [LATE, [*EVEN[:-1], 36000.0]], ids=["jump", "last"])
def test_video_time_stamps_that_jump_by_hours(tmp_path, name, times):
    path = film(tmp_path / name, times)
    refused(lambda: decode_clip(path), f"{name}: a corrupt time stamp, its video jumps from ")


def test_audio_time_stamps_that_jump_by_hours(tmp_path):
    sound = [
        (at + (16000 * 36000 if at > 64000 else 0), block)
        for at, block in blocks(np.tile(SECOND, 8))
    ]
    path = write_clip(tmp_path / "a.mkv", range(80), EVEN, sound=sound)
    refused(lambda: decode_clip(path), "a.mkv: a corrupt time stamp, its audio jumps from 3.")


@pytest.mark.parametrize(
    "box, offset, value",
    [(b"mdhd", 16, 1), (b"stts", 16, 2**27 - 1)],
    ids=["time scale of 1", "length of a frame"],
)
def test_seconds_that_the_container_does_not_know_of(tmp_path, box, offset, value):
    path = patch(film(tmp_path / "a.mp4", EVEN), box, offset, value)
    refused(lambda: decode_clip(path), "its packets end at ", " s, its container says 8.0")


def test_a_clip_that_would_not_fit(tmp_path, monkeypatch):
    "Frames at their final size, the waveform, and frames however small they are."
    path = film(tmp_path / "a.mkv", EVEN)
    monkeypatch.setattr(media, "_MAX_BYTES", 2**20)
    assert decode_clip(path).frames.nbytes == 16 * 64 * 64 * 3
    for said, options in (
        ("160 frames of 64x64 would take ", dict(fps=20)),
        ("8 s of audio would take", dict(sample_rate=48000)),
        ("8000 frames would take", dict(fps=1000)),
    ):
        refused(lambda: decode_clip(path, **options), f"a.mkv: {said}", "ask for fewer frames")
    assert len(decode_clip(path, fps=1000, max_frames=3).frames) == 3


def test_frames_larger_than_any_camera(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", [0], size=(256, 256))
    monkeypatch.setattr(media, "_MAX_PIXELS", 2**14)
    refused(lambda: decode_clip(path), "a.mkv: ")


def test_memory_is_what_is_kept(tmp_path):
    "Large frames, shown for long: at no time more than the clip and a few frames in passing."
    path = write_clip(tmp_path / "a.mkv", range(4), [0, 1, 2, 300], size=(640, 480))
    size = 640 * 480 * 3
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


BOXES = (
    b"mdhd mvhd tkhd stts ctts stsz stco stsc elst stsd avcC esds fmt avih strh strf chan".split()
)
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


# a file that ends the process ends this one; 60 Hz passes through the low frequency channels too
CHILD = """
import json, sys, time
import av, numpy as np
from seats_analysis.inputs.media import check_media, decode_clip

for path in sys.stdin.read().split("\\n"):
    began, row = time.monotonic(), dict(path=path, error=None)
    try:
        check_media(path, sys.argv[1])
        clip = decode_clip(path)
        row["bytes"] = sum(x.nbytes for x in (clip.frames, clip.waveform) if x is not None)
        with av.open(path, metadata_errors="replace") as file:
            listed = [len(s) > 0 for s in (file.streams.video, file.streams.audio)]
        row["missing"] = listed != [clip.frames is not None, clip.waveform is not None]
        if clip.waveform is not None:
            x = clip.waveform[3200:12800]
            turn = np.exp(2j * np.pi * 60 * np.arange(len(x)) / 16000)
            row["tone"] = 2 * abs((x * turn).mean()) if len(x) else 0.0
    except ValueError as error:
        row["error"] = str(error)
    print(json.dumps(row | dict(seconds=time.monotonic() - began)), flush=True)
"""


def decoded(paths, kind="video"):
    "What another process says of each file: a clip or one line that names it, soon and small."
    command = [sys.executable, "-c", CHILD, kind]
    said = dict(input="\n".join(map(str, paths)), capture_output=True, text=True, cwd=ROOT)
    run = subprocess.run(command, **said, timeout=20 + 5 * len(paths))
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and len(rows) == len(paths), (run.stderr, paths[len(rows) :][:1])
    for row in rows:
        assert row["seconds"] < 20
        if row["error"] is None:
            assert row["bytes"] < 2**30 and not row["missing"], row
        else:
            assert row["path"] in row["error"] and "\n" not in row["error"], row
    return rows


# one byte can turn a frame into one of more channels, and a layout into one of named places
SOUNDS = [("aac", "aac", "stereo"), ("m4a", "aac", "5.1"), ("mka", "libopus", "5.1")]


@more_at_night(40, 600)
def test_damaged_clips(tmp_path, n):
    "Read, with each stream that is listed, or refused."
    r, whole, paths = random.Random(6), [], []
    for suffix in ("mp4", "mkv", "mov", "avi", "ts"):
        whole.append(film(tmp_path / f"whole.{suffix}", EVEN[:20], 2))
    for suffix, codec, layout in SOUNDS:
        write_tone(path := tmp_path / f"whole.{suffix}", codec, layout)
        whole.append(path)
    for k in range(n):
        source = whole[k % len(whole)]
        paths.append(tmp_path / f"bad{k}{source.suffix}")
        paths[-1].write_bytes(damaged(r, source.read_bytes()))
    heard = [path for path in paths if path.suffix in (".aac", ".m4a", ".mka")]
    seen = [path for path in paths if path not in heard]
    rows = [*decoded(heard, "audio"), *decoded(seen)]
    assert 0 < sum(row["error"] is None for row in rows) < n


CODECS = dict(pcm_s16le="wav", pcm_s24le="mov", flac="flac", aac="m4a", ac3="ac3", libopus="mka")


def write_tone(path, codec, layout):
    "A second of 60 Hz, louder in each next channel: 0.02 sin, 0.04 sin, ...; None if not possible."
    wave = np.sin(2 * np.pi * 60 * np.arange(48000) / 48000)[:, None]
    try:
        with av.open(str(path), "w") as out:
            options = dict(mapping_family="255") if codec == "libopus" else {}
            a = out.add_stream(codec, rate=48000, layout=layout, options=options)
            n = a.codec_context.layout.nb_channels
            samples = np.round(32767 * 0.02 * wave * np.arange(1, n + 1)).astype(np.int16)
            for at in range(0, 48000, 960):
                block = samples[at : at + 960].reshape(1, -1)
                out.mux(a.encode(audio_frame(block, at, 48000, layout, "s16")))
            out.mux(a.encode(None))
    except (av.error.FFmpegError, ValueError):
        return None  # not this number of channels, or not in this FFmpeg
    return n


def test_a_sample_rate_that_no_recorder_has(tmp_path):
    "A filter for it would take gigabytes; the number reads the same from both ends."
    write_tone(path := tmp_path / "a.wav", "pcm_s16le", "mono")
    patch(path, b"fmt ", 12, 0x7F00007F)
    refused(lambda: decode_clip(path), "a.wav: a corrupt sample rate, 2130706559 per second")
    refused(lambda: check_media(path, "audio"), "a corrupt sample rate")


CHANNELS = [
    ("pcm_s16le", "7.1"),
    ("pcm_s16le", "16 channels"),
    ("pcm_s24le", "3.0"),
    ("flac", "7.1"),
]
CHANNELS += [("aac", "7.1"), ("libopus", "9 channels"), ("ac3", "5.1"), ("flac", "stereo")]


def test_any_number_of_channels(tmp_path):
    "The mean of the channels, however many there are and whatever places they are given."
    means = {}
    for i, (codec, layout) in enumerate(CHANNELS):
        path = tmp_path / f"{i}.{CODECS[codec]}"
        if n := write_tone(path, codec, layout):
            means[path] = codec, n
            if path.suffix == ".mov" and layout == "3.0":
                patch(
                    path, b"chan", 8, 114 << 16 | 3, 0, 0
                )  # named one by one: centre, left, right
    for row in decoded(means, "audio"):
        codec, n = means[Path(row["path"])]
        assert row["error"] is None and row["tone"] == pytest.approx(0.01 * (n + 1), rel=0.05), row
    assert {("pcm_s16le", 8), ("pcm_s16le", 16), ("flac", 8)} <= set(means.values())


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n"
LISTS = dict(
    never_ends=HLS.format("gone.ts"),
    above=HLS.format("../secret.ts") + "#EXT-X-ENDLIST\n",
    absolute=HLS.format("{tmp}/secret.ts") + "#EXT-X-ENDLIST\n",
    variants="#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\n{tmp}/secret.ts\n",
    beside="ffconcat version 1.0\nfile beside.ts\n",
    dash='<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet><Representation '
    'id="1" bandwidth="9"><BaseURL>{tmp}/secret.ts</BaseURL></Representation></AdaptationSet>'
    "</Period></MPD>",
    sdp="v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 33\n",
    rtsp="[Reference]\nRef1=rtsp://127.0.0.1/secret\n",
    vobsub="# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 0\n",
    smil='<?xml version="1.0"?><smil><body><video src="{tmp}/secret.ts"/></body></smil>',
    text="Once upon a time\n" * 50,
)


@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_lists_of_other_files(tmp_path, suffix):
    "Playlists and what else names further files: refused, and nothing of those is opened."
    folder, paths = tmp_path / "data", []
    folder.mkdir()
    for secret in (tmp_path / "secret.ts", folder / "beside.ts"):
        write_clip(secret, range(20))
        assert len(decode_clip(secret).frames) >= 4
    for name, text in LISTS.items():
        own = dict(beside=".ffconcat", dash=".mpd", sdp=".sdp", vobsub=".idx", text=".txt")
        paths.append(folder / f"{name}{suffix or own.get(name, '.m3u8')}")
        paths[-1].write_text(text.replace("{tmp}", str(tmp_path)))
    for row in decoded(paths):
        assert "not a video or audio file" in row["error"], row
    if not suffix:  # FFmpeg takes no .mp4 for a playlist
        for row in decoded(paths[:5]):
            assert "is read (mp4, mov" in row["error"] and "a playlist, a text" in row["error"], row


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "cut.mp4"])
@pytest.mark.parametrize("empty", ["audio", "video"])
def test_streams_that_deliver_nothing(tmp_path, name, empty):
    "Listed, and without a packet or with all of it cut away: never taken for missing."
    path, other = tmp_path / name, "video" if empty == "audio" else "audio"
    if name == "cut.mp4":  # begins to play behind its end
        patch(film(path, EVEN[:20], 2), b"elst", 16, 10**6, last=empty == "audio")
    else:
        frames, sound = (range(20), []) if empty == "audio" else ([], blocks(SECOND))
        write_clip(path, frames, sound=sound, codec="mpeg4", voice="pcm_s16le")
    said = path.name, f"its {empty} stream delivers nothing", f"`ffmpeg -i IN -{empty[0]}n -c copy"
    refused(lambda: decode_clip(path), *said)
    refused(lambda: check_media(path, other), *said)
    broken = []
    named = dict(video=None) | {other: str(path)}
    asked = Sample(id="s", question="?", choices=("a", "b"), answer=0, **named)
    assert check_clips([asked], broken, opened=True) == [] and said[1] in broken[0]["why"]


# ---------------------------------------------------------------- question files

GOOD = dict(id="g", video="v.mp4", question="?", choices=["a", "b"], answer="b", lettered=True)
GOOD |= dict(family="f", split="test")
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


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(video="v" * 300 + ".mp4"), "no such file"),
        (dict(video="v" * 5000 + ".mp4"), "clip of 5000 characters, expected at most 4096"),
        (dict(family="f" * 4097), "family of 4097 characters"),
        (dict(audio="v\0.wav"), "no such file"),
        (dict(question="\ud800"), "question"),
        (dict(choices=["a", "\udfff"]), "choice '\\udfff', expected a text without NUL"),
        (dict(id="a\0b"), r"id 'a\x00b', expected a text without NUL"),
        (dict(family="\udc00"), "family '\\udc00'"),
        (dict(split="\0"), r"split '\x00'"),
    ],
)
def test_names_and_texts_that_cannot_be(questions, change, part):
    refused(questions(GOOD | change), "q.jsonl, line 1", part)


def assert_storable(samples, path):
    "What passed the door is not lost at the end: it can be saved with a profile, and comes back."
    import xarray as xr

    said = {k: [getattr(s, k) for s in samples] for k in ("id", "family", "clip", "split")}
    labels = {k: ("sample", v) for k, v in said.items() if k != "id"}
    zero = np.zeros((len(samples), 1, 1))
    profile = xr.Dataset(
        dict(correct=(("sample", "removed", "layer"), zero > 0)),
        dict(sample=said["id"], removed=["both"], layer=[0], **labels),
    )
    back = load_profile(save_profile(profile, path))
    for name, key in zip(("sample", *labels), ("id", *labels)):
        assert back[name].values.tolist() == said[key]


def test_questions_nested_too_deeply(questions):
    refused(questions(GOOD, DEEP), "q.jsonl, line 2: nested too deeply")


@pytest.mark.parametrize("field", ["video", "audio"])
@pytest.mark.parametrize("name", ["../away.mp4", "x/../../away.mp4", "{tmp}/away.mp4"])
def test_media_stay_below_the_folder(questions, tmp_path, field, name):
    row = GOOD | {field: name.format(tmp=tmp_path)}
    refused(questions(row), "q.jsonl, line 1", "lies outside of", "--allow outside")
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


@more_at_night(30, 300)
def test_mutated_questions(questions, tmp_path, n):
    "Read, and then usable, or refused in one line with its number; media never from outside."
    r, read = random.Random(7), []
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
            read.append(sample)
        except ValueError as error:
            assert "q.jsonl" in str(error) and "\n" not in str(error)
        assert time.monotonic() - began < 20
    assert 0 < len(read) < n
    assert_storable(read, tmp_path / "p.nc")


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
    refused(lambda: load_model(str(tmp_path), "cpu"), "trust_remote_code=True")
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
    refused(
        lambda: Schedule.load(path), "s.json is not a usable schedule: ", f"`{next(iter(change))}"
    )


def test_schedule_nested_too_deeply(tmp_path):
    path, plan = tmp_path / "s.json", schedules()[0]
    path.write_text(json.dumps(plan | dict(evidence="@")).replace('"@"', DEEP))
    refused(lambda: Schedule.load(path), "s.json is not a usable schedule", "nested too deeply")
