"""Small random models of every family, built from the real configuration classes, with a processor
for each and clips to feed them."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers

from seats_analysis import Clip, METHODS, Sample, Schedule, follow_up, prune
from seats_analysis.testbed import load

CLASSES = {"qwen2.5-omni": "Qwen2_5Omni", "qwen3-omni": "Qwen3OmniMoe"}
FAMILIES = tuple(CLASSES)
LAYERS = 6
PRUNERS = {n: m for n, m in METHODS.items() if "downsample" not in n}  # the others prune nothing


def by_turns(names):
    """Parametrizes a test by `name`, each with one family of the fixture `family`. What all of them
    do in both families is tested once, elsewhere."""
    pairs = sorted((FAMILIES[i % 2], name) for i, name in enumerate(names))
    return pytest.mark.parametrize("family, name", pairs, indirect=["family"], scope="session")


def clip(seed, seconds=4.0, sight=True, sound=True, size=(56, 84), fps=2.0):
    "Noise to see and to hear."
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (int(fps * seconds), *size, 3), dtype="uint8") if sight else None
    wave = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype("float32") if sound else None
    return Clip(f"c{seed}", frames, fps, wave, 16000)


def image(seed, size=(56, 56)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype="uint8")


def ask(name, video, question="what colour is the circle ?", **kw):
    return Sample(
        id=name,
        video=video,
        question=question,
        choices=("red", "blue", "green", "white"),
        answer=1,
        **kw,
    )


def medley():
    "Questions about everything that a prompt may hold or lack."
    return [
        ask("both", clip(0)),
        ask("lettered", clip(1, 3), lettered=True),
        ask("silent", clip(2, 5, sound=False), "where is the red object ?"),
        ask("heard", clip(3, 6, sight=False), "what pitch is heard first ?"),
        ask("text", None),
        ask("odd", clip(4, 4.7)),
    ]


def three():
    "Samples of unequal length: one with everything, a short one, one without sound."
    return [
        ask("both", clip(0)),
        ask("short", clip(1, 2.0), "where ?"),
        ask("silent", clip(2, 3.0, sound=False)),
    ]


WORDS = ("red", "green circle", "blue", "upper-left red square")


def probed():
    "Three questions on one clip that differ in length, letters and choices; silent, audio, text."
    one, silent = (clip(i, 3 - i, sound=not i, size=(112, 112)) for i in (0, 1))
    asked = [
        ("open", one, "what colour is the circle ?", WORDS, 3, "a", "derive"),
        ("letters", one, "what is it ?", WORDS[:3], 1, "a", "derive", True),
        ("where", one, "where is the red object ?", WORDS[:2], 0, "b", "derive"),
        ("silent", silent, "where is the red object ?", WORDS[:2], 0, "b", "test"),
        ("heard", clip(2, 2.5, sight=False), "what is heard ?", WORDS[1:], 1, "b", "test"),
        ("text", None, "what day comes after monday ?", ("tuesday", "friday"), 0, "c", "test"),
    ]
    names = "id video question choices answer family split lettered".split()
    return [Sample(**dict(zip(names, row))) for row in asked]


def processor(family):
    made = load.build_processor(family)
    if family == "qwen3-omni":
        made.feature_extractor = transformers.WhisperFeatureExtractor(
            feature_size=16,
            sampling_rate=16000,
            hop_length=160,
            n_fft=400,
            chunk_length=30,
            return_attention_mask=True,
        )
    return made


TEXT = dict(  # of decoders of other families
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
QWEN3 = dict(  # where its configuration is not that of the testbed
    text_config=dict(intermediate_size=64, moe_intermediate_size=48),
    vision_config=dict(depth=4, deepstack_visual_indexes=[0, 1, 2]),
    audio_config=dict(num_mel_bins=16, n_window_infer=200, downsample_hidden_size=8),
)


def config(family, layers=LAYERS):
    if family == "qwen2.5-omni":
        made = load.build_config(layers=layers, tower=32)
        # windows of 2 x 2 cells in every block, so that the tower does reorder its tokens
        made.vision_config.window_size = 2 * 28
        made.vision_config.fullatt_block_indexes = []
        made.audio_config.n_window = 10
        return made
    made = load.build_config(family, layers, width=64, tower=32)
    made.position_id_per_seconds = 13
    made.text_config.rope_parameters["mrope_section"] = [4, 2, 2]
    for part, values in QWEN3.items():
        for name, value in values.items():
            setattr(getattr(made, part), name, value)
    return made


def randomise(model, seed=0):
    "Weights that keep signals alive, the same for the same seed."
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        fan_in = p.shape[1] if p.dim() == 3 else p[0].numel()  # experts are stacked
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=fan_in**-0.5, generator=generator)
        elif not name.endswith("bias"):
            torch.nn.init.uniform_(
                p, 0.5, 1.5, generator=generator
            )  # norms that differ per channel
        else:
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.eval()


def thinker(family, layers=LAYERS, attention="sdpa", seed=0):
    cls = getattr(transformers, CLASSES[family] + "ThinkerForConditionalGeneration")
    settings = config(family, layers)
    return randomise(cls._from_config(settings, attn_implementation=attention), seed)


def ratios(visual, audio):
    return dict(visual=visual, audio=audio)


def schedule(**changes):
    "A plan with all three stages for the tiny models."
    stages = dict(
        drop_layers=(2, 3),
        late_start=5,
        keep_ratios=ratios((0.8, 0.5), (0.9, 0.6)),
        entering=ratios(0.3, 0.5),
    )
    return Schedule(LAYERS, **stages | changes)


PLANS = dict(
    together=schedule(),
    apart=schedule(late_start=ratios(4, 5)),
    sound_first=schedule(late_start=ratios(6, 3)),
    both_at_once=schedule(drop_layers=(2, 5)),
    drop_after_one_left=schedule(
        drop_layers=(2, 4), late_start=ratios(3, 5), keep_ratios=ratios((0.8, 1.0), (0.9, 0.6))
    ),
    no_late=schedule(late_start=None),
    stage1=Schedule(LAYERS, entering=ratios(0.2, 0.4)),
    stage1_visual=Schedule(LAYERS, entering=ratios(0.2, 1.0)),
    stage2=Schedule(LAYERS, drop_layers=(1, 4), keep_ratios=ratios((0.3, 0.5), (0.6, 0.4))),
    stage3=Schedule(LAYERS, late_start=3),
    from_the_start=Schedule(LAYERS, late_start=0),
)


def _speech25():
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    talker = dict(
        **small,
        vocab_size=8448,
        embedding_size=128,
        intermediate_size=32,
        num_key_value_heads=2,
        tts_text_start_token_id=1,
        tts_text_end_token_id=1,
        tts_text_pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
    )
    dit = dict(
        **small,
        emb_dim=16,
        enc_emb_dim=8,
        enc_dim=8,
        enc_channels=[8] * 5,
        enc_attention_channels=4,
        enc_se_channels=4,
        look_ahead_layers=[0],
        look_backward_layers=[0],
        mel_dim=8,
    )
    wave = dict(mel_dim=8, upsample_initial_channel=64)
    return dict(talker_config=talker, token2wav_config=dict(dit_config=dit, bigvgan_config=wave))


def _speech3():
    small = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    text = dict(
        **small,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True
        ),
    )
    talker = dict(
        text_config=text,
        code_predictor_config=dict(**small, head_dim=16, vocab_size=64, num_code_groups=4),
        num_code_groups=4,
        spatial_merge_size=2,
        thinker_hidden_size=64,
        accept_hidden_layer=2,
        speaker_id={"ethan": 3},
    )
    wave = dict(**small, codebook_size=64, num_quantizers=4, decoder_dim=32)
    ids = load.word_ids()
    return dict(
        talker_config=talker,
        code2wav_config=wave,
        im_start_token_id=ids["<|im_start|>"],
        user_token_id=ids["user"],
        assistant_token_id=ids["assistant"],
        tts_pad_token_id=0,
        tts_bos_token_id=1,
        tts_eos_token_id=1,
    )


def full(family, speech=False, layers=LAYERS):
    "The model around the thinker, with or without talker."
    name = CLASSES[family]
    talker = (_speech25 if family == "qwen2.5-omni" else _speech3)() if speech else {}
    settings = getattr(transformers, name + "Config")(
        thinker_config=config(family, layers).to_dict(), enable_audio_output=speech, **talker
    )
    model = randomise(getattr(transformers, name + "ForConditionalGeneration")(settings))
    if speech and family == "qwen2.5-omni":
        voice = dict(bos_token=1, cond=torch.zeros(1, 8), ref_mel=torch.zeros(1, 8, 8))
        model.speaker_map = {"Chelsie": voice}
    return model


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


@contextmanager
def spoilt(module, value, at=(..., 0)):
    "Inside, some places of what a module returns hold a bad value."

    def spoil(module, args, output):
        output = output.clone()
        output[at] = value
        return output

    handle = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def answered(model, batch, plan, kv="evict", **options):
    "Tokens that are generated, what was left of the prompt at every stage, and the logits."
    lengths = dict(max_new_tokens=3, min_new_tokens=3)
    with prune(model, plan, kv=kv) as run:
        out = model.generate(
            **batch.inputs, return_dict_in_generate=True, output_logits=True, **lengths | options
        )
    kept = {stage: [x.tolist() for x in rows] for stage, rows in run.kept.items()}
    told = out.sequences.tolist(), kept, run.tokens_per_layer.tolist()
    return told, torch.stack(out.logits).cpu(), run.timings


def next_turn(model, batch):
    "Logits of a further question on a cache of the pruned prompts."
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    with prune(model, PLANS["together"], kv="retain"):
        cache = model(**batch.inputs, use_cache=True).past_key_values
        whole = torch.cat([ids, ids[:, -4:]], 1)
        mask = torch.nn.functional.pad(mask, (0, 4), value=1)
        return model(**follow_up(cache, whole, mask)).logits.cpu()


# how many of `three`, plan, kv and options of `generate`
ANSWERS = [
    *((3, name, "evict", {}) for name in ("together", "apart", "both_at_once", "from_the_start")),
    (1, "together", "evict", {}),
    (1, "apart", "retain", {}),
    (3, "together", "retain", {}),
    (3, "together", "evict", dict(num_beams=2)),
    (3, "together", "evict", dict(num_beams=2, num_return_sequences=2)),
]
