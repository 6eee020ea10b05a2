"""Both families, stock models of transformers, thinker alone and full model: pruned passes equal a
plain loop, keeping all changes no bit."""

from dataclasses import replace

import naive, pytest, tiny, torch

from seats_analysis.models.families import adapter_for
from seats_analysis.models.encode import encode
from seats_analysis.models.decoder import Decoder
from seats_analysis.models.scoring import score_choices
from seats_analysis.inputs.layout import Modality
from seats_analysis.pruning.session import prune
from seats_analysis.schedules.schedule import Schedule

VISUAL, AUDIO = Modality.CODES.values()

L = tiny.LAYERS


def schedule(**changes):
    return Schedule(num_layers=L, **changes)


def ratios(visual, audio):
    return dict(visual=visual, audio=audio)


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


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


# ---------------------------------------------------------------- the adapter knows the family


def test_rates_and_windows(family, model, batch):
    per_window = {"qwen2.5-omni": 10, "qwen3-omni": 26}[family]
    r = adapter_for(model).rates(model)
    assert adapter_for(model).family == family
    assert r.positions_per_second * r.seconds_per_chunk == per_window
    first = batch.layout[0]
    assert first.window[first.audio].bincount().tolist() == [per_window] * 2 and first.window[
        first.visual
    ].bincount().tolist() == [12, 12]
    runs = {"qwen2.5-omni": [12] * 2, "qwen3-omni": [6] * 4}[
        family
    ]  # sound follows every chunk of two seconds, or every temporal grid
    assert first.chunk[first.visual].bincount().tolist() == runs


def test_audio_tokens_of_any_length(model, family):
    "The formula against what the tower gives."
    tower, config = (
        adapter_for(model).audio_tower(model),
        adapter_for(model).config(model).audio_config,
    )
    for n in [4, 5, 6, 7, 8, 39, 40, 41, 99, 100, 101, 107, 199, 200, 203]:
        if family == "qwen3-omni":
            got = tower(torch.zeros(config.num_mel_bins, n), feature_lens=torch.tensor([n]))
        else:
            got = tower(
                torch.zeros(config.num_mel_bins, n),
                feature_lens=torch.tensor([n]),
                aftercnn_lens=torch.tensor([(n + 1) // 2]),
            )
        assert adapter_for(model).audio_tokens(model, [n]) == [len(got.last_hidden_state)], n


def test_keys_of_every_layer_equal_the_cache(model, batch):
    """Rotary tables (interleaved M-RoPE of Qwen3-Omni), q/k norms, and DeepStack embeddings up to
    the layer."""
    decoder = Decoder(model)
    inputs = decoder.inputs(batch.inputs)
    tables, valid = (
        decoder.rotary_tables(inputs["inputs_embeds"], batch.position_ids),
        batch.layout.valid[:, None, :, None],
    )
    out = model(**batch.inputs, use_cache=True, output_hidden_states=True)
    for i in (0, L - 1):
        keys = decoder.key(i, out.hidden_states[i], *tables)
        close(keys * valid, out.past_key_values.layers[i].keys * valid)


def test_encoder_queries_and_keys_give_its_attention(model, singles):
    found = tiny.tower_attention(model, singles[0].inputs)
    close(*found["visual"])
    close(*found["audio"])


def test_positions_equal_the_model_s_own(processor, singles, family):
    plain = {k: v for k, v in singles[0].inputs.items() if k != "position_ids"}
    twin = tiny.thinker(family)  # a plain forward writes rope_deltas
    ours = twin(**singles[0].inputs).logits
    assert torch.equal(ours, twin(**plain, use_audio_in_video=True).logits)


# ---------------------------------------------------------------- pruned passes


@pytest.mark.parametrize(
    "name, attention", [("empty", "sdpa"), ("ones", "sdpa"), ("ones", "eager")]
)
def test_keeping_all_changes_no_bit(models, batch, name, attention):
    model, options = (
        models[attention],
        dict(
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    full, generated = model(**batch.inputs).logits, model.generate(**batch.inputs, **options)
    with prune(model, KEEP_ALL[name]) as run:
        assert torch.equal(model(**batch.inputs).logits, full)
        again = model.generate(**batch.inputs, **options)
    assert (
        torch.equal(again.sequences, generated.sequences)
        and torch.equal(torch.cat(again.logits), torch.cat(generated.logits))
        and run.kept == {}
    )


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
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with prune(model, PLANS["together"], kv=kv):
        together = model.generate(**batch.inputs, **options)[:, -4:]
        assert together.tolist() == [
            model.generate(**one.inputs, **options)[0, -4:].tolist() for one in singles
        ]


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
    with prune(full, PLANS["together"]) as run:
        logits = full.thinker(**one.inputs).logits
        scores = score_choices(full, one).mean
    with prune(full.thinker, PLANS["together"]) as alone:
        assert torch.equal(full.thinker(**one.inputs).logits, logits) and torch.equal(
            score_choices(full.thinker, one).mean, scores
        )
    assert [k.tolist() for v in run.kept.values() for k in v] == [
        k.tolist() for v in alone.kept.values() for k in v
    ] and run.kept


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
    from seats_analysis.probing.branches import removal_scores

    for one in singles[:2]:
        scores = removal_scores(model, one, ("visual", "both"), [layer, L])
        for name, kinds in dict(visual=(VISUAL,), both=(VISUAL, AUDIO)).items():
            close(
                scores[name, layer].answer, naive.removed(model, one, layer, kinds).log_softmax(-1)
            )
        close(scores[None, L].answer, model(**one.inputs).logits[:, -1].log_softmax(-1))
