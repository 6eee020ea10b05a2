"""The adapter on a random testbed-like model: also run with the oldest supported transformers on
PYTHONPATH."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode, layout_of
from seats_analysis.models.attention import TowerAttention
from seats_analysis.models.decoder import Decoder, last_logits_only
from seats_analysis.models.scoring import score_choices
from seats_analysis.inputs.layout import Modality
from seats_analysis.inputs.media import Clip
from seats_analysis.inputs.samples import Sample
from seats_analysis.testbed.load import build_config, build_processor

VISUAL, AUDIO, TEXT, IMAGE, PAD = Modality

LAYERS = 3


def make_clip(seconds, seed, sound=True, sight=True, fps=2.0):
    rng = np.random.default_rng(seed)
    frames = (
        rng.integers(0, 255, (int(fps * seconds), 112, 112, 3), dtype="uint8") if sight else None
    )
    wave = rng.standard_normal(int(16000 * seconds), "float32") * 0.1 if sound else None
    return Clip(f"clip{seed}", frames, fps, wave, 16000)


def question(clip, seed=0, lettered=False, choices=("red", "green", "blue", "upper-left")):
    text = ("what colour is the circle ?", "what shape is the red object ?", "where is it ?")[
        seed % 3
    ]
    return Sample(f"s{seed}{lettered}", clip, text, choices, 1, lettered=lettered)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(
        build_config(layers=LAYERS, tower=32)
    ).eval()
    for p in thinker.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return thinker


@pytest.fixture(scope="module")
def processor():
    """5.17 expands interleaved media only where the template writes start, placeholder and end
    without spaces."""
    processor = build_processor()
    for name in ("VIDEO", "AUDIO", "IMAGE"):
        processor.chat_template = processor.chat_template.replace(f" <|{name}|> ", f"<|{name}|>")
    return processor


@pytest.fixture(scope="module")
def samples():
    return [
        question(make_clip(4, 0), 0),
        question(make_clip(3, 1, sound=False), 1, lettered=True),
        question(None, 2),
        question(make_clip(2.5, 3, sight=False), 4, lettered=True),
        question(make_clip(5, 5), 5),
    ]


@pytest.fixture(scope="module")
def batch(model, processor, samples):
    return encode(model, processor, samples)


def state(model):
    "All that someone could have left behind: attributes, hooks, training flags."
    return {
        name: (
            sorted(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            m.training,
            repr(getattr(m, "rope_deltas", None)),
        )
        for name, m in model.named_modules()
    }


def test_counts_and_windows(batch):
    counts = batch.layout.counts()
    assert counts["visual"].tolist() == [64, 48, 0, 0, 80]
    assert counts["audio"].tolist() == [20, 0, 0, 12, 25]
    first, last = batch.layout[0], batch.layout[4]
    assert first.window[first.visual].bincount().tolist() == [32, 32]
    assert first.window[first.audio].bincount().tolist() == [10, 10]
    assert last.window[last.visual].bincount().tolist() == [32, 32, 16]
    assert last.chunk[last.audio].bincount().tolist() == [10, 10, 5]
    alone = batch.layout[3]
    assert alone.window[alone.audio].bincount().tolist() == [10, 2]
    assert alone.chunk[alone.audio].unique().tolist() == [0]


def test_interleaved_runs_alternate(batch):
    first = batch.layout[0]
    media = first.modality[first.visual | first.audio].tolist()
    assert media == ([VISUAL] * 32 + [AUDIO] * 10) * 2


def test_layout_from_inputs_alone(model, batch, samples, processor):
    for i in (0, 3, 4):
        single = encode(model, processor, [samples[i]])
        again = layout_of(model, single.inputs)
        n = single.shape[1]
        assert torch.equal(again.modality, batch.layout[i].modality[:, -n:])
        assert torch.equal(again.window, batch.layout[i].window[:, -n:])
    whole = layout_of(model, batch.inputs)
    assert torch.equal(whole.modality, batch.layout.modality) and torch.equal(
        whole.chunk, batch.layout.chunk
    )


def test_positions_equal_the_model_s_own(model, processor, samples):
    single = encode(model, processor, samples[:1])
    plain = {k: v for k, v in single.inputs.items() if k != "position_ids"}
    twin = copy.deepcopy(model)  # a plain forward writes rope_deltas
    with torch.no_grad():
        ours = model(**single.inputs).logits
        stock = twin(**plain, use_audio_in_video=True).logits
    assert torch.equal(ours, stock)


def test_batch_equals_singles(model, processor, samples, batch):
    with torch.no_grad():
        together = model(**batch.inputs).logits[:, -1]
        alone = torch.cat(
            [model(**encode(model, processor, [s]).inputs).logits[:, -1] for s in samples]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_generate_equals_singles_and_stock(model, processor, samples, batch):
    def new(inputs, m=model):
        return m.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[
            :, -3:
        ].tolist()

    together = new(batch.inputs)
    assert together == [new(encode(model, processor, [s]).inputs)[0] for s in samples]
    plain = {
        k: v for k, v in encode(model, processor, samples[:1]).inputs.items() if k != "position_ids"
    }
    assert together[:1] == new(dict(plain, use_audio_in_video=True), copy.deepcopy(model))


def test_nothing_is_left_on_the_model(model, processor, samples):
    before = state(model)
    encoded = encode(model, processor, samples[:2])
    score_choices(model, encoded)
    with torch.no_grad():
        Decoder(model).inputs(encoded.inputs)
    with pytest.raises(RuntimeError), last_logits_only(model):
        raise RuntimeError
    assert state(model) == before


def test_answers_are_appended(model, processor, samples):
    forced = encode(model, processor, samples[:3], answers=["red", "B. green", "upper-left"])
    assert forced.answer_length.tolist() == [1, 2, 1]
    for row, (a, b), text in zip(
        forced.inputs["input_ids"], forced.answer_spans, ("red", "B. green", "upper-left")
    ):
        assert processor.tokenizer.decode(row[a:b]) == text
    plain = encode(model, processor, samples[:3])
    assert torch.equal(forced.position_ids[:, 1, -3], plain.position_ids[:, 1, -1])
    assert (forced.layout.modality[:, -1] == TEXT).all()


def test_scores_equal_separate_forwards(model, processor, samples, batch):
    scores = score_choices(model, batch)
    for i, s in list(enumerate(samples))[1:4]:
        for c, text in enumerate(
            (f"{'ABCD'[c]}. {x}" if s.lettered else x for c, x in enumerate(s.choices))
        ):
            e = encode(model, processor, [s], answers=[text])
            ((a, b),) = e.answer_spans
            with torch.no_grad():
                logp = model(**e.inputs).logits[0].log_softmax(-1)
            slow = logp[torch.arange(a, b) - 1, e.inputs["input_ids"][0, a:b]]
            assert scores.mean[i, c].item() == pytest.approx(slow.mean().item(), abs=1e-5)
            if s.lettered:
                assert scores.letters[i, c].item() == pytest.approx(slow[0].item(), abs=1e-5)
    assert scores.letters.isnan().all(-1).tolist() == [not s.lettered for s in samples]


def test_fewer_choices_in_one_sample(model, processor, samples):
    mixed = [samples[2], replace(samples[2], id="two", choices=("red", "green"))]
    scores = score_choices(model, encode(model, processor, mixed))
    assert scores.mean.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert scores.best[1] in (0, 1)


def test_decoder_queries_and_keys(model, batch):
    with torch.no_grad():
        decoder = Decoder(model)
        hidden = decoder.inputs(batch.inputs)["inputs_embeds"]
        cos, sin = decoder.rotary_tables(hidden, batch.position_ids)
        keys = decoder.key(0, hidden, cos, sin)
        query = decoder.query(0, hidden[:, -1:], cos[:, -1:], sin[:, -1:])
        cached = model(**batch.inputs, use_cache=True).past_key_values.layers[0].keys
    valid = batch.layout.valid[:, None, :, None]
    torch.testing.assert_close(keys * valid, cached * valid, atol=1e-5, rtol=0)
    assert query.shape == (len(batch), 4, 1, decoder.layers[0].self_attn.head_dim)


def test_encoder_queries_and_keys_give_its_attention(model, processor, samples):
    "Attention recomputed from our q and k must be what the towers compute."
    inputs = encode(model, processor, samples[:1]).inputs
    found = tiny.tower_attention(model, inputs)
    for name in ("visual", "audio"):
        torch.testing.assert_close(*found[name], atol=1e-5, rtol=0)


def test_window_index_is_a_permutation_within_grids(model):
    index = TowerAttention(model, "visual").window_order(torch.tensor([[2, 8, 8]]))
    assert sorted(index.tolist()) == list(range(32))
    assert (index[:16] < 16).all()


def test_names_and_rates(model):
    adapter = adapter_for(model)
    assert len(adapter.layers(model)) == adapter.num_layers(model) == LAYERS
    assert adapter.visual(model).blocks and adapter.audio_tower(model).layers
    assert adapter.rates(model).positions_per_second == 5
    assert set(adapter.token_ids(model)) >= {VISUAL, AUDIO}


def test_full_model_is_served(processor):
    "The model around the thinker, talker left out."
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    thinker = build_config(layers=2, tower=32)
    full = Qwen2_5OmniForConditionalGeneration(
        Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    ).eval()
    adapter = adapter_for(full)
    assert adapter.thinker(full) is full.thinker and len(adapter.layers(full)) == 2
    encoded = encode(full, processor, [question(make_clip(2, 7))])
    assert score_choices(full, encoded).mean.shape == (1, 4)


def test_unknown_model_and_bad_calls(model, processor, samples):
    with pytest.raises(ValueError, match="known families: qwen2.5-omni"):
        adapter_for(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at least one"):
        encode(model, processor, [])
    with pytest.raises(ValueError, match="2 answers for 1"):
        encode(model, processor, samples[:1], ["a", "b"])
    with pytest.raises(ValueError, match="8000 samples a second"):
        encode(model, processor, [question(replace(make_clip(2, 0), sample_rate=8000))])


def test_frame_rate_is_the_true_one(model, processor):
    "Four frames a second: twice the grids per second, so that positions advance half as fast."
    slow, fast = (encode(model, processor, [question(make_clip(4, 0, fps=f))]) for f in (2.0, 4.0))
    assert fast.inputs["video_second_per_grid"].tolist() == [0.5] and slow.inputs[
        "video_second_per_grid"
    ].tolist() == [1.0]
    assert fast.layout.counts()["visual"].item() == 2 * slow.layout.counts()["visual"].item()
    times = fast.position_ids[0, 0][fast.layout.visual[0]].unique()
    assert (times[1:] - times[:-1]).tolist() == [2, 3] * 3 + [2]


def test_long_sound_is_not_cut(model, processor):
    "The feature extractor's chunk is 30 s; what comes after it must not vanish."
    wave = np.random.default_rng(0).standard_normal(16000 * 33, "float32") * 0.1
    encoded = encode(model, processor, [question(Clip("long", None, 2.0, wave, 16000))])
    assert encoded.layout.counts()["audio"].item() == 165


def test_frames_of_odd_number_and_a_blip_of_sound(model, processor):
    "Seven frames make four grids; a sound too short for one token is no sound."
    rng = np.random.default_rng(0)
    clip = Clip(
        "odd",
        rng.integers(0, 255, (7, 112, 112, 3), dtype="uint8"),
        2.0,
        np.zeros(800, "float32"),
        16000,
    )
    counts = encode(model, processor, [question(clip)]).layout.counts()
    assert (counts["visual"].item(), counts["audio"].item()) == (64, 0)
