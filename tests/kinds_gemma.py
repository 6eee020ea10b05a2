"""Tiny random models of the two Gemma 4 families, with their real processors: sliding windows, two
rotary tables, layers that share keys, embeddings per layer, attention both ways in a frame."""

import tiny
import transformers

TOKENS = "<|audio|> <boi> <eoi> <boa> <eoa>".split()
MARKS = dict(
    image_token="<|image|>",
    audio_token="<|audio|>",
    boi_token="<boi>",
    eoi_token="<eoi>",
    boa_token="<boa>",
    eoa_token="<eoa>",
)
MEDIA = "<|image|>", "<|video|>", "<|audio|>"
ROWS = {"gemma4": ("Gemma4", False, MEDIA), "gemma4-unified": ("Gemma4Unified", False, MEDIA)}
TEXT = tiny.TEXT | dict(
    global_head_dim=32,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * (tiny.LAYERS // 2),
    num_kv_shared_layers=2,
    final_logit_softcapping=8.0,
    use_bidirectional_attention="vision",
)
EDGE = dict(patch_size=14, pooling_kernel_size=2)


def model(family, ids, attention="sdpa", seed=0, **changes):
    cls = getattr(transformers, ROWS[family][0] + "ForConditionalGeneration")
    if family == "gemma4":
        own = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)
        vision = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            position_embedding_size=64,
        )
        audio = dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            output_proj_dims=32,
            subsampling_conv_channels=[128, 4],
        )
    else:
        own = {}
        vision = dict(mm_embed_dim=32, mm_posemb_size=64, output_proj_dims=32)
        audio = {}
    marks = dict(boi="<boi>", eoi="<eoi>", boa="<boa>", image="<|image|>", video="<|video|>")
    settings = cls.config_class(
        text_config=TEXT | own | changes,
        vision_config=vision | EDGE,
        audio_config=audio,
        audio_token_id=ids["<|audio|>"],
        eoa_token_index=ids["<eoa>"],
        tie_word_embeddings=False,
        **{f"{k}_token_id": ids[v] for k, v in marks.items()},
    )
    parts = dict(text_config=attention, vision_config="eager", audio_config="eager")
    return tiny.randomise(cls._from_config(settings, attn_implementation=parts), seed)


def processor(family, **given):
    name = ROWS[family][0]
    as_they_are = dict(do_resize=False, **EDGE)
    return getattr(transformers, name + "Processor")(
        feature_extractor=getattr(transformers, name + "AudioFeatureExtractor")(),
        image_processor=getattr(transformers, name + "ImageProcessor")(**as_they_are),
        video_processor=getattr(transformers, name + "VideoProcessor")(**as_they_are),
        **given,
    )
