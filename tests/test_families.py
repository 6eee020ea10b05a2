"""Both families, stock models of transformers, thinker alone and full model: prompts are what the
stock model makes of them, pruned passes equal a plain loop, keeping all changes no bit."""

from dataclasses import replace

import naive, numpy as np, pytest, tiny, torch

from seats_analysis.inputs.layout import Modality
from seats_analysis.models.attention import TowerAttention
from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.scoring import last_logits_only
from seats_analysis.models.scoring import score_choices
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule

VISUAL, AUDIO, TEXT, *_ = Modality

L = tiny.LAYERS


def schedule(**changes):
    return Schedule(num_layers=L, **changes)


ratios = tiny.ratios


PLANS = dict(
    stage1=schedule(entering=ratios(0.4, 0.5)),
    stage2=schedule(
        drop_layers=(1, 4), keep_ratios=ratios((0.5, 0.5), (0.6, 0.4))
    ),  # Qwen3-Omni still adds DeepStack embeddings after layers 1 and 2
    stage3=schedule(late_start=3),
    stage3_early=schedule(late_start=1),
    text_only=schedule(late_start=0),
    together=schedule(
        drop_layers=(1, 2, 3),
        late_start=5,
        entering=ratios(0.5, 0.6),
        keep_ratios=ratios((0.8, 0.7, 0.5), (0.9, 0.6, 0.6)),
    ),
    visual_leaves_first=schedule(
        drop_layers=(2,),
        late_start=ratios(3, 5),
        entering=ratios(0.5, 0.6),
        keep_ratios=ratios((0.7,), (0.6,)),
    ),
)
PLANS["text"] = replace(PLANS["together"], query="text")
KEEP_ALL = dict(
    empty=schedule(),
    ones=schedule(
        drop_layers=(1, 3), keep_ratios=ratios((1.0, 1.0), (1.0, 1.0)), entering=ratios(1.0, 1.0)
    ),
)


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def models(family):
    return {a: tiny.thinker(family, attention=a) for a in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def model(models):
    return models["sdpa"]


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


def generated(model, batch, n=3, **more):
    "What is generated behind each prompt."
    options = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return model.generate(**batch.inputs, **options | more)[:, -n:].tolist()


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


def test_layout_of_a_row_is_that_of_its_prompt(batch, singles):
    for b, one in enumerate(singles):
        for field in ("modality", "window", "chunk"):
            row = getattr(batch.layout, field)[b, -one.shape[1] :]
            assert torch.equal(row, getattr(one.layout, field)[0]), field


def test_audio_tokens_of_any_length(model, family):
    "The formula against what the tower gives."
    adapter = adapter_for(model)
    tower = adapter.audio_tower(model)
    for n in [4, 5, 6, 7, 8, 39, 40, 41, 99, 100, 101, 107, 199, 200, 203]:
        mel = torch.zeros(adapter.config(model).audio_config.num_mel_bins, n)
        more = {} if family == "qwen3-omni" else dict(aftercnn_lens=torch.tensor([(n + 1) // 2]))
        got = tower(mel, feature_lens=torch.tensor([n]), **more).last_hidden_state
        assert adapter.audio_tokens(model, [n]) == [len(got)], n


def test_keys_of_every_layer_equal_the_cache(model, batch):
    """Rotary tables (interleaved M-RoPE of Qwen3-Omni), q/k norms, and DeepStack embeddings up to
    the layer."""
    decoder = Decoder(model)
    inputs = decoder.inputs(batch.inputs)
    tables = decoder.rotary_tables(inputs["inputs_embeds"], batch.position_ids)
    valid = batch.layout.valid[:, None, :, None]
    out = model(**batch.inputs, use_cache=True, output_hidden_states=True)
    for i in (0, L - 1):
        keys = decoder.key(i, out.hidden_states[i], *tables)
        close(keys * valid, out.past_key_values.layers[i].keys * valid)


@pytest.mark.parametrize("modality", ["visual", "audio"])
def test_encoder_queries_and_keys_are_those_of_its_attention(model, singles, monkeypatch, modality):
    "What the stock module hands to its attention, window by window."
    part, sdpa = TowerAttention(model, modality), torch.nn.functional.scaled_dot_product_attention
    calls, ours, theirs = [], [], []

    def attend(q, k, *args, **kwargs):
        calls.append((q, k))
        return sdpa(q, k, *args, **kwargs)

    def begin(module, args, kwargs):
        calls.clear()  # of the layers before
        hidden = args[0] if args else kwargs["hidden_states"]
        ours.extend(part.heads([p(hidden) for p in part.projections], part.rotary(kwargs)))

    def end(*_):
        theirs.extend(torch.cat(parts, 2)[0].transpose(0, 1) for parts in zip(*calls))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    hooks = part.module.register_forward_pre_hook(begin, with_kwargs=True)
    with hooks, part.module.register_forward_hook(end):
        Decoder(model).inputs(singles[0].inputs)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs):
        close(a, b)


def test_positions_equal_the_model_s_own(family, singles):
    "Of the prompt and of what is generated behind it."
    one = singles[0]
    stock = {k: v for k, v in one.inputs.items() if k != "position_ids"}
    stock["use_audio_in_video"] = True
    twin = tiny.thinker(family)  # a plain forward writes rope_deltas
    ours = twin(**one.inputs).logits
    assert torch.equal(ours, twin(**stock).logits)
    assert generated(twin, one) == generated(tiny.thinker(family), replace(one, inputs=stock))


def test_nothing_is_left_on_the_model(model, batch, samples, processor):
    def state():
        hooks = lambda m: (len(m._forward_hooks), len(m._forward_pre_hooks))
        kept = lambda m: (sorted(vars(m)), m.training, repr(getattr(m, "rope_deltas", None)))
        return {name: (*hooks(m), *kept(m)) for name, m in model.named_modules()}

    before = state()
    score_choices(model, encode(model, processor, samples))
    Decoder(model).inputs(batch.inputs)
    with pytest.raises(RuntimeError), last_logits_only(model):
        raise RuntimeError
    assert state() == before


def test_scores_equal_separate_forwards(model, processor, samples):
    "Of the whole text, and of the letter; a sample may have fewer choices."
    some = [replace(samples[0], choices=("red", "green circle")), *samples[1:]]
    scores = score_choices(model, encode(model, processor, some))
    for i, s in enumerate(some):
        for c, text in enumerate(s.answer_texts):
            e, n = naive.with_answer(model, processor, s, text)
            b = e.shape[1]
            a = b - n
            logp = model(**e.inputs).logits[0, a - 1 : b - 1].log_softmax(-1)
            slow = logp[torch.arange(b - a), e.inputs["input_ids"][0, a:b]]
            expected = slow.mean(), slow[0] if s.lettered else np.nan
            got = scores.mean[i, c], scores.letters[i, c]
            np.testing.assert_allclose(got, expected, atol=1e-5)
    assert scores.mean.isnan().tolist() == [[False, False, True, True], *[[False] * 4] * 2]
    assert scores.best[0] in (0, 1)


def test_window_order_stays_within_grids(model):
    index = TowerAttention(model, "visual").window_order(torch.tensor([[2, 8, 8]]))
    assert sorted(index.tolist()) == list(range(32)) and (index[:16] < 16).all()


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


@pytest.mark.parametrize(
    "name, attention", [("empty", "sdpa"), ("ones", "sdpa"), ("ones", "eager")]
)
def test_keeping_all_changes_no_bit(models, batch, name, attention):
    model = models[attention]
    more = dict(max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    answer = lambda: model.generate(**batch.inputs, min_new_tokens=3, do_sample=False, **more)
    full, generated = model(**batch.inputs).logits, answer()
    with prune(model, KEEP_ALL[name]) as run:
        assert torch.equal(model(**batch.inputs).logits, full)
        again = answer()
    assert torch.equal(again.sequences, generated.sequences) and run.kept == {}
    assert torch.equal(torch.cat(again.logits), torch.cat(generated.logits))


@pytest.mark.parametrize(
    "name, attention", [*((name, "sdpa") for name in PLANS), ("together", "eager")]
)
def test_equals_a_plain_loop(models, singles, name, attention):
    for one in singles:
        kept, sets, logits = naive.prefill(models[attention], one, PLANS[name])
        with prune(models[attention], PLANS[name]) as run:
            got = models[attention](**one.inputs).logits[:, -1]
        # a cut is left out where this sample has nothing for it, as the naive loop does not
        for stage, positions in run.kept.items():
            assert positions[0].tolist() == kept[stage], stage
        assert run.tokens_per_layer[0].tolist() == [len(s) for s in sets]
        close(got, logits)


@pytest.mark.parametrize("kv", ["evict", "retain"])
def test_generate_equals_singles(model, batch, singles, kv):
    with prune(model, PLANS["together"], kv=kv):
        alone = [generated(model, one, 4)[0] for one in singles]
        assert generated(model, batch, 4) == alone


def test_text_asks_for_each_sample_alone(model, batch, singles):
    "In a batch only a row's own text counts; and asking more changes what is kept."

    def kept(inputs, name):
        with prune(model, PLANS[name]) as run:
            model(**inputs)
        return {stage: [p.tolist() for p in rows] for stage, rows in run.kept.items()}

    together = kept(batch.inputs, "text")
    assert together != kept(batch.inputs, "together")
    for b, one in enumerate(singles):
        for stage, rows in kept(one.inputs, "text").items():
            assert together[stage][b] == rows[0], (stage, b)


def test_deepstack_is_cut_with_the_sequence(family, model, singles):
    "Without the embeddings the answer differs, so the comparisons above do see them."
    if family != "qwen3-omni":
        assert not [k for k in Decoder(model).inputs(singles[0].inputs) if "deepstack" in k]
        return
    tower = adapter_for(model).visual(model)
    with prune(model, PLANS["together"]):
        with_them = model(**singles[0].inputs).logits[:, -1]
        handles = [
            m.register_forward_hook(lambda m, a, out: out * 0) for m in tower.deepstack_merger_list
        ]
        without = model(**singles[0].inputs).logits[:, -1]
        for h in handles:
            h.remove()
    assert (with_them - without).abs().max() > 1e-3


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
