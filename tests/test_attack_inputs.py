"""Hostile clips, question files and schedules: refused in one line or read, never more than that.

The cases that an attack found stand as examples; `make nightly` draws seeded ones like them."""

import random
import struct
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="decoding needs PyAV")

from seats_analysis.inputs import media
from seats_analysis.inputs.media import decode_clip

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
