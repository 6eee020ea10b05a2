"""Clips in containers and codecs other than our own, files that lie, and writes that are
interrupted."""

import hashlib
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="decoding needs PyAV")

from seats_analysis.storage.files import atomic_write
from seats_analysis.inputs.media import Clip, decode_clip, encode_clip
from seats_analysis.inputs.samples import Sample, read_samples, write_samples

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- building files


def level(frame):
    return round(float(frame.mean()), -1)


def write_video(
    path,
    levels,
    times=None,
    rate=10,
    size=(64, 64),
    codec="libx264",
    pix_fmt="yuv420p",
    origin=0.0,
    sound=None,
    **options,
):
    """Grey frames at `times` (default k / rate) with a millisecond time base, and optionally
    (seconds, rate, waveform) of sound starting at `seconds`."""
    times = [k / rate for k in range(len(levels))] if times is None else times
    with av.open(str(path), "w", options=options) as out:
        v = out.add_stream(codec, rate=rate, options=dict(crf="10") if codec == "libx264" else {})
        v.width, v.height, v.pix_fmt, v.codec_context.time_base, v.codec_context.max_b_frames = (
            *size,
            pix_fmt,
            Fraction(1, 1000),
            0,
        )
        if sound:
            begin, hz, wave_ = sound
            a = out.add_stream(
                "libopus" if str(path).endswith("webm") else "aac", rate=hz, layout="mono"
            )
        for lum, t in zip(levels, times):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), lum, np.uint8), "rgb24"
            )
            frame.pts, frame.time_base = round(1000 * (t + origin)), Fraction(1, 1000)
            out.mux(v.encode(frame))
        out.mux(v.encode(None))
        if sound:
            for s in range(0, len(wave_), 960):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(wave_[None, s : s + 960]), "fltp", "mono"
                )
                frame.sample_rate, frame.pts, frame.time_base = (
                    hz,
                    round(begin * hz) + s,
                    Fraction(1, hz),
                )
                out.mux(a.encode(frame))
            out.mux(a.encode(None))
    return path


def click(seconds=2.0, at=1.0, hz=16000):
    "Silence with a 5 ms burst of 1 kHz that begins at `at`."
    x = np.zeros(round(seconds * hz), np.float32)
    n = np.arange(hz // 200)
    x[round(at * hz) :][: len(n)] = 0.8 * np.sin(2 * np.pi * 1000 * n / hz)
    return x


def onset(clip):
    return np.flatnonzero(np.abs(clip.waveform) > 0.2)[0] / clip.sample_rate


def write_sound(path, x, hz, codec, channels=1):
    with av.open(str(path), "w") as out:
        a = out.add_stream(codec, rate=hz, layout="stereo" if channels == 2 else "mono")
        for s in range(0, len(x), 1024):
            block = np.ascontiguousarray(np.repeat(x[None, s : s + 1024], channels, 0))
            frame = av.AudioFrame.from_ndarray(block, "fltp", "stereo" if channels == 2 else "mono")
            frame.sample_rate, frame.pts, frame.time_base = hz, s, Fraction(1, hz)
            out.mux(a.encode(frame))
        out.mux(a.encode(None))
    return path


def rotate_mp4(path, matrix):
    "Write a display matrix (a, b, c, d) into the track header of the video."
    data = bytearray(path.read_bytes())
    at = (
        data.index(b"tkhd") + 4 + 4 + 20 + 16
    )  # version 0: times and ids, then reserved, layer, group, volume
    a, b, c, d = (v * 65536 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def test_clip(seconds=2, fps=2, size=64):
    frames = np.zeros((seconds * fps, size, size, 3), np.uint8)
    for k, f in enumerate(frames):
        f[:] = 30 + 10 * k
    return Clip("made", frames, float(fps), click(seconds))


test_clip.__test__ = False


# ---------------------------------------------------------------- containers and codecs


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.mov", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
    ],
)
def test_containers(tmp_path, name, codec):
    x = click(2.0, hz=48000)
    try:
        path = write_video(
            tmp_path / name, [10 * k for k in range(20)], codec=codec, sound=(0, 48000, x)
        )
    except av.error.FFmpegError as e:
        pytest.skip(f"this FFmpeg cannot write {name}: {e}")
    clip = decode_clip(path, fps=2)
    vague = name in (
        "a.ts",
        "a.avi",
    )  # these two cannot say how many priming samples the encoder put in front
    assert (clip.id, clip.frames.shape[1:], clip.fps, len(clip.frames) - 4) in (
        ("a", (64, 64, 3), 2.0, n) for n in range(1 + vague)
    )
    assert [level(f) for f in clip.frames[:4]] == pytest.approx([0, 50, 100, 150], abs=15)
    slack = 0.07 if vague else 0.003
    assert onset(clip) == pytest.approx(1.0, abs=slack)


@pytest.mark.parametrize(
    "name, codec, hz, channels",
    [
        ("a.wav", "pcm_s16le", 8000, 1),
        ("a.wav", "pcm_u8", 44100, 2),
        ("a.wav", "pcm_f32le", 16000, 1),
        ("a.m4a", "aac", 44100, 2),
        ("a.mp4", "aac", 48000, 1),
        ("a.mp3", "libmp3lame", 44100, 2),
        ("a.flac", "flac", 22050, 1),
        ("a.ogg", "libopus", 48000, 2),
        ("a.webm", "libopus", 48000, 1),
        ("a.mka", "aac", 44100, 2),
    ],
)
def test_sound_alone(tmp_path, name, codec, hz, channels):
    """Any rate and channel count becomes mono at the rate asked for, and a sound stays where it
    was to 3 ms."""
    try:
        path = write_sound(tmp_path / name, click(2.0, hz=hz), hz, codec, channels)
    except (av.error.FFmpegError, ValueError) as e:
        pytest.skip(f"this FFmpeg cannot write {codec}: {e}")
    clip = decode_clip(path)
    assert clip.frames is None and clip.waveform.dtype == np.float32 and clip.sample_rate == 16000
    assert onset(clip) == pytest.approx(1.0, abs=0.003)
    assert len(clip.waveform) == pytest.approx(32000, abs=0.03 * 16000)
    assert len(decode_clip(path, sample_rate=8000).waveform) == pytest.approx(
        len(clip.waveform) / 2, abs=2
    )


def test_wav_of_the_standard_library(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as f:
        f.setnchannels(2)
        f.setsampwidth(2)
        f.setframerate(16000)
        f.writeframes(np.int16([[1000, 3000]] * 800).tobytes())
    assert decode_clip(tmp_path / "a.wav").waveform == pytest.approx(
        np.full(800, 2000 / 32768), abs=1e-4
    )


@pytest.mark.parametrize(
    "name, codec", [("a.mkv", "libvpx-vp9"), ("a.mkv", "mpeg4"), ("a.mkv", "ffv1")]
)
def test_odd_size_and_length(tmp_path, name, codec):
    "57x33 pixels, 7 frames: nothing is rounded to even."
    path = write_video(tmp_path / name, [100] * 7, size=(57, 33), codec=codec)
    assert decode_clip(path, fps=10).frames.shape == (7, 33, 57, 3)
    assert decode_clip(path, fps=2).frames.shape == (2, 33, 57, 3)  # 0.7 s: at 0 and at 0.5 s


def test_one_frame(tmp_path):
    assert len(decode_clip(write_video(tmp_path / "a.mp4", [80])).frames) == 1
    clip = Clip("one", np.full((1, 32, 32, 3), 90, np.uint8), 0.5)
    back = decode_clip(encode_clip(clip, tmp_path / "one.mp4"), fps=0.5)
    assert (len(back.frames), back.fps) == (1, 0.5)


def test_names_that_look_like_urls(tmp_path):
    for name in ("a:b.mp4", "video 1 (ä ö) %20.mp4", "-i.mp4", "é'\".mp4"):
        path = encode_clip(test_clip(), tmp_path / name)
        assert decode_clip(path).id == Path(name).stem
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert decode_clip("-i.mp4").id == "-i"
    finally:
        os.chdir(here)


def test_title_in_an_old_encoding(tmp_path):
    path = encode_clip(test_clip(), tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"VideoHandler", b"Vid\xe9oHandle\xff", 1))
    assert b"\xe9" in path.read_bytes() and len(decode_clip(path).frames) == 4


def test_cover_picture_is_not_video(tmp_path):
    plain = write_sound(tmp_path / "plain.m4a", click(), 16000, "aac")
    path = tmp_path / "a.m4a"
    with av.open(str(plain)) as src, av.open(str(path), "w", format="mp4") as out:
        a = out.add_stream_from_template(src.streams.audio[0])
        v = out.add_stream("mjpeg", rate=1)
        v.width, v.height, v.pix_fmt = 32, 32, "yuvj420p"
        v.disposition = av.stream.Disposition.attached_pic
        for p in v.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9, np.uint8), "rgb24")):
            out.mux(p)
        out.mux(v.encode(None))
        for p in src.demux(src.streams.audio[0]):
            if p.dts is not None:
                p.stream = a
                out.mux(p)
    with av.open(str(path)) as f:
        assert f.streams.video  # there is a picture, and it is not taken for a video
    assert decode_clip(path).frames is None


# ---------------------------------------------------------------- time


def test_variable_rate_follows_time_stamps(tmp_path):
    times = [0, 0.033, 0.05, 0.4, 0.9, 1.45, 1.49, 2.6]
    path = write_video(tmp_path / "a.mkv", [30 * k for k in range(8)], times)
    grid = [k / 4 for k in range(len(decode_clip(path, fps=4).frames))]
    expected = [30 * max(i for i, t in enumerate(times) if t <= g + 1e-3) for g in grid]
    assert [level(f) for f in decode_clip(path, fps=4).frames] == expected


def test_more_frames_than_the_file_has(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 50, 100, 150], rate=2)
    assert [level(f) for f in decode_clip(path, fps=4).frames] == [0, 0, 50, 50, 100, 100, 150, 150]


def test_max_frames_spreads_over_the_clip(tmp_path):
    path = write_video(tmp_path / "a.mp4", list(range(0, 200, 2)), rate=10)  # 10 s
    clip = decode_clip(path, fps=2, max_frames=5)
    assert clip.fps == pytest.approx(0.5) and [level(f) for f in clip.frames] == [
        0,
        40,
        80,
        120,
        160,
    ]


def test_fractional_rate(tmp_path):
    fps = 30000 / 1001
    clip = Clip("ntsc", np.stack([np.full((32, 32, 3), 2 * k, np.uint8) for k in range(90)]), fps)
    back = decode_clip(encode_clip(clip, tmp_path / "a.mp4"), fps=fps)
    assert len(back.frames) == 90
    assert max(abs(float(a.mean()) - float(b.mean())) for a, b in zip(back.frames, clip.frames)) < 3


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_late_sound(tmp_path, late):
    "A stream that starts late is silence until then, and the click stays where it is in time."
    path = write_video(tmp_path / "a.mkv", [100] * 30, sound=(late, 48000, click(2.0, hz=48000)))
    assert onset(decode_clip(path)) == pytest.approx(1.0 + late, abs=0.003)


def test_late_video(tmp_path):
    "Video that starts 0.6 s after the sound: its first frame stands in before."
    path = write_video(
        tmp_path / "a.mkv",
        [0, 50, 100, 150],
        [0, 0.5, 1, 1.5],
        rate=2,
        origin=0.6,
        sound=(0, 48000, click(2.0, hz=48000)),
    )
    clip = decode_clip(path, fps=2)
    assert [level(f) for f in clip.frames] == [0, 0, 0, 50, 100, 150] and onset(
        clip
    ) == pytest.approx(1.0, abs=0.003)


def test_clock_that_does_not_start_at_zero(tmp_path):
    "A file cut out of a stream (first time stamp 100 s): 0 is where it begins."
    path = write_video(tmp_path / "a.ts", [0, 50, 100, 150], rate=2, origin=100)
    assert [level(f) for f in decode_clip(path, fps=2).frames] == [0, 50, 100, 150]
    path = write_video(
        tmp_path / "b.ts",
        [0, 50, 100, 150],
        rate=2,
        origin=100,
        sound=(100, 48000, click(2.0, hz=48000)),
    )
    assert onset(decode_clip(path)) == pytest.approx(1.0, abs=0.07)


def test_gap_in_the_sound(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        a = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for begin in (0.0, 1.5):
            for s in range(0, 8000, 1000):
                frame = av.AudioFrame.from_ndarray(
                    np.full((1, 1000), 8000, np.int16), "s16", "mono"
                )
                frame.sample_rate, frame.pts, frame.time_base = (
                    16000,
                    round(begin * 16000) + s,
                    Fraction(1, 16000),
                )
                out.mux(a.encode(frame))
    x = decode_clip(path).waveform
    assert len(x) == 32000
    assert (
        abs(x[100:7900] - 0.244).max() < 0.01
        and abs(x[8200:23800]).max() < 0.01
        and abs(x[24200:31900] - 0.244).max() < 0.01
    )


@pytest.mark.parametrize(
    "matrix, turn",
    [
        ((1, 0, 0, 1), lambda f: f),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
        ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    ],
)
def test_rotation(tmp_path, matrix, turn):
    "All turns by 90 degrees and a mirror, read back from a real track header."
    frame = np.full((48, 80, 3), 20, np.uint8)
    frame[4:16, 8:40], frame[30:40, 60:70] = (250, 250, 250), (250, 30, 30)
    path = rotate_mp4(encode_clip(Clip("r", np.stack([frame] * 4)), tmp_path / "r.mp4"), matrix)
    shown = decode_clip(path).frames[0]
    assert shown.shape == turn(frame).shape
    assert np.abs(shown.astype(int) - turn(frame)).mean() < 6
    with av.open(str(path)) as f:  # the rule of FFmpeg itself, where it has one
        angle = next(f.decode(video=0)).rotation
    if matrix != (-1, 0, 0, 1):
        assert angle % 90 == 0 and np.array_equal(turn(frame), np.rot90(frame, angle // 90))


# ---------------------------------------------------------------- our own files


def test_round_trip(tmp_path):
    clip = test_clip(8, 2, 112)
    back = decode_clip(encode_clip(clip, tmp_path / "a.mp4"))
    assert (back.frames.shape, back.fps, len(back.waveform)) == (
        clip.frames.shape,
        2.0,
        len(clip.waveform),
    )
    assert np.abs(back.frames.astype(int) - clip.frames).max() <= 4
    assert onset(back) == pytest.approx(1.0, abs=0.002)


def test_small_and_standard(tmp_path):
    """8 s of 112x112 with noise in picture and sound: under 150 kB (64 clips in 12 MiB leave 190),
    H.264 yuv420p and mono AAC, no time of creation."""
    r = np.random.default_rng(0)
    clip = Clip(
        "n",
        r.integers(40, 52, (16, 112, 112, 3), dtype=np.uint8),
        2.0,
        (0.1 * r.standard_normal(128000)).astype(np.float32),
    )
    path = encode_clip(clip, tmp_path / "n.mp4")
    assert path.stat().st_size < 150_000
    with av.open(str(path)) as f:
        v, a = f.streams.video[0].codec_context, f.streams.audio[0].codec_context
        assert (v.name, v.pix_fmt, a.name, a.sample_rate, a.layout.name) == (
            "h264",
            "yuv420p",
            "aac",
            16000,
            "mono",
        )
        assert not any("creation" in k for k in [*f.metadata, *f.streams.video[0].metadata])


def test_same_bytes_in_another_process(tmp_path):
    "The same clip gives the same bytes whatever the number of threads, the time and the process."
    code = (
        "import sys, numpy as np; from seats_analysis.inputs.media import Clip, encode_clip; "
        "r = np.random.default_rng(1); "
        "frames = r.integers(0, 255, (8, 96, 64, 3), dtype=np.uint8); "
        "sound = (.1*r.standard_normal(64000)).astype('float32'); "
        "encode_clip(Clip('x', frames, 2.0, sound), sys.argv[1])"
    )
    digests = set()
    for k, threads in enumerate(("1", "2")):
        path = tmp_path / f"{k}.mp4"
        subprocess.run(
            [sys.executable, "-c", code, path],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=True,
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


# ---------------------------------------------------------------- broken input: one line that
# names the file


def says(f, *parts):
    with pytest.raises(ValueError) as e:
        f()
    text = str(e.value)
    assert "\n" not in text and len(text) < 300
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"not a video",
        b"Once upon a time\n" * 100,
        b"[00:12.00]a song\n" * 20,
        bytes(range(256)) * 50,
        b"GIF89a" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b'{"a": 1}',
        b"\0\0\0\x20ftypisom" + bytes(100),
        b"RIFF\xff\xff\0\0WAVE",
        b"\x1aE\xdf\xa3" + bytes(50),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_not_media(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    says(lambda: decode_clip(path), f"file{suffix}")


def test_missing_folder_and_unreadable(tmp_path):
    says(lambda: decode_clip(tmp_path / "gone.mp4"), "gone.mp4", "no such file")
    says(lambda: decode_clip(tmp_path), str(tmp_path), "is a folder")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    says(lambda: decode_clip(tmp_path / "loop.mp4"), "loop.mp4")


@pytest.mark.parametrize(
    "name, codec, options, origin",
    [
        ("a.mp4", "libx264", {}, 2.0),
        ("a.mp4", "libx264", {"movflags": "+faststart"}, 0.0),
        ("a.mp4", "libx264", {"movflags": "+faststart"}, 100.0),
        ("a.mov", "libx264", {}, 0.7),
        ("a.mkv", "libx264", {}, 0.0),
        ("a.mkv", "libx264", {}, 100.0),
        ("a.webm", "libvpx", {}, 2.0),
    ],
)
def test_cut_off(tmp_path, name, codec, options, origin):
    """A download that stopped half way is refused, also when its index comes first and the
    beginning would play; the whole file is not, wherever its clock starts."""
    r = np.random.default_rng(0)
    sound = (origin, 48000, (0.2 * r.standard_normal(48000 * 8)).astype(np.float32))
    try:
        path = write_video(
            tmp_path / name,
            list(range(0, 240, 3)),
            rate=10,
            origin=origin,
            sound=sound,
            codec=codec,
            **options,
        )
    except (av.error.FFmpegError, ValueError) as e:
        pytest.skip(f"this FFmpeg cannot write {codec}: {e}")
    assert (
        8 - 0.05 <= decode_clip(path).duration <= 8.5
    )  # mp4 counts the priming samples in where it cannot put them before 0: one frame more
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.7, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        says(lambda: decode_clip(path), name)


@pytest.mark.parametrize(
    "name, codec", [("a.ts", "libx264"), ("a.flv", "libx264"), ("a.avi", "mpeg4")]
)
def test_no_promise_no_refusal(tmp_path, name, codec):
    "What these containers say about their length is an estimate, or counted from another start."
    x = click(4.0, hz=44100)
    try:
        path = write_video(
            tmp_path / name, [100] * 40, origin=2.0, sound=(2.0, 44100, x), codec=codec
        )
    except (av.error.FFmpegError, ValueError) as e:
        pytest.skip(f"this FFmpeg cannot write {name}: {e}")
    assert decode_clip(path).duration >= 4


@pytest.mark.parametrize("rounds", [20, pytest.param(3000, marks=pytest.mark.nightly)])
def test_flipped_bytes_never_crash(tmp_path, rounds):
    "Damaged files decode or are refused; nothing else happens."
    good = encode_clip(test_clip(), tmp_path / "good.mp4").read_bytes()
    r = np.random.default_rng(0)
    for _ in range(rounds):
        data = bytearray(good)
        for at in r.integers(0, len(data), 8):
            data[at] = r.integers(256)
        (tmp_path / "bad.mp4").write_bytes(data)
        try:
            decode_clip(tmp_path / "bad.mp4", max_frames=100)
        except ValueError as e:
            assert "bad.mp4" in str(e)


@pytest.mark.parametrize(
    "kw",
    [
        dict(fps=0),
        dict(fps=-1),
        dict(fps=math.nan),
        dict(fps=math.inf),
        dict(sample_rate=0),
        dict(sample_rate=1.5),
        dict(max_frames=0),
    ],
)
def test_meaningless_requests(tmp_path, kw):
    says(lambda: decode_clip(encode_clip(test_clip(), tmp_path / "a.mp4"), **kw), next(iter(kw)))


# ---------------------------------------------------------------- writes appear whole or not at all


def only(folder, *names):
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file(tmp_path, error):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(type(error)):
        with atomic_write(tmp_path / "a.json") as part:
            part.write_text("half")
            raise error
    assert (tmp_path / "a.json").read_text() == "old"
    only(tmp_path, "a.json")


def limited(code, folder, limit):
    "Run code in a process that may not write files beyond `limit` bytes, as on a full disk."

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        preexec_fn=full,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "write",
    [
        "with atomic_write(p) as part: part.write_bytes(bytes(20_000))",
        "noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8); "
        "encode_clip(Clip('c', noise), p)",
        "write_samples([Sample('s', None, 'x'*20_000, ('a', 'b'), 0)], p)",
    ],
)
def test_full_disk(tmp_path, write):
    "The old file survives, the temporary one is gone, and the error is reported."
    (tmp_path / "a.bin").write_text("old")
    code = (
        "import sys, numpy as np; from pathlib import Path; "
        "from seats_analysis.storage.files import atomic_write; "
        "from seats_analysis.inputs.media import Clip, encode_clip; "
        "from seats_analysis.inputs.samples import Sample, write_samples; "
        f"p = Path(sys.argv[1])/'a.bin'; \n{write}"
    )
    run = limited(code, tmp_path, 4096)
    assert run.returncode and "File too large" in run.stderr
    assert (tmp_path / "a.bin").read_text() == "old"
    only(tmp_path, "a.bin")
    assert (
        limited(code, tmp_path, 10**7).returncode == 0
        and (tmp_path / "a.bin").stat().st_size > 4096
    )  # the same code with room succeeds


def test_interrupt_from_outside(tmp_path):
    "Ctrl-C while a file is being written: nothing half-written is left."
    (tmp_path / "a.txt").write_text("old")
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from seats_analysis.storage.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])/'a.txt') as part:\n"
        " part.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert run.stdout.readline() == "writing\n"
    run.send_signal(signal.SIGINT)
    assert run.wait(30)
    assert (tmp_path / "a.txt").read_text() == "old"
    only(tmp_path, "a.txt")


def test_killed_writer_costs_nothing(tmp_path):
    "After SIGKILL the old file is whole (the orphan beside it is hidden and never read)."
    (tmp_path / "a.txt").write_text("old")
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from seats_analysis.storage.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])/'a.txt') as part:\n"
        " part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT).returncode
        == -signal.SIGKILL
    )
    assert (tmp_path / "a.txt").read_text() == "old"
    assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p.name != "a.txt")


def test_readers_never_see_half(tmp_path):
    "While one thread replaces a file again and again, a reader always finds one whole version."
    path, stop, seen = tmp_path / "a.txt", threading.Event(), set()
    path.write_text("0" * 10_000)

    def read():
        while not stop.is_set():
            text = path.read_text()
            seen.add((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    for k in range(50):
        with atomic_write(path) as part:
            with open(part, "w") as f:
                for _ in range(10):
                    f.write(str(k % 10) * 1000)
                    f.flush()
    stop.set()
    reader.join()
    assert seen == {(10_000, 1)}


def test_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    with atomic_write(tmp_path / "link.txt") as part:
        part.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (
        tmp_path / "real" / "a.txt"
    ).read_text() == "new"


def test_suffix_is_kept(tmp_path):
    with atomic_write(tmp_path / "a.tar.gz") as part:
        assert part.suffix == ".gz" and part.parent == tmp_path.resolve()
        part.write_text("x")


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_write(tmp_path / "a.txt"):
            pass
    only(tmp_path)


# ---------------------------------------------------------------- questions


def test_samples_round_trip(tmp_path):
    for n in ("v.mp4", "s.wav"):
        (tmp_path / n).write_bytes(b"x")
    samples = [
        Sample(
            "a",
            str(tmp_path / "v.mp4"),
            'Größe? "x"\n2',
            ("ja", "nein", "x\u2028y"),
            2,
            "f",
            "test",
            lettered=True,
        ),
        Sample("b", None, "?", ("x", "y"), 0, audio=str(tmp_path / "s.wav")),
    ]
    (tmp_path / "sub").mkdir()
    write_samples(samples, tmp_path / "sub" / "q.jsonl")
    back = read_samples(tmp_path / "sub" / "q.jsonl", allow_outside=True)
    assert [replace(s, video=None, audio=None) for s in back] == [
        replace(s, video=None, audio=None) for s in samples
    ]
    assert [s.clip for s in back] == ["v", "s"] and Path(back[0].video).resolve() == (
        tmp_path / "v.mp4"
    ).resolve()


def test_windows_line_ends_and_bom(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + b'{"video": null, "question": "?", "choices": ["a", "b"], "answer": "B"}\r\n\r\n' * 2
    )
    assert [s.answer for s in read_samples(tmp_path / "q.jsonl")] == [1, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(question=None), "question None"),
        (dict(question=" "), "question"),
        (dict(choices="ab"), "choices 'ab'"),
        (dict(choices=[]), "choices []"),
        (dict(choices=["a", 1]), "choices"),
        (dict(choices=["a", "a"]), "only once"),
        (dict(answer="c"), "answer 'c'"),
        (dict(answer=2), "answer 2"),
        (dict(answer=True), "answer True"),
        (dict(answer=1.0), "answer 1.0"),
        (dict(answer=None), "answer None"),
        (dict(video=3), "video 3"),
        (dict(video=""), "video ''"),
        (dict(video="gone.mp4"), "gone.mp4"),
        (dict(audio="gone.wav"), "gone.wav"),
        (dict(lettered="yes"), "lettered 'yes'"),
    ],
)
def test_wrong_values_name_line_and_value(tmp_path, change, message):
    good = dict(video=None, question="?", choices=["a", "b"], answer="a")
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(good | change) + "\n")
    says(lambda: read_samples(tmp_path / "q.jsonl"), "q.jsonl, line 3", message)


@pytest.mark.parametrize("field", ["video", "question", "choices", "answer"])
def test_missing_fields_name_the_line(tmp_path, field):
    good = dict(video=None, question="?", choices=["a", "b"], answer="a")
    (tmp_path / "q.jsonl").write_text(
        "\n".join(
            [json.dumps(good)] * 4 + [json.dumps({k: v for k, v in good.items() if k != field})]
        )
    )
    says(lambda: read_samples(tmp_path / "q.jsonl"), "q.jsonl, line 5", f"missing field '{field}'")


def test_unlabelled_questions_come_back(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"video": null, "question": "?"}\n'
        '{"video": null, "question": "!", "choices": ["a", "b"], "answer": "b"}\n'
    )
    read = read_samples(tmp_path / "q.jsonl")
    assert [(s.choices, s.answer) for s in read] == [((), -1), (("a", "b"), 1)]
    assert read_samples(write_samples(read, tmp_path / "copy.jsonl")) == read


def test_equal_file_names_are_different_clips(tmp_path):
    """Folders in front tell them apart, none that lies above all of them; the ids come back from a
    copy, and data without such files keep theirs."""
    row = lambda name, **kw: (
        json.dumps(dict(video=name, question="?", choices=["a", "b"], answer=0) | kw) + "\n"
    )
    for folder in ("001", "002", "sub"):
        (tmp_path / folder).mkdir()
    for name in ("001/video.mp4", "002/video.mp4", "002/other.mp4"):
        encode_clip(test_clip(), tmp_path / name)
    (tmp_path / "q.jsonl").write_text(
        row("001/video.mp4")
        + row("002/video.mp4")
        + row("002/../001/video.mp4")
        + row("002/other.mp4")
        + row(None, audio="002/video.mp4")
    )
    read = read_samples(tmp_path / "q.jsonl")
    assert [s.clip for s in read] == ["001/video", "002/video", "001/video", "other", "002/video"]
    assert [s.load_media().id for s in read] == [s.clip for s in read]
    copy = write_samples(read, tmp_path / "sub" / "copy.jsonl")
    assert [s.clip for s in read_samples(copy, allow_outside=True)] == [s.clip for s in read]
    assert read_samples(write_samples(read[:1], tmp_path / "001" / "one.jsonl"))[0].clip == "video"
    shipped = read_samples(ROOT / "data" / "testbed" / "questions.jsonl")
    assert [s.clip for s in shipped] == [Path(s.video).stem for s in shipped]


def test_media_of_a_sample(tmp_path):
    clip = test_clip()
    path = str(encode_clip(clip, tmp_path / "a.mp4"))
    sample = Sample("s", path, "?", ("a", "b"), 0)
    assert sample.load_media().frames.shape == clip.frames.shape
    assert replace(sample, video=clip).load_media() is clip
    other = str(encode_clip(Clip("other", waveform=click(3.0)), tmp_path / "other.mp4"))
    both = replace(sample, audio=other).load_media()
    assert (both.id, len(both.frames), len(both.waveform)) == ("a", len(clip.frames), 48000)
