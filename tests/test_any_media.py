"""Any batch, any media: what is in a prompt, how many clips, of which size and length, and beside
which other prompts it lies."""

import naive, numpy as np, pytest, tiny, torch
from torch.utils._python_dispatch import TorchDispatchMode

from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import Prompt, encode, layout_of, rope_index
from seats_analysis.inputs.layout import Modality
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule

VISUAL, AUDIO, TEXT, IMAGE, PAD = Modality

L = tiny.LAYERS
PLAN = Schedule(
    num_layers=L,
    drop_layers=(1, 3),
    late_start=5,
    entering=dict(visual=0.5, audio=0.6),
    keep_ratios=dict(visual=(0.7, 0.6), audio=(0.8, 0.6)),
)
PLANS = dict(
    together=PLAN,
    stage1=Schedule(num_layers=L, entering=dict(visual=0.4, audio=0.5)),
    stage3=Schedule(num_layers=L, late_start=2),
)
CLIP, IMG = tiny.clip, tiny.image
SAMPLES = dict(
    both=tiny.ask("both", CLIP(0, 3)),
    silent=tiny.ask("silent", CLIP(1, 2, sound=False)),
    heard=tiny.ask("heard", CLIP(2, 2.5, sight=False), lettered=True),
    text=tiny.ask("text", None),
    odd=tiny.ask("odd", CLIP(3, 2.37)),
    short=tiny.ask("short", CLIP(4, 0.5)),
    blip=tiny.ask("blip", CLIP(5, 0.03, sight=False)),
    more_sight=tiny.ask(
        "more_sight", tiny.Clip("x", CLIP(6, 3).frames, 2.0, CLIP(6, 1).waveform, 16000)
    ),
    more_sound=tiny.ask(
        "more_sound", tiny.Clip("y", CLIP(7, 1).frames, 2.0, CLIP(7, 3).waveform, 16000)
    ),
    images=Prompt("images", (IMG(0), "what is it ?", IMG(1, (56, 112)), "and this ?")),
    clips=Prompt(
        "clips",
        (
            CLIP(8, 2),
            CLIP(9, 2, sound=False, size=(84, 56)),
            "where ?",
            CLIP(10, 1, sight=False),
            CLIP(11, 2, size=(56, 56), fps=4.0),
            "when ?",
        ),
    ),
    sounds=Prompt(
        "sounds", ("first", CLIP(12, 1.3, sight=False), "then", CLIP(13, 0.77, sight=False))
    ),
    everything=Prompt(
        "everything",
        (
            IMG(2),
            CLIP(14, 2),
            "or",
            CLIP(15, 1.11, sight=False),
            IMG(3, (28, 56)),
            CLIP(16, 1, sound=False),
            "what ?",
        ),
    ),
    media_last=Prompt("media_last", ("what is this ?", CLIP(17, 2))),
)


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def singles(model, processor):
    return {name: encode(model, processor, [s]) for name, s in SAMPLES.items()}


@pytest.fixture(scope="module")
def batch(model, processor):
    return encode(model, processor, list(SAMPLES.values()))


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


# ---------------------------------------------------------------- what goes in


def test_counts(singles, family):
    count = lambda name: {
        k: v.item() for k, v in singles[name].layout.counts().items() if k != "text" and v
    }
    per_second = {"qwen2.5-omni": 5, "qwen3-omni": 13}[family]
    assert (
        count("both") == dict(visual=18, audio=3 * per_second)
        and count("silent") == dict(visual=12)
        and count("text") == {} == count("blip")
    )
    assert count("images") == dict(image=4 + 8) and count("short") == dict(
        visual=6, audio={5: 2, 13: 13}[per_second]
    )  # filled up to a second
    assert count("clips") == dict(visual=12 + 12 + 16, audio=5 * per_second)
    assert count("everything")["image"] == 4 + 2


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
    stock = lambda inputs: rope_index(
        model, {k: v for k, v in inputs.items() if k != "position_ids"}
    )
    plain = dict(
        silent=Prompt(
            "a",
            (
                CLIP(0, 2, sound=False),
                "and",
                CLIP(1, 3, sound=False, size=(56, 56)),
                IMG(0),
                "what ?",
            ),
        ),
        sounding=Prompt("b", (CLIP(0, 2), "and", CLIP(1, 3), "what ?")),
    )
    for one in (encode(model, processor, [p]) for p in plain.values()):
        positions, delta = stock(one.inputs)
        assert torch.equal(positions, one.position_ids) and torch.equal(delta, one.rope_deltas)
    ids = singles["clips"].inputs["input_ids"][0]
    start = [
        i
        for i, t in enumerate(ids.tolist())
        if t == adapter_for(model).config(model).vision_start_token_id
    ]
    for at, clip in zip(
        start,
        (CLIP(8, 2), CLIP(9, 2, sound=False, size=(84, 56)), CLIP(11, 2, size=(56, 56), fps=4.0)),
    ):
        alone = encode(model, processor, [tiny.ask("alone", clip)])
        first = alone.inputs["input_ids"][0].tolist().index(ids[at].item())
        n = int((alone.layout.visual | alone.layout.audio).sum()) + 2
        piece = lambda e, a: e.position_ids[:, 0, a : a + n] - e.position_ids[:, 0, a : a + 1]
        assert torch.equal(alone.inputs["input_ids"][0, first : first + n], ids[at : at + n])
        close(piece(alone, first), piece(singles["clips"], at))


def test_sound_behind_the_video(model, processor, singles):
    """Not interleaved: one run each, the same tokens, and positions as the stock function gives
    them."""
    sample = SAMPLES["both"]
    apart = encode(model, processor, [sample], interleave=False)
    assert (
        apart.layout.counts()["audio"] == singles["both"].layout.counts()["audio"]
        and apart.layout.chunk.max() == 0
    )
    assert singles["both"].layout.chunk.max() > 0
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
        )[0]
    )
    assert torch.equal(stock, apart.position_ids)
    kept, sets, logits = naive.prefill(model, apart, PLAN)
    with prune(model, PLAN) as run:
        close(model(**apart.inputs).logits[:, -1], logits)
    assert all(run.kept[s][0].tolist() == kept[s] for s in run.kept)


# ---------------------------------------------------------------- batches


def test_full_batch_equals_singles(model, batch, singles):
    together = model(**batch.inputs).logits[:, -1]
    close(together, torch.cat([model(**one.inputs).logits[:, -1] for one in singles.values()]))
    for row, one in enumerate(singles.values()):
        n = one.shape[1]
        assert torch.equal(batch.position_ids[:, row, -n:], one.position_ids[:, 0]) and torch.equal(
            batch.layout.window[row, -n:], one.layout.window[0]
        )


@pytest.mark.parametrize(
    "name, images",
    [("together", "keep"), ("together", "prune"), ("stage1", "prune"), ("stage3", "keep")],
)
def test_pruned_batch_equals_singles(model, batch, singles, name, images):
    with prune(model, PLANS[name], images=images) as run:
        together, kept = model(**batch.inputs).logits[:, -1], run.kept
        for row, one in enumerate(singles.values()):
            close(together[row : row + 1], model(**one.inputs).logits[:, -1])
            for stage, positions in kept.items():
                alone = run.kept.get(
                    stage
                )  # a cut that changes nothing for this sample is left out
                if alone is not None:
                    assert alone[0].tolist() == positions[row].tolist(), (stage, row)
            if name == "together" and one.layout.visual.any():
                assert run.kept


def test_batch_of_two_orders_and_sizes(model, processor, batch, singles):
    "Other neighbours, other padding, the same answer."
    names = ["everything", "text", "clips"]
    few = encode(model, processor, [SAMPLES[n] for n in names])
    assert few.shape[1] <= batch.shape[1]
    with prune(model, PLAN, images="prune"):
        together = model(**few.inputs).logits[:, -1]
        for row, n in enumerate(names):
            close(together[row : row + 1], model(**singles[n].inputs).logits[:, -1])


def test_generate_equals_singles(model, processor, singles):
    names, options = (
        ["everything", "images", "clips", "short"],
        dict(max_new_tokens=3, min_new_tokens=3, do_sample=False),
    )
    few = encode(model, processor, [SAMPLES[n] for n in names])
    with prune(model, PLAN, images="prune"):
        together = model.generate(**few.inputs, **options)[:, -3:].tolist()
        assert together == [
            model.generate(**singles[n].inputs, **options)[0, -3:].tolist() for n in names
        ]


# ---------------------------------------------------------------- against a plain loop


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in ("text", "blip")])
def test_equals_a_plain_loop(model, singles, name):
    one = singles[name]
    for images in ("keep", "prune") if one.layout.image.any() else ("keep",):
        kept, sets, logits = naive.prefill(
            model, one, PLAN, layout_of(model, one.inputs, images) if images == "prune" else None
        )
        with prune(model, PLAN, images=images) as run:
            close(model(**one.inputs).logits[:, -1], logits)
        assert run.tokens_per_layer[0].tolist() == [len(s) for s in sets]
        for stage, positions in run.kept.items():
            assert positions[0].tolist() == kept[stage], stage


def test_images_stay_unless_asked(model, singles):
    for name in ("images", "everything"):
        one = singles[name]
        pictures = one.layout.image[0].nonzero()[:, 0].tolist()
        with prune(model, PLAN) as run:
            model(**one.inputs)
        assert all(set(pictures) <= set(positions[0].tolist()) for positions in run.kept.values())
        with prune(model, PLAN, images="prune") as run:
            model(**one.inputs)
        assert not set(pictures) & set(run.kept["late5"][0].tolist()) and 0 < len(
            set(pictures) & set(run.kept["stage1"][0].tolist())
        ) < len(pictures)
    with pytest.raises(ValueError, match="'keep', 'prune'"):
        with prune(model, PLAN, images="drop"):
            pass


def test_media_token_first(model, singles):
    "A prompt whose very first position is a visual or an audio token."
    for name in ("both", "heard", "images"):
        one = singles[name]
        first = int(
            (
                (one.layout.modality[0] == VISUAL)
                | (one.layout.modality[0] == AUDIO)
                | (one.layout.modality[0] == IMAGE)
            ).nonzero()[0]
        )
        cut = {
            k: v[..., first:] if k in ("input_ids", "attention_mask", "position_ids") else v
            for k, v in one.inputs.items()
        }
        assert cut["input_ids"][0, 0].item() in adapter_for(model).token_ids(model).values()
        import dataclasses

        short = dataclasses.replace(one, inputs=cut, layout=layout_of(model, cut))
        kept, sets, logits = naive.prefill(model, short, PLAN)
        with prune(model, PLAN) as run:
            close(model(**cut).logits[:, -1], logits)
        assert all(run.kept[s][0].tolist() == kept[s] for s in run.kept) and run.tokens_per_layer[
            0
        ].tolist() == [len(s) for s in sets]


# ---------------------------------------------------------------- text only


class Count(TorchDispatchMode):
    "Number of operations."

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_text_only_is_a_no_op(model, processor, singles):
    """The same bits, the same operations from the first layer to the last, one and the same for a
    batch of texts."""
    batch, layers = (
        encode(model, processor, [SAMPLES["text"], SAMPLES["blip"]]),
        adapter_for(model).layers(model),
    )

    def operations(inputs):
        count, counted = Count(), {}
        hooks = [
            layers[0].register_forward_pre_hook(lambda *_: counted.update(start=count.n)),
            layers[-1].register_forward_hook(lambda *_: counted.update(end=count.n)),
        ]
        try:
            with count:
                logits = model(**inputs).logits
        finally:
            for h in hooks:
                h.remove()
        return logits, counted["end"] - counted["start"]

    for inputs in (singles["text"].inputs, batch.inputs):
        full, n = operations(inputs)
        for images in ("keep", "prune"):
            with prune(model, PLAN, images=images) as run:
                pruned, m = operations(inputs)
            assert torch.equal(pruned, full) and m == n and run.kept == {}
            assert run.tokens_per_layer.tolist() == [
                [int(k)] * L for k in inputs["attention_mask"].sum(1)
            ]
    full = model.generate(**singles["text"].inputs, max_new_tokens=3, do_sample=False)
    with prune(model, PLAN):
        assert torch.equal(
            model.generate(**singles["text"].inputs, max_new_tokens=3, do_sample=False), full
        )


# ---------------------------------------------------------------- refused


def test_refused(model, processor):
    with pytest.raises(TypeError, match="float is no text, Clip or"):
        Prompt("bad", (1.5,))
    with pytest.raises(TypeError, match="ndarray is no text, Clip or"):
        Prompt("bad", (np.zeros((4, 4, 3), "float32"),))
    with pytest.raises(ValueError, match="1 media, but the prompt mentions 2"):
        encode(
            model,
            processor,
            [Prompt("sly", (IMG(0), "see <|vision_bos|><|IMAGE|><|vision_eos|> too"))],
        )
