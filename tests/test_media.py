"""Clips in containers and codecs other than our own, broken files, and files of questions."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from conftest import ROOT
import numpy as np
import pytest
from clips import av, blocks, patch, picture, refused, write_clip

from seats_analysis import Clip, Sample, decode_clip, read_samples
from seats_analysis.testbed.load import write_samples


def level(frame):
    return round(float(frame.mean()), -1)


def levels(clip):
    return [level(frame) for frame in clip.frames]


def click(seconds=2.0, hz=16000):
    "Silence with a 5 ms burst of 1 kHz that begins after a second."
    x = np.zeros(round(seconds * hz), np.float32)
    n = np.arange(hz // 200)
    x[hz:][: len(n)] = 0.8 * np.sin(2 * np.pi * 1000 * n / hz)
    return x


def heard(late=0.0, seconds=2.0):
    "Arguments of `write_clip` for a click at 48 kHz that begins `late`."
    return dict(sound=blocks(click(seconds, 48000), round(late * 48000)), hz=48000)


def seconds(clip):
    return max(len(clip.frames) / clip.fps, len(clip.waveform) / clip.sample_rate)


def onset(clip):
    return np.flatnonzero(np.abs(clip.waveform) > 0.2)[0] / clip.sample_rate


def made(seconds=2, size=64):
    frames = np.zeros((2 * seconds, size, size, 3), np.uint8)
    frames += np.arange(30, 30 + 20 * seconds, 10, np.uint8)[:, None, None, None]
    return Clip("made", frames, 2.0, click(seconds))


@pytest.fixture
def file(tmp_path):
    return made().save(tmp_path / "a.mp4")


# ---------------------------------------------------------------- containers and codecs


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm", "a.avi", "a.ts"])
def test_containers(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    voice = "libopus" if name == "a.webm" else "aac"
    path = tmp_path / name
    clip = decode_clip(write_clip(path, range(0, 200, 10), codec=codec, voice=voice, **heard()))
    vague = name in ("a.ts", "a.avi")  # cannot say how many priming samples the encoder added
    assert (clip.id, clip.frames.shape[1:], clip.fps) == ("a", (64, 64, 3), 2.0)
    assert len(clip.frames) == 4 or vague and len(clip.frames) == 5
    assert levels(clip)[:4] == pytest.approx([0, 50, 100, 150], abs=15)
    assert onset(clip) == pytest.approx(1.0, abs=0.07 if vague else 0.003)


SOUNDS = """
a.wav pcm_s16le 8000 1
a.wav pcm_u8 44100 2
a.wav pcm_f32le 16000 1
a.m4a aac 44100 2
a.mp4 aac 48000 1
a.mp3 libmp3lame 44100 2
a.flac flac 22050 1
a.ogg libopus 48000 2
a.webm libopus 48000 1
a.mka aac 44100 2
"""


@pytest.mark.parametrize("case", SOUNDS.strip().splitlines())
def test_sound_alone(tmp_path, case):
    """Any rate and channel count becomes mono at the rate asked for, and a sound stays where it
    was to 3 ms."""
    name, voice, hz, channels = case.split()
    x = np.repeat(click(hz=int(hz))[None], int(channels), 0)
    layout = dict(layout="stereo" if channels == "2" else "mono")
    path = write_clip(tmp_path / name, sound=blocks(x), hz=int(hz), voice=voice, **layout)
    clip = decode_clip(path)
    assert clip.frames is None and clip.waveform.dtype == np.float32 and clip.sample_rate == 16000
    assert onset(clip) == pytest.approx(1.0, abs=0.003)
    n = len(clip.waveform)
    assert n == pytest.approx(32000, abs=480)
    assert len(decode_clip(path, sample_rate=8000).waveform) == pytest.approx(n / 2, abs=2)


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mpeg4", "ffv1"])
def test_odd_size_and_length(tmp_path, codec):
    "57x33 pixels, 7 frames: nothing is rounded to even."
    path = write_clip(tmp_path / "a.mkv", [100] * 7, size=(57, 33), codec=codec)
    assert decode_clip(path, fps=10).frames.shape == (7, 33, 57, 3)
    assert decode_clip(path, fps=2).frames.shape == (2, 33, 57, 3)  # 0.7 s: at 0 and at 0.5 s


def test_one_frame(tmp_path):
    assert len(decode_clip(write_clip(tmp_path / "a.mp4", [80])).frames) == 1
    clip = Clip("one", np.full((1, 32, 32, 3), 90, np.uint8), 0.5)
    back = decode_clip(clip.save(tmp_path / "one.mp4"), fps=0.5)
    assert (len(back.frames), back.fps) == (1, 0.5)


def test_names_that_look_like_urls(tmp_path, monkeypatch):
    for name in ("a:b.mp4", "video 1 (ä ö) %20.mp4", "-i.mp4", "é'\".mp4"):
        assert decode_clip(made().save(tmp_path / name)).id == Path(name).stem
    monkeypatch.chdir(tmp_path)
    assert decode_clip("-i.mp4").id == "-i"


def test_title_in_an_old_encoding(file):
    file.write_bytes(file.read_bytes().replace(b"VideoHandler", b"Vid\xe9oHandle\xff", 1))
    assert b"\xe9" in file.read_bytes() and len(decode_clip(file).frames) == 4


def test_cover_picture_is_not_video(tmp_path):
    plain = write_clip(tmp_path / "plain.m4a", sound=blocks(click()))
    path = tmp_path / "a.m4a"
    with av.open(str(plain)) as source, av.open(str(path), "w", format="mp4") as out:
        audio = out.add_stream_from_template(source.streams.audio[0])
        cover = out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(picture(9, (32, 32))))
        out.mux(cover.encode(None))
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = audio
                out.mux(packet)
    with av.open(str(path)) as written:
        assert written.streams.video  # there is a picture, and it is not taken for a video
    assert decode_clip(path).frames is None


# ---------------------------------------------------------------- time


def test_variable_rate_follows_time_stamps(tmp_path):
    times = [0, 0.033, 0.05, 0.4, 0.9, 1.45, 1.49, 2.6]
    clip = decode_clip(write_clip(tmp_path / "a.mkv", range(0, 240, 30), times), fps=4)
    shown = [sum(t <= k / 4 + 1e-3 for t in times) - 1 for k in range(len(clip.frames))]
    assert len(shown) > 10 and levels(clip) == [30 * i for i in shown]


@pytest.mark.parametrize(
    "name, written, fps, shown",
    [
        ("a.mp4", {}, 4, [0, 0, 50, 50, 100, 100, 150, 150]),  # more frames than the file has
        ("a.ts", dict(origin=100), 2, [0, 50, 100, 150]),  # cut out of a stream: 0 is its begin
        # video that starts 0.6 s after the sound: its first frame stands in before
        ("a.mkv", dict(origin=0.6, **heard()), 2, [0, 0, 0, 50, 100, 150]),
    ],
)
def test_frames_are_shown_at_their_time(tmp_path, name, written, fps, shown):
    clip = decode_clip(write_clip(tmp_path / name, [0, 50, 100, 150], rate=2, **written), fps=fps)
    assert levels(clip) == shown
    assert clip.waveform is None or onset(clip) == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize(
    "name, origin, late, slack",
    [("a.mkv", 0, 0, 0.003), ("a.mkv", 0, 0.5, 0.003), ("a.ts", 100, 0, 0.07)],
)
def test_late_sound(tmp_path, name, origin, late, slack):
    "A stream that starts late is silence until then, and the click stays where it is in time."
    path = write_clip(tmp_path / name, [100] * 30, origin=origin, **heard(origin + late))
    assert onset(decode_clip(path)) == pytest.approx(1.0 + late, abs=slack)


def test_fractional_rate(tmp_path):
    fps = 30000 / 1001
    clip = Clip("ntsc", np.stack([np.full((32, 32, 3), 2 * k, np.uint8) for k in range(90)]), fps)
    back = decode_clip(clip.save(tmp_path / "a.mp4"), fps=fps)
    assert len(back.frames) == 90
    assert np.abs(back.frames.mean((1, 2, 3)) - clip.frames.mean((1, 2, 3))).max() < 3


def test_gap_in_the_sound(tmp_path):
    tone = np.full(8000, 0.25, np.float32)
    sound = blocks(tone) + blocks(tone, 24000)
    x = decode_clip(write_clip(tmp_path / "a.mkv", sound=sound, voice="pcm_s16le")).waveform
    assert len(x) == 32000
    for begin, value in (0, 0.25), (8100, 0), (16000, 0), (24100, 0.25):
        assert abs(x[begin + 100 : begin + 7700] - value).max() < 0.01


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
    frame[4:16, 8:40] = 250
    frame[30:40, 60:70] = (250, 30, 30)
    path = Clip("r", np.stack([frame] * 4)).save(tmp_path / "r.mp4")
    a, b, c, d = (65536 * v % 2**32 for v in matrix)
    # version 0: times and ids, then reserved, layer, group, volume
    patch(path, b"tkhd", 4 + 4 + 20 + 16, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    shown = decode_clip(path).frames[0]
    assert shown.shape == turn(frame).shape
    assert np.abs(shown.astype(int) - turn(frame)).mean() < 6
    with av.open(str(path)) as written:  # the rule of FFmpeg itself, where it has one
        angle = next(written.decode(video=0)).rotation
    if matrix != (-1, 0, 0, 1):
        assert angle % 90 == 0 and np.array_equal(turn(frame), np.rot90(frame, angle // 90))


# ---------------------------------------------------------------- our own files


def test_small_and_standard(tmp_path):
    """8 s of 112x112 with noise in picture and sound: under 150 kB (64 clips in 12 MiB leave 190),
    H.264 yuv420p and mono AAC, no time of creation."""
    r = np.random.default_rng(0)
    frames = r.integers(40, 52, (16, 112, 112, 3), dtype=np.uint8)
    sound = 0.1 * r.standard_normal(128000, np.float32)
    path = Clip("n", frames, 2.0, sound).save(tmp_path / "n.mp4")
    assert path.stat().st_size < 150_000
    with av.open(str(path)) as file:
        v = file.streams.video[0].codec_context
        a = file.streams.audio[0].codec_context
        assert (v.name, v.pix_fmt) == ("h264", "yuv420p")
        assert (a.name, a.sample_rate, a.layout.name) == ("aac", 16000, "mono")
        assert not any("creation" in k for k in [*file.metadata, *file.streams.video[0].metadata])


ENCODE = """
import sys, numpy as np
from seats_analysis.inputs.media import Clip
r = np.random.default_rng(1)
frames = r.integers(0, 255, (8, 96, 64, 3), dtype=np.uint8)
Clip("x", frames, 2.0, 0.1 * r.standard_normal(64000, "float32")).save(sys.argv[1])
"""


def test_same_bytes_in_another_process(tmp_path):
    "The same clip gives the same bytes whatever the number of threads, the time and the process."
    digests = set()
    for threads in ("1", "2"):
        path = tmp_path / f"{threads}.mp4"
        env = os.environ | dict(OMP_NUM_THREADS=threads)
        subprocess.run([sys.executable, "-c", ENCODE, path], cwd=ROOT, env=env, check=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


# ---------------------------------------------------------------- broken input


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"[00:12.00]a song\n" * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\0\0\0\x20ftypisom" + bytes(100),
        b"RIFF\xff\xff\0\0WAVE",
    ],
)
@pytest.mark.parametrize("name", ["file.mp4", "file"])
def test_not_media(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert len(refused(lambda: decode_clip(tmp_path / name), name)) < 300


CUT = """
a.mp4 libx264 2.0
a.mp4 libx264 0.0 +faststart
a.mp4 libx264 100.0 +faststart
a.mov libx264 0.7
a.mkv libx264 0.0
a.mkv libx264 100.0
a.webm libvpx 2.0
"""


@pytest.mark.parametrize("case", CUT.strip().splitlines())
def test_cut_off(tmp_path, case):
    """A download that stopped half way is refused, also when its index comes first and the
    beginning would play; the whole file is not, wherever its clock starts."""
    name, codec, origin, *flags = case.split()
    origin = float(origin)
    noise = 0.2 * np.random.default_rng(0).standard_normal(48000 * 8, np.float32)
    path = write_clip(
        tmp_path / name,
        range(0, 240, 3),
        origin=origin,
        codec=codec,
        sound=blocks(noise, round(origin * 48000)),
        hz=48000,
        voice="libopus" if codec == "libvpx" else "aac",
        **dict(movflags=flags[0]) if flags else {},
    )
    # mp4 counts the priming samples in where it cannot put them before 0: one frame more
    assert 8 - 0.05 <= seconds(decode_clip(path)) <= 8.5
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.7, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        refused(lambda: decode_clip(path), name)


@pytest.mark.parametrize("name", ["a.ts", "a.flv", "a.avi"])
def test_no_promise_no_refusal(tmp_path, name):
    "What these containers say about their length is an estimate, or counted from another start."
    sound = dict(sound=blocks(click(4.0, 44100), 88200), hz=44100)
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_clip(tmp_path / name, [100] * 40, origin=2.0, codec=codec, **sound)
    assert seconds(decode_clip(path)) >= 4


# ---------------------------------------------------------------- questions


GOOD = dict(video=None, question="?", choices=["a", "b"], answer="a")


def asked(folder, *rows):
    "A file of questions."
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_samples_round_trip(tmp_path):
    (tmp_path / "sub").mkdir()
    video, audio = tmp_path / "v.mp4", tmp_path / "s.wav"
    for path in (video, audio):
        path.write_bytes(b"x")
    said = dict(family="f", split="test", lettered=True)
    choices = ("ja", "nein", "x\u2028y")
    samples = [
        Sample(str(video), 'Größe? "x"\n2', choices, 2, id="a", **said),
        Sample(None, "?", ("x", "y"), 0, id="b", audio=str(audio)),
    ]
    write_samples(samples, tmp_path / "sub" / "q.jsonl")
    back = read_samples(tmp_path / "sub" / "q.jsonl", allow_outside=True)
    assert [s.clip for s in back] == ["v", "s"]
    assert [Path(p).resolve() for p in (back[0].video, back[1].audio)] == [video, audio]
    bare = [[replace(s, video=None, audio=None) for s in rows] for rows in (samples, back)]
    assert bare[0] == bare[1]


WRONG = """
"question": null | question None
"question": " " | question
"choices": "ab" | choices 'ab'
"choices": [] | choices []
"choices": ["a", 1] | choices
"choices": ["a", "a"] | only once
"answer": "c" | answer 'c'
"answer": 2 | answer 2
"answer": true | answer True
"answer": 1.0 | answer 1.0
"answer": null | answer None
"video": 3 | video 3
"video": "" | video ''
"video": "gone.mp4" | gone.mp4
"audio": "gone.wav" | gone.wav
"lettered": "yes" | lettered 'yes'
"""


@pytest.mark.parametrize("case", [*WRONG.strip().splitlines(), *GOOD])
def test_wrong_and_missing_fields_name_line_and_value(tmp_path, case):
    if case in GOOD:
        bad, message = GOOD.copy(), f"missing field '{case}'"
        del bad[case]
    else:
        change, message = case.split(" | ")
        bad = GOOD | json.loads("{" + change + "}")
    path = asked(tmp_path, GOOD, GOOD, bad)
    refused(lambda: read_samples(path), "q.jsonl, line 3", message)


def test_equal_file_names_are_different_clips(tmp_path):
    """Folders in front tell them apart, none that lies above all of them; the ids come back from a
    copy, and data without such files keep theirs."""
    for name in ("sub/x.mp4", "001/video.mp4", "002/video.mp4", "002/other.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        made().save(tmp_path / name)
    videos = "001/video.mp4", "002/video.mp4", "002/../001/video.mp4", "002/other.mp4"
    rows = [GOOD | dict(video=v) for v in videos]
    read = read_samples(asked(tmp_path, *rows, GOOD | dict(audio="002/video.mp4")))
    names = ["001/video", "002/video", "001/video", "other", "002/video"]
    assert [s.clip for s in read] == [s.load_media()[0].id for s in read] == names
    copy = write_samples(read, tmp_path / "sub" / "copy.jsonl")
    assert [s.clip for s in read_samples(copy, allow_outside=True)] == names
    assert read_samples(write_samples(read[:1], tmp_path / "001" / "one.jsonl"))[0].clip == "video"
    shipped = read_samples(ROOT / "data" / "testbed" / "questions.jsonl")
    assert [s.clip for s in shipped] == [Path(s.video).stem for s in shipped]
