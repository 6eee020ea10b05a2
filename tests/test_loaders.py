"""Benchmarks in the layouts of their repositories, made here with tiny files; their limits; and
the documented command on real code paths."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seats_analysis.inputs import benchmarks as K
from seats_analysis.inputs.samples import Sample, write_samples

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "data" / "testbed" / "clips"
ASKED = "what pitch is heard first ?"
CHOICES = ["low", "high", "middle", "none"]


def seats(*args):
    from seats_analysis.cli.main import app

    return CliRunner().invoke(app, [str(a) for a in args])


def put_video(path):
    "A real clip under a benchmark's file name."
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(sorted(CLIPS.glob("*.mp4"))[0], path)


def lettered():
    return [f"{a}. {c}" for a, c in zip("ABCD", CHOICES)]


def parquet(rows, path):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


# one function per layout: makes a folder with two videos, one question on the first and two on
# the second


def put_videos(folder, *names):
    for name in names:
        put_video(folder / name)


def write_json(path, data):
    path.write_text(json.dumps(data))


FIELDS = dict(question=ASKED, options=lettered(), correct_option="B", question_type="counting")
TASK = dict(question=ASKED, candidates=lettered(), answer="B", task_type="Audio Change")


def daily_omni(folder):
    asked = dict(Question=ASKED, Choice=lettered(), Answer="B", Type="Inference")
    write_json(folder / "qa.json", [dict(asked, video_id=v) for v in ("v1", "v2", "v2")])
    for v in ("v1", "v2"):
        put_videos(folder / "Videos" / v, f"{v}_video.mp4", f"{v}_audio.wav")


def worldsense(folder):
    about = dict(video_duration="60s", domain="Music", audio_class=["Music"])
    videos = dict(v1=dict(about, task0=TASK), v2=dict(about, task0=TASK, task1=TASK))
    write_json(folder / "worldsense_qa.json", videos)
    put_videos(folder / "videos", "v1.mp4", "v2.mp4")


def worldsense_flat(folder):
    rows = [
        dict(TASK, index=i, video=v, video_path=f"./videos/{v}.mp4")
        for i, v in enumerate(("v1", "v2", "v2"))
    ]
    parquet(rows, folder / "data" / "test-00000-of-00001.parquet")
    put_videos(folder / "videos", "v1.mp4", "v2.mp4")


def omnivideobench(folder):
    asked = dict(FIELDS, answer="high", options=[f"{a}.{c}" for a, c in zip("ABCD", CHOICES)])
    videos = [dict(video=f"video_{n}", questions=[asked] * n) for n in (1, 2)]
    write_json(folder / "data.json", videos)
    put_videos(folder / "videos", "video_1.mp4", "video_2.mp4")


def omnivideobench_flat(folder):
    rows = [dict(FIELDS, video=f"videos/video_{n}.mp4") for n in (1, 2, 2)]
    parquet(rows, folder / "data.parquet")
    put_videos(folder / "videos", "video_1.mp4", "video_2.mp4")


def video_mme(folder):
    asked = dict(question=ASKED, options=lettered(), answer="B", task_type="Counting Problem")
    rows = [
        dict(asked, video_id=n, videoID=v, question_id=f"{n}-{i}")
        for v, n, i in (("abc", "001", 1), ("xyz", "002", 1), ("xyz", "002", 2))
    ]
    parquet(rows, folder / "videomme" / "test-00000-of-00001.parquet")
    put_videos(folder / "data", "abc.mp4", "xyz.MP4")


def lvomnibench(folder):
    write_json(folder / "data.json", [dict(FIELDS, video_id=f"video_{n}") for n in (0, 1, 1)])
    put_videos(folder / "videos", "video_0.mp4", "video_1.mp4")


LAYOUTS = {
    "daily-omni": [daily_omni],
    "worldsense": [worldsense, worldsense_flat],
    "omnivideobench": [omnivideobench, omnivideobench_flat],
    "video-mme": [video_mme],
    "lvomnibench": [lvomnibench],
}
CASES = [
    pytest.param(name, make, id=make.__name__) for name, makes in LAYOUTS.items() for make in makes
]


def test_every_benchmark_is_tried():
    assert set(LAYOUTS) == set(K.BENCHMARKS)


@pytest.mark.parametrize("name, make", CASES)
def test_layout(tmp_path, name, make):
    make(tmp_path)
    samples = K.load_benchmark(name, tmp_path)
    assert (
        len(samples) == 3
        and len({s.id for s in samples}) == 3
        and len({s.clip for s in samples}) == 2
    )
    for s in samples:
        assert (
            (s.question, s.choices, s.answer, s.lettered) == (ASKED, tuple(CHOICES), 1, True)
            and s.family
            and Path(s.video).is_file()
        )
        assert s.split == K.split_of(
            s.clip.removesuffix("_video")
        )  # the same for every packaging of a benchmark
    assert [s.id for s in K.load_benchmark(name, tmp_path, limit=2)] == [s.id for s in samples[:2]]


@pytest.mark.parametrize("name, make", CASES)
def test_missing_videos(tmp_path, name, make):
    make(tmp_path)
    gone = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".mp4")[0]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"{name}: 1 videos are not in .*skip"):
        K.load_benchmark(name, tmp_path)
    assert len(K.load_benchmark(name, tmp_path, broken=[])) == 2
    for p in tmp_path.rglob("*"):
        if p.suffix.lower() == ".mp4":
            p.unlink()
    with pytest.raises(ValueError, match="unpack"):
        K.load_benchmark(name, tmp_path, broken=[])


def test_separate_sound_is_taken(tmp_path):
    daily_omni(tmp_path)
    assert K.load_benchmark("daily-omni", tmp_path)[0].audio.endswith("v1_audio.wav")
    (tmp_path / "Videos" / "v1" / "v1_audio.wav").unlink()
    assert K.load_benchmark("daily-omni", tmp_path)[0].audio is None


def test_equal_file_names_are_different_clips(tmp_path):
    "A repackaging with one folder per video: three questions, two clips."
    asked = dict(FIELDS, correct_option="b) high")
    names = ("1/video.mp4", "2/video.mp4", "2/video.mp4")
    write_json(tmp_path / "data.json", [dict(asked, video_id=v) for v in names])
    put_videos(tmp_path, *names)
    assert [s.clip for s in K.load_benchmark("lvomnibench", tmp_path)] == [
        "1/video",
        "2/video",
        "2/video",
    ]


@pytest.mark.parametrize(
    "answer, right",
    [
        ("(b) text", 1),
        ("b) anything", 1),
        ("b. Text", 1),
        ("b: text", 1),
        ("b.", 1),
        ("(a) x", 0),
        ("(B) text", 1),
        ("B.text", 1),
        ("a", 0),
        ("a dog runs", None),
        ("A dog runs", None),
        ("a. m.", None),
        ("a.m", None),
        ("b. other", None),
        ("(c) text", None),
        ("c. 1850", None),
    ],
)
def test_small_letters_count_where_they_must_be_letters(answer, right):
    if right is not None:
        assert K.answer_index(answer, ("x", "text")) == right
    else:
        with pytest.raises(ValueError, match="letter up to B"):
            K.answer_index(answer, ("x", "text"))


def test_splits_share_no_clip():
    sides = {}
    for clip in range(400):
        sides.setdefault(K.split_of(f"video_{clip}"), set()).add(clip)
    assert set(sides) == {"derive", "test"} and min(map(len, sides.values())) > 150


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"x": ', "not readable JSON"),
        ('["x"]', "not laid out as"),
        ('[{"video_id": "v"}]', "no field 'question'"),
        (
            json.dumps(
                [dict(video_id="v", question="q", options=["A. a", "B. b"], correct_option="F")]
            ),
            "answer",
        ),
    ],
)
def test_broken_annotations_name_the_file(tmp_path, text, says):
    (tmp_path / "data.json").write_text(text)
    put_video(tmp_path / "videos" / "v.mp4")
    with pytest.raises(ValueError, match=says) as error:
        K.load_benchmark("lvomnibench", tmp_path)
    assert "data.json" in str(error.value) or "lvomnibench" in str(error.value)


def test_broken_parquet_names_the_file(tmp_path):
    (tmp_path / "videomme").mkdir()
    (tmp_path / "videomme" / "test-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="test-0.parquet"):
        K.load_benchmark("video-mme", tmp_path)


def test_folder_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "WorldSense").mkdir()
    worldsense(tmp_path / "WorldSense")
    monkeypatch.setenv("SEATS_DATA", str(tmp_path))
    assert len(K.load_questions("worldsense")) == 3


def test_hub_cache_is_looked_in(tmp_path, monkeypatch):
    "A snapshot as `hf download` leaves it."
    snapshot = tmp_path / "datasets--KD-TAO--LVOmniBench" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    lvomnibench(snapshot)
    (tmp_path / "datasets--KD-TAO--LVOmniBench" / "refs").mkdir()
    (tmp_path / "datasets--KD-TAO--LVOmniBench" / "refs" / "main").write_text("0123abc")
    import huggingface_hub

    real = huggingface_hub.snapshot_download
    monkeypatch.delenv("SEATS_DATA", raising=False)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **kw: real(*a, **kw, cache_dir=tmp_path)
    )
    assert len(K.load_questions("lvomnibench")) == 3


def test_nothing_there_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="hf download --repo-type dataset NJU-LINK/OmniVideoBench"):
        K.load_questions("omnivideobench", tmp_path)


def test_own_jsonl(tmp_path):
    put_video(tmp_path / "a.mp4")
    write_samples(
        [Sample("q", str(tmp_path / "a.mp4"), ASKED, CHOICES, 1)], tmp_path / "mine.jsonl"
    )
    assert K.load_questions(tmp_path / "mine.jsonl")[0].answer == 1


def test_published_limits():
    assert {
        n: (p.fps, p.max_frames, p.grid_tokens) for n in K.BENCHMARKS for p in [K.preset_for(n)]
    } == {
        "daily-omni": (2.0, 128, (128, 144)),
        "worldsense": (2.0, 128, (128, 144)),
        "omnivideobench": (2.0, 256, (128, 144)),
        "video-mme": (2.0, 768, (128, 144)),
        "lvomnibench": (2.0, 768, (128, 144)),
    }


# the documented command, `seats probe --model MODEL --data worldsense --limit N`


def test_command_on_the_testbed(tmp_path):
    worldsense(tmp_path)
    out = tmp_path / "p.nc"
    result = seats(
        "probe",
        "--model",
        "testbed",
        "--data",
        "worldsense",
        "--root",
        tmp_path,
        "--limit",
        "1",
        "--layers",
        "8",
        "--removed",
        "both",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.stderr
    from seats_analysis.storage.schemas import load_profile

    stored = load_profile(out)
    assert stored.sizes["sample"] == 1 and stored.attrs["max_frames"] == 128
    visual = json.loads(stored.attrs["tokens"])["visual"]
    assert visual % 8 == 0 and 128 <= visual / 8 <= 144  # an 8 s clip has 8 grids of two frames


def test_command_says_what_is_missing(tmp_path):
    result = seats("probe", "--data", "worldsense", "--root", tmp_path, "--out", tmp_path / "p.nc")
    assert (
        result.exit_code == 2
        and "worldsense_qa.json" in result.stderr
        and result.stderr.count("\n") == 1
        and not (tmp_path / "p.nc").exists()
    )


@pytest.fixture(scope="module")
def seven_billion():
    """The 7B's thinker with its real sizes and no memory, and a processor with its limits but our
    words."""
    import torch
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )
    from seats_analysis.testbed.load import CHAT_TEMPLATE, build_config, build_tokenizer

    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=25,
    )
    config, words = Qwen2_5OmniThinkerConfig(vision_config=vision), build_config()
    for name in vars(words):
        if name.endswith(("_token_id", "_token_index")):
            setattr(config, name, getattr(words, name))
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    hearing = WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(do_sample_frames=False),
        feature_extractor=hearing,
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def test_same_path_at_the_size_of_the_7b(tmp_path, seven_billion):
    """Loader, limits, prompt, positions and all 28 decoder layers, for the full stream and for
    what is left of it, by shape."""
    import torch
    from seats_analysis.models.families import adapter_for
    from seats_analysis.models.encode import encode
    from seats_analysis.models.decoder import Decoder
    from seats_analysis.cli.app import limits_of
    from seats_analysis.evaluation.load import load_samples

    model, processor = seven_billion
    worldsense(tmp_path)
    samples = load_samples("worldsense", None, 1, tmp_path)
    encoded = encode(model, processor, samples, **limits_of("worldsense", processor))
    counts = {k: int(v[0]) for k, v in encoded.layout.counts().items()}
    assert (
        counts["audio"] == 8 * 25
        and counts["visual"] % 8 == 0
        and 128 <= counts["visual"] / 8 <= 144
    )
    adapter, decoder, width = adapter_for(model), Decoder(model), 3584
    assert (
        adapter.num_layers(model) == 28
        and 7e9 < sum(p.numel() for p in adapter.decoder(model).parameters()) < 8e9
    )
    for length in (
        sum(counts.values()),
        counts["text"] + counts["audio"],
        counts["text"],
    ):  # full, visual removed, both removed
        hidden = torch.empty(1, length, width, device="meta")
        rotary = decoder.rotary_tables(
            hidden, torch.zeros(3, 1, length, dtype=torch.long, device="meta")
        )
        hidden = decoder.run_layers(hidden, rotary, None, 0, 28)
        assert hidden.shape == (1, length, width) and decoder.logits(hidden[:, -1:]).shape[:2] == (
            1,
            1,
        )


def test_longest_clip_of_the_preset_fits_its_count(seven_billion):
    "128 frames of a wide film are at most 9,216 tokens."
    import torch
    from seats_analysis.models.families import limit_pixels

    _, processor = seven_billion
    preset = K.preset_for("worldsense")
    limit_pixels(processor, *preset.grid_tokens)
    video = processor.video_processor
    for height, width in ((90, 160), (240, 320), (1080, 1920)):
        out = video(
            videos=[torch.zeros(2, 3, height, width, dtype=torch.uint8)],
            return_tensors="pt",
            size=dict(video.size),
            do_sample_frames=False,
        )
        grid = out["video_grid_thw"][0]
        tokens = int(grid.prod()) // 4
        assert tokens * preset.max_frames // 2 <= preset.max_tokens and tokens >= 100


# ---------------------------------------------------------------- revisions of a hub id

COMMITS = dict(old="a" * 40, main="b" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A cache with two commits of a model, which differ in depth and in how its processor cuts."
    import tiny
    from huggingface_hub import constants

    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for layers, (name, commit) in enumerate(COMMITS.items(), 2):
        (repo / "refs" / name).write_text(commit)
        processor = tiny.processor("qwen3-omni")
        processor.chat_template += f"{{# {name} #}}"
        for part in tiny.thinker("qwen3-omni", layers), processor:
            part.save_pretrained(repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("asked", [None, "main", "old", COMMITS["old"]])
def test_a_revision_of_a_hub_id(hub, asked):
    "Configuration, weights and processor are of one commit, and stored results say of which."
    from seats_analysis.evaluation.load import check_model_name, load_model
    from seats_analysis.models.families import adapter_for
    from seats_analysis.models.provenance import provenance

    layers, name = (2, "old") if asked in ("old", COMMITS["old"]) else (3, "main")
    model, processor = load_model("some/model", "cpu", revision=asked)
    assert check_model_name("some/model", asked) == adapter_for(model).num_layers(model) == layers
    assert processor.chat_template.endswith(f"{{# {name} #}}")
    about = provenance(model, processor, [])
    assert (about["model"], about["revision"]) == ("some/model", COMMITS[name])


@pytest.mark.parametrize(
    "model, says",
    [
        ("testbed", "revision new: testbed is here as it is"),
        (str(CLIPS), "is here as it is"),
        ("some/model", "'some/model' at new is not in the local cache"),
    ],
)
def test_a_revision_that_cannot_be_had(hub, model, says):
    done = seats("probe", "--model", f"{model}@new")
    assert done.exit_code == 2 and says in done.stderr and done.stderr.count("\n") == 1
