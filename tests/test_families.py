"""The two Omni families: prompts are what the stock model makes of them, pruned passes equal a
plain loop, full models work as their thinkers do. What holds for every family: test_matrix.py."""

from dataclasses import replace

import naive, pytest, tiny, torch

from seats_analysis.inputs.layout import Modality
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning.session import prune

VISUAL, AUDIO, TEXT, *_ = Modality

L = tiny.LAYERS


PLANS = tiny.PLANS | dict(text=replace(tiny.PLANS["together"], query="text"))


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def samples():
    return [
        tiny.ask("both", tiny.clip(0)),
        tiny.ask("silent", tiny.clip(1, 3, sound=False), "where is the red object ?"),
        tiny.ask("heard", tiny.clip(2, 2.7, sight=False), lettered=True),
    ]


@pytest.fixture(scope="module")
def batch(model, processor, samples):
    return encode(model, processor, samples)


@pytest.fixture(scope="module")
def singles(model, processor, samples):
    return [encode(model, processor, [s]) for s in samples]


close = tiny.close


# ---------------------------------------------------------------- the adapter knows the family


PER_SECOND = {"qwen2.5-omni": 5, "qwen3-omni": 13}


def test_windows_and_order(family, batch):
    n, first, alone = PER_SECOND[family], batch.layout[0], batch.layout[2]
    assert first.window[first.audio].bincount().tolist() == [2 * n] * 2
    assert first.window[first.visual].bincount().tolist() == [12, 12]
    # sound follows every chunk of two seconds, or every temporal grid
    runs = {"qwen2.5-omni": [(12, 10)] * 2, "qwen3-omni": [(6, 13)] * 4}[family]
    media = first.modality[first.visual | first.audio].tolist()
    assert media == [m for v, a in runs for m in [VISUAL] * v + [AUDIO] * a]
    assert first.chunk[first.visual].bincount().tolist() == [v for v, _ in runs]
    assert alone.window[alone.audio].bincount().tolist() == [2 * n, int(2.7 * n) - 2 * n]
    assert alone.chunk[alone.audio].unique().tolist() == [0]


def test_audio_tokens_of_any_length(model, family):
    "The formula against what the tower gives."
    adapter = adapter_for(model)
    tower = adapter.audio_tower(model)
    for n in [4, 5, 6, 7, 8, 39, 40, 41, 99, 100, 101, 107, 199, 200, 203]:
        mel = torch.zeros(adapter.config(model).audio_config.num_mel_bins, n)
        more = {} if family == "qwen3-omni" else dict(aftercnn_lens=torch.tensor([(n + 1) // 2]))
        got = tower(mel, feature_lens=torch.tensor([n]), **more).last_hidden_state
        assert adapter.audio_tokens(model, [n]) == [len(got)], n


def test_frame_rate_is_the_true_one(family, model, processor):
    "Four frames a second: twice the grids per second, so that positions advance half as fast."
    slow, fast = (
        encode(model, processor, [tiny.ask("", tiny.clip(0, fps=fps))]) for fps in (2.0, 4.0)
    )
    rates = [e.inputs["video_second_per_grid"].tolist() for e in (slow, fast)]
    assert rates == [[1.0], [0.5]]
    visual = [e.layout.counts()["visual"].item() for e in (slow, fast)]
    assert visual[1] == 2 * visual[0]
    times = fast.position_ids[0, 0][fast.layout.visual[0]].unique()
    expected = (torch.arange(8) * PER_SECOND[family] / 2).long()
    assert torch.equal((times - times[0]).long(), expected)


def test_long_sound_and_frames_of_odd_number(family, model, processor):
    "The extractor's chunk is 30 s; what comes after it must not vanish. Seven frames: four grids."
    clips = tiny.clip(0, 33, sight=False), replace(tiny.clip(1, 3.5), waveform=None)
    long, odd = (encode(model, processor, [tiny.ask("", c)]).layout.counts() for c in clips)
    assert long["audio"].item() == 33 * PER_SECOND[family]
    assert odd["visual"].item() == 4 * 6


def test_sound_of_another_rate_is_refused(model, processor):
    with pytest.raises(ValueError, match="8000 samples a second"):
        encode(model, processor, [tiny.ask("", replace(tiny.clip(0), sample_rate=8000))])


# ---------------------------------------------------------------- pruned passes


@pytest.mark.parametrize("name", PLANS)
def test_equals_a_plain_loop(model, singles, name):
    for one in singles:
        kept, sets, logits = naive.prefill(model, one, PLANS[name])
        with prune(model, PLANS[name]) as run:
            got = model(**one.inputs).logits[:, -1]
        # a cut is left out where this sample has nothing for it, as the naive loop does not
        for stage, positions in run.kept.items():
            assert positions[0].tolist() == kept[stage], stage
        assert run.tokens_per_layer[0].tolist() == [len(s) for s in sets]
        close(got, logits)


# ---------------------------------------------------------------- full models


def test_full_model_equals_its_thinker(family, processor, samples):
    full = tiny.full(family)
    one = encode(full, processor, samples[:1])

    def found(model):
        with prune(model, PLANS["together"]) as run:
            logits, scores = full.thinker(**one.inputs).logits, score_choices(model, one).mean
        return logits, scores, *(k for rows in run.kept.values() for k in rows)

    ours, alone = found(full), found(full.thinker)
    assert len(ours) == len(alone) > 2 and all(map(torch.equal, ours, alone))


def test_speech(family, processor, samples):
    """Text answers of a model with a talker are pruned; speech is refused with what to do instead,
    and works again outside."""
    full = tiny.full(family, speech=True)
    one, limits = encode(full, processor, samples[:1]), dict(thinker_max_new_tokens=3)
    silent = dict(generation_mode="text") if family == "qwen2.5-omni" else dict(return_audio=False)
    with prune(full, PLANS["together"]) as run:
        answer = full.generate(**one.inputs, **limits, **silent)
        assert run.kept and torch.equal(
            answer, full.thinker.generate(**one.inputs, max_new_tokens=3, eos_token_id=151645)
        )  # the full model's default
        with pytest.raises(
            ValueError, match='speech output.*generation_mode="text".*return_audio=False'
        ) as refusal:
            full.generate(**one.inputs, **limits)
        assert "\n" not in str(refusal.value)
        assert torch.equal(full.generate(**one.inputs, **limits, **silent), answer)


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_probe_cuts_deepstack(model, singles, layer):
    for one in singles[:2]:
        scores = naive.removal_scores(model, one, ("visual", "both"), [layer, L])
        for name, kinds in dict(visual=(VISUAL,), both=(VISUAL, AUDIO)).items():
            answer = naive.removed(model, one, layer, kinds)[-1:]
            close(scores[name, layer].answer, answer.log_softmax(-1))
        close(scores[None, L].answer, model(**one.inputs).logits[:, -1].log_softmax(-1))
