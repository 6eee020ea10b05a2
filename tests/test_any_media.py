"""Any batch, any media: what is in a prompt, how many clips, of which size and length, and beside
which other prompts it lies."""

from dataclasses import replace

import naive
import pytest
import tiny
import torch

from seats_analysis import Schedule, adapter_for, encode, prune
from seats_analysis.inputs.layout import Modality
from seats_analysis.models.encode import Prompt, layout_of, rope_index

VISUAL, AUDIO, _, IMAGE, _ = Modality
L = tiny.LAYERS
PLAN = tiny.schedule(
    drop_layers=(1, 3),
    entering=tiny.ratios(0.5, 0.6),
    keep_ratios=tiny.ratios((0.7, 0.6), (0.8, 0.6)),
)
STAGE1 = Schedule(L, entering=tiny.ratios(0.4, 0.5))
STAGE3 = Schedule(L, late_start=2)
CLIP, IMG = tiny.clip, tiny.image


def heard(seed, seconds):
    return CLIP(seed, seconds, sight=False)


def silent(seed, seconds, **shape):
    return CLIP(seed, seconds, sound=False, **shape)


CLIPS = dict(
    both=CLIP(0, 3),
    silent=silent(1, 2),
    heard=heard(2, 2.5),
    text=None,
    odd=CLIP(3, 2.37),
    short=CLIP(4, 0.5),
    blip=heard(5, 0.03),
    more_sight=tiny.Clip("x", CLIP(6, 3).frames, 2.0, CLIP(6, 1).waveform, 16000),
    more_sound=tiny.Clip("y", CLIP(7, 1).frames, 2.0, CLIP(7, 3).waveform, 16000),
)
SEEN = CLIP(8, 2), silent(9, 2, size=(84, 56)), CLIP(11, 2, size=(56, 56), fps=4.0)
PARTS = dict(
    images=(IMG(0), "what is it ?", IMG(1, (56, 112)), "and this ?"),
    clips=(*SEEN[:2], "where ?", heard(10, 1), SEEN[2], "when ?"),
    sounds=("first", heard(12, 1.3), "then", heard(13, 0.77)),
    everything=(
        *(IMG(2), CLIP(14, 2), "or", heard(15, 1.11)),
        *(IMG(3, (28, 56)), silent(16, 1), "what ?"),
    ),
    media_last=("what is this ?", CLIP(17, 2)),
)
SAMPLES = {name: tiny.ask(name, c, lettered=name == "heard") for name, c in CLIPS.items()}
SAMPLES |= {name: Prompt(name, parts) for name, parts in PARTS.items()}
close = tiny.close
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def singles(model, processor):
    return {name: encode(model, processor, [s]) for name, s in SAMPLES.items()}


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, list(SAMPLES.values()))


# ---------------------------------------------------------------- what goes in


def test_counts(singles, family):
    second, short = {"qwen2.5-omni": (5, 2), "qwen3-omni": (13, 13)}[family]
    wanted = dict(
        both=dict(visual=18, audio=3 * second),
        silent=dict(visual=12),
        text={},
        blip={},
        images=dict(image=4 + 8),
        short=dict(visual=6, audio=short),  # qwen3-omni fills it up to a second
        clips=dict(visual=12 + 12 + 16, audio=5 * second),
    )
    counts = {name: one.layout.counts() for name, one in singles.items()}
    for name, there in wanted.items():
        found = {m: n.item() for m, n in counts[name].items() if m != "text" and n}
        assert found == there, name
    assert counts["everything"]["image"] == 4 + 2


def test_each_clip_has_windows_of_its_own(singles):
    """Three videos of different size: 2 grids of 6 tokens, 2 of 6 (upright), 4 of 4 at twice the
    rate, thus in two windows."""
    layout = singles["clips"].layout
    assert layout.window[layout.visual].bincount().tolist() == [12, 12, 8, 8]
    first = singles["short"].layout
    assert first.window.max() == 0 and first.visual.sum() and first.audio.sum()


def test_media_are_positioned_one_after_another(model, processor, singles):
    """Wherever the stock function can position a prompt, piece by piece gives the same; where it
    cannot, each clip gets what it gets alone."""
    still = silent(0, 2), "and", silent(1, 3, size=(56, 56)), IMG(0), "what ?"
    sounding = CLIP(0, 2), "and", CLIP(1, 3), "what ?"
    for parts in (still, sounding):
        one = encode(model, processor, [Prompt("a", parts)])
        bare = {k: v for k, v in one.inputs.items() if k != "position_ids"}
        positions = rope_index(model, bare)
        assert torch.equal(positions, one.position_ids)
    whole = singles["clips"]
    ids = whole.inputs["input_ids"][0]
    begin = adapter_for(model).config(model).vision_start_token_id
    for at, clip in zip((ids == begin).nonzero()[:, 0].tolist(), SEEN, strict=True):
        alone = encode(model, processor, [tiny.ask("alone", clip)])
        own = alone.inputs["input_ids"][0]
        first = own.tolist().index(begin)
        n = int((alone.layout.visual | alone.layout.audio).sum()) + 2
        assert torch.equal(own[first : first + n], ids[at : at + n])
        here, there = (
            e.position_ids[:, 0, a : a + n] - e.position_ids[:, 0, a : a + 1]
            for e, a in ((alone, first), (whole, at))
        )
        close(here, there)


def equals_a_plain_loop(model, one, images="keep"):
    layout = one.layout if images == "keep" else layout_of(model, one.inputs, images)
    kept, sets, logits = naive.prefill(model, one, PLAN, layout)
    with prune(model, PLAN, images=images) as run:
        close(model(**one.inputs).logits[:, -1], logits)
    assert run.tokens_per_layer[0].tolist() == [len(s) for s in sets]
    for stage, positions in run.kept.items():
        assert positions[0].tolist() == kept[stage], stage


def test_sound_behind_the_video(model, processor, singles):
    """Not interleaved: one run each, the same tokens, and positions as the stock function gives
    them."""
    apart = encode(model, processor, [SAMPLES["both"]], interleave=False)
    woven = singles["both"].layout
    assert apart.layout.counts()["audio"] == woven.counts()["audio"]
    assert apart.layout.chunk.max() == 0 < woven.chunk.max()
    seen = apart.layout.modality[0]
    assert (seen == VISUAL).nonzero().max() < (seen == AUDIO).nonzero().min()
    ids = apart.inputs["input_ids"]
    stock = (
        adapter_for(model)
        .thinker(model)
        .get_rope_index(
            ids,
            video_grid_thw=apart.inputs["video_grid_thw"],
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=False,
            audio_seqlens=apart.inputs["feature_attention_mask"].sum(-1),
            second_per_grids=apart.inputs["video_second_per_grid"],
        )
    )
    assert torch.equal(stock[0], apart.position_ids)
    equals_a_plain_loop(model, apart)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "plan, images, names",
    [
        (None, "keep", [*SAMPLES]),
        (PLAN, "keep", [*SAMPLES]),
        (PLAN, "prune", [*SAMPLES]),
        (PLAN, "prune", ["everything", "text", "clips"]),  # other neighbours, other padding
        # a row's own text asks, also behind a clip that has left
        (replace(tiny.PLANS["drop_after_one_left"], query="text"), "keep", [*SAMPLES]),
        (STAGE1, "prune", [*SAMPLES]),
        (STAGE3, "keep", [*SAMPLES]),
    ],
)
def test_pruned_batch_equals_singles(model, processor, singles, plan, images, names):
    batch = encode(model, processor, [SAMPLES[n] for n in names])
    with prune(model, plan, images=images) as run:
        together, kept = model(**batch.inputs).logits[:, -1], run.kept
        for row, one in enumerate(singles[n] for n in names):
            n = one.shape[1]
            assert torch.equal(batch.position_ids[:, row, -n:], one.position_ids[:, 0])
            assert torch.equal(batch.layout.window[row, -n:], one.layout.window[0])
            close(together[row : row + 1], model(**one.inputs).logits[:, -1])
            # a cut that changes nothing for this sample is left out
            for stage in kept.keys() & run.kept.keys():
                assert run.kept[stage][0].tolist() == kept[stage][row].tolist(), (stage, row)
            assert run.kept or plan is not PLAN or not one.layout.visual.any()


# ---------------------------------------------------------------- against a plain loop


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in ("text", "blip")])
def test_equals_a_plain_loop(model, singles, name):
    for images in ("keep", "prune") if singles[name].layout.image.any() else ("keep",):
        equals_a_plain_loop(model, singles[name], images)


@pytest.mark.parametrize("name", ("images", "everything"))
def test_images_stay_unless_asked(model, singles, name):
    one = singles[name]
    pictures = set(one.layout.image[0].nonzero()[:, 0].tolist())

    def kept(images):
        with prune(model, PLAN, images=images) as run:
            model(**one.inputs)
        return {stage: pictures & set(rows[0].tolist()) for stage, rows in run.kept.items()}

    assert all(there == pictures for there in kept("keep").values())
    left = kept("prune")
    assert not left["late5"] and 0 < len(left["stage1"]) < len(pictures)


@pytest.mark.parametrize("name", ("both", "heard", "images"))
def test_media_token_first(model, singles, name):
    "A prompt whose very first position is a visual or an audio token."
    one = singles[name]
    media = torch.isin(one.layout.modality[0], torch.tensor([VISUAL, AUDIO, IMAGE]))
    first = int(media.nonzero()[0])
    in_sequence = "input_ids", "attention_mask", "position_ids"
    cut = {k: v[..., first:] if k in in_sequence else v for k, v in one.inputs.items()}
    assert cut["input_ids"][0, 0].item() in adapter_for(model).token_ids(model).values()
    equals_a_plain_loop(model, replace(one, inputs=cut, layout=layout_of(model, cut)))
