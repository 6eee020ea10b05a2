"""Video and audio files for tests, in any container, and how a refusal must read."""

import struct
import wave
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="decoding needs PyAV")


def blocks(wave, at=0):
    "(first sample, block) pairs of a waveform (samples,) or (channels, samples)."
    return [(at + s, wave[..., s : s + 1024]) for s in range(0, wave.shape[-1], 1024)]


def picture(level, size):
    return av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), "rgb24")


def audio_frame(block, at, hz, layout="mono", kind="fltp"):
    block = np.ascontiguousarray(np.atleast_2d(block))
    frame = av.AudioFrame.from_ndarray(block, kind, layout)
    frame.sample_rate = hz
    frame.pts = at
    frame.time_base = Fraction(1, hz)
    return frame


def write_clip(
    path,
    levels=None,
    times=None,
    rate=10,
    origin=0.0,
    size=(64, 64),
    codec="libx264",
    sound=None,
    hz=16000,
    voice="aac",
    layout="mono",
    **options,
):
    """Grey frames at `times` + `origin` (s, default k / rate) and `blocks` of sound, as the muxer
    takes them; a stream of neither is listed and empty. Skips where this FFmpeg cannot."""
    try:
        with av.open(str(path), "w", options=options) as out:
            if levels is not None:
                fast = dict(preset="ultrafast", crf="10") if codec == "libx264" else {}
                video = out.add_stream(codec, rate=rate, options=fast)
                video.width, video.height = size
                video.pix_fmt = "yuv420p"
                video.codec_context.time_base = Fraction(1, 1000)
                video.codec_context.max_b_frames = 0
                video.codec_context.thread_count = 1
            if sound is not None:
                audio = out.add_stream(voice, rate=hz, layout=layout)
            for k, level in enumerate(levels or ()):
                frame = picture(level, size)
                frame.pts = round(1000 * (origin + (times[k] if times else k / rate)))
                frame.time_base = Fraction(1, 1000)
                out.mux(video.encode(frame))
            if levels:
                out.mux(video.encode(None))
            for at, block in sound or ():
                out.mux(audio.encode(audio_frame(block, at, hz, layout)))
            if sound:
                out.mux(audio.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot write {path.name}: {error}")
    return path


def write_wav(path, sound):
    "Mono at 16 kHz, 16 bit."
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes((sound * 32767).astype("<i2").tobytes())


def patch(path, box, offset, *values, last=False):
    "Overwrite 32-bit numbers behind the first (or last) box of a name."
    data = bytearray(path.read_bytes())
    at = (data.rindex if last else data.index)(box)
    struct.pack_into(f">{len(values)}I", data, at + offset, *values)
    path.write_bytes(data)
    return path


def refused(call, *parts):
    "The text of a ValueError of one line that holds all parts."
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, text
    for part in parts:
        assert part in text, text
    return text


def more_at_night(few, many):
    "Runs a test with `n` cases, and with many in `make nightly`."
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.nightly)])
