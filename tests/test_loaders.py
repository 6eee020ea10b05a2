"""Benchmarks in the layouts of their repositories, made here with tiny files; their limits; and
the documented command on real code paths."""

import json
import shutil
from functools import partial
from pathlib import Path

from conftest import ROOT
import pytest
from clips import refused
from test_cli import done, refused as one_line

from seats_analysis.inputs import questions as K


CLIPS = ROOT / "data" / "testbed" / "clips"
ASKED = "what pitch is heard first ?"
CHOICES = ["low", "high", "middle", "shrill"]
LETTERED = [f"{a}. {c}" for a, c in zip("ABCD", CHOICES)]
FIELDS = dict(question=ASKED, options=LETTERED, correct_option="B", question_type="counting")
TASK = dict(question=ASKED, candidates=LETTERED, answer="B", task_type="Audio Change")


def put(folder, annotations, data, *videos):
    "A benchmark's annotations, and a real clip under each name of a video."
    paths = [folder / name for name in (annotations, *videos)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    if annotations.endswith(".json"):
        paths[0].write_text(json.dumps(data))
    else:
        import datasets

        datasets.Dataset.from_list(data).to_parquet(paths[0])
    for path in paths[1:]:
        shutil.copy(sorted(CLIPS.glob("*.mp4"))[0], path)


# one function per layout: makes a folder with two videos, one question on the first and two on
# the second


def daily_omni(folder):
    asked = dict(Question=ASKED, Choice=LETTERED, Answer="B", Type="Inference")
    media = [f"Videos/{v}/{v}_{kind}" for v in ("v1", "v2") for kind in ("video.mp4", "audio.wav")]
    put(folder, "qa.json", [dict(asked, video_id=v) for v in ("v1", "v2", "v2")], *media)


def worldsense(folder):
    about = dict(video_duration="60s", domain="Music", audio_class=["Music"])
    data = dict(v1=dict(about, task0=TASK), v2=dict(about, task0=TASK, task1=TASK))
    put(folder, "worldsense_qa.json", data, "videos/v1.mp4", "videos/v2.mp4")


def worldsense_flat(folder):
    rows = [
        dict(TASK, index=i, video=v, video_path=f"./videos/{v}.mp4")
        for i, v in enumerate(("v1", "v2", "v2"))
    ]
    put(folder, "data/test-00000-of-00001.parquet", rows, "videos/v1.mp4", "videos/v2.mp4")


def omnivideobench(folder):
    asked = dict(FIELDS, answer="high", options=[f"{a}.{c}" for a, c in zip("ABCD", CHOICES)])
    data = [dict(video=f"video_{n}", questions=[asked] * n) for n in (1, 2)]
    put(folder, "data.json", data, "videos/video_1.mp4", "videos/video_2.mp4")


def omnivideobench_flat(folder):
    rows = [dict(FIELDS, video=f"videos/video_{n}.mp4") for n in (1, 2, 2)]
    put(folder, "data.parquet", rows, "videos/video_1.mp4", "videos/video_2.mp4")


def video_mme(folder):
    asked = dict(question=ASKED, options=LETTERED, answer="B", task_type="Counting Problem")
    rows = [
        dict(asked, video_id=n, videoID=v, question_id=f"{n}-{i}")
        for v, n, i in (("abc", "001", 1), ("xyz", "002", 1), ("xyz", "002", 2))
    ]
    put(folder, "videomme/test-00000-of-00001.parquet", rows, "data/abc.mp4", "data/xyz.MP4")


def lvomnibench(folder):
    rows = [dict(FIELDS, video_id=f"video_{n}") for n in (0, 1, 1)]
    put(folder, "data.json", rows, "videos/video_0.mp4", "videos/video_1.mp4")


LAYOUTS = {
    daily_omni: "daily-omni",
    worldsense: "worldsense",
    worldsense_flat: "worldsense",
    omnivideobench: "omnivideobench",
    omnivideobench_flat: "omnivideobench",
    video_mme: "video-mme",
    lvomnibench: "lvomnibench",
}
each_layout = pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)


def test_every_benchmark_is_tried():
    assert set(LAYOUTS.values()) == set(K.BENCHMARKS)


@each_layout
def test_layout(tmp_path, make):
    make(tmp_path)
    samples = K.load_benchmark(LAYOUTS[make], tmp_path)
    assert [len(samples), len({s.id for s in samples}), len({s.clip for s in samples})] == [3, 3, 2]
    for s in samples:
        asked = (s.question, s.choices, s.answer, s.lettered)
        assert asked == (ASKED, tuple(CHOICES), 1, True)
        assert s.family and Path(s.video).is_file()
        # the same for every packaging of a benchmark
        assert s.split == K.split_of(s.clip.removesuffix("_video"))
    first = K.load_benchmark(LAYOUTS[make], tmp_path, limit=2)
    assert [s.id for s in first] == [s.id for s in samples[:2]]


@each_layout
def test_missing_videos(tmp_path, make):
    make(tmp_path)
    name = LAYOUTS[make]
    videos = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".mp4")
    videos[0].unlink()
    refused(lambda: K.load_benchmark(name, tmp_path), "no such file in ", "--allow broken")
    assert len(K.load_benchmark(name, tmp_path, broken=[])) == 2
    videos[1].unlink()
    refused(lambda: K.load_benchmark(name, tmp_path, broken=[]), "unpack")


def test_separate_sound_is_taken(tmp_path):
    daily_omni(tmp_path)
    assert K.load_benchmark("daily-omni", tmp_path)[0].audio.endswith("v1_audio.wav")
    (tmp_path / "Videos" / "v1" / "v1_audio.wav").unlink()
    assert K.load_benchmark("daily-omni", tmp_path)[0].audio is None


@pytest.mark.parametrize(
    "data, says",
    [
        ('{"x": ', "not readable JSON"),
        ('["x"]', "not laid out as"),
        ('[{"video_id": "v"}]', "no field 'question'"),
        (json.dumps([dict(FIELDS, video_id="v", correct_option="F")]), "answer"),
    ],
)
def test_broken_annotations_name_the_file(tmp_path, data, says):
    put(tmp_path, "data.json", [], "videos/v.mp4")
    (tmp_path / "data.json").write_text(data)
    refused(lambda: K.load_benchmark("lvomnibench", tmp_path), "data.json", says)


def test_broken_parquet_names_the_file(tmp_path):
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 not really")
    refused(lambda: K.load_benchmark("video-mme", tmp_path), "test-0.parquet")


def test_folder_from_the_environment(tmp_path, monkeypatch):
    worldsense(tmp_path / "WorldSense")
    monkeypatch.setenv("SEATS_DATA", str(tmp_path))
    assert len(K.load_questions("worldsense")) == 3


def test_hub_cache_is_looked_in(tmp_path, monkeypatch):
    "A snapshot as `hf download` leaves it."
    import huggingface_hub

    repo = tmp_path / "datasets--KD-TAO--LVOmniBench"
    lvomnibench(repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    real = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.delenv("SEATS_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real)
    assert len(K.load_questions("lvomnibench")) == 3


# the documented command, `seats probe --model MODEL --data worldsense --limit N`


def test_command_on_the_testbed(tmp_path, monkeypatch):
    worldsense(tmp_path / "worldsense")
    monkeypatch.setenv("SEATS_DATA", str(tmp_path))
    out = tmp_path / "p.nc"
    data = "--data worldsense --limit 1"
    done(f"probe --model testbed {data} --layers 8 --removed both --out {out}")
    from seats_analysis.storage.schemas import load_profile

    stored = load_profile(out)
    assert stored.sizes["sample"] == 1 and stored.attrs["max_frames"] == 128
    visual = json.loads(stored.attrs["tokens"])["visual"]
    assert visual % 8 == 0 and 128 <= visual / 8 <= 144  # an 8 s clip has 8 grids of two frames


def test_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SEATS_DATA", str(tmp_path))
    said = one_line(f"probe --data worldsense --out {tmp_path}/p.nc")
    assert "worldsense_qa.json" in said and not (tmp_path / "p.nc").exists()


def test_longest_clip_of_the_preset_fits_its_count():
    "128 frames of a wide film are at most 9,216 tokens for the processor of the 7B."
    import torch
    from transformers import Qwen2VLVideoProcessor
    from seats_analysis.models.families import published_limits
    from seats_analysis.testbed.load import build_processor

    processor = build_processor()
    processor.video_processor = Qwen2VLVideoProcessor(do_sample_frames=False)
    most = published_limits("worldsense", processor)["max_frames"]
    video = processor.video_processor
    for height, width in ((90, 160), (240, 320), (1080, 1920)):
        frames = torch.zeros(2, 3, height, width, dtype=torch.uint8)
        options = dict(size=dict(video.size), do_sample_frames=False, return_tensors="pt")
        tokens = int(video(videos=[frames], **options)["video_grid_thw"][0].prod()) // 4
        assert 100 <= tokens <= 144
    assert most // 2 * 144 == 9216


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
    config = check_model_name("some/model", asked)
    assert config["num_hidden_layers"] == adapter_for(model).num_layers(model) == layers
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
    assert says in one_line(f"probe --model {model}@new")
