"""Tiny random models of the families beside the two Omni ones, from the stock classes of
transformers, each with the real processor of its family."""

import kinds_gemma
import kinds_more
import numpy as np
import tiny
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from seats_analysis import Clip, Sample

WORDS = (
    "what colour is the circle ? where heard first it user assistant red blue green white".split()
)
TOKENS = (
    "<pad> <eos> <unk> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <|AUDIO|> "
    "<|audio_bos|> <|audio_eos|> <image> <video> <sound> <img> </img> <ctx> <|image|> <|video|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|sound_bos|> "
    "<|sound_eos|>"
).split()
MARKS = [*kinds_gemma.TOKENS, *kinds_more.TOKENS]
IDS = {word: i for i, word in enumerate([*TOKENS, *WORDS, *MARKS])}

TEXT = tiny.TEXT | dict(
    moe_intermediate_size=32, num_experts=4, num_local_experts=4, num_experts_per_tok=2
)
VISION = dict(
    hidden_size=32,
    embed_dim=32,
    depth=2,
    num_heads=2,
    num_key_value_heads=1,
    mlp_ratio=2,
    intermediate_size=48,
    out_hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0, 1],
    fullatt_block_indexes=[1],
    window_size=56,
    vision_use_head=False,
)
AUDIO = dict(
    d_model=32,
    hidden_size=32,
    intermediate_size=48,
    encoder_layers=2,
    num_hidden_layers=2,
    encoder_attention_heads=2,
    num_attention_heads=2,
    encoder_ffn_dim=48,
    num_mel_bins=16,
)
QWEN = "<|image_pad|>", "<|video_pad|>"
# family -> class, axes of M-RoPE, tokens of picture, video and audio
ROWS = {
    "qwen2-vl": ("Qwen2VL", True, QWEN),
    "qwen2.5-vl": ("Qwen2_5_VL", True, QWEN),
    "qwen3-vl": ("Qwen3VL", True, QWEN),
    "qwen3-vl-moe": ("Qwen3VLMoe", True, QWEN),
    "llava-onevision": ("LlavaOnevision", False, ("<image>", "<video>")),
    "video-llama-3": ("VideoLlama3", False, QWEN),
    "internvl": ("InternVL", False, ("<ctx>",)),
    "glm4v": ("Glm4v", True, ("<|image|>", "<|video|>")),
    "glm46v": ("Glm46V", True, ("<|image|>", "<|video|>")),
    "qwen2-audio": ("Qwen2Audio", False, (None, None, "<|AUDIO|>")),
    "audioflamingo3": ("AudioFlamingo3", False, (None, None, "<sound>")),
}
ROWS |= kinds_gemma.ROWS | kinds_more.ROWS
BEFORE = {"internvl": "<video>", "glm4v": "<|begin_of_video|><|video|><|end_of_video|>"}
BEFORE["glm46v"] = BEFORE["glm4v"]


def modalities(family):
    "What its prompts can hold."
    picture, *more = ROWS[family][2]
    return ("visual",) * bool(picture) + ("audio",) * (len(more) == 2)


def model(family, attention="sdpa", seed=0):
    if family in kinds_gemma.ROWS:
        return kinds_gemma.model(family, IDS, attention, seed)
    name, mrope, tokens = ROWS[family]
    cls = getattr(transformers, name + "ForConditionalGeneration")
    stock = cls.config_class()

    def part(config, values, **more):
        known = config.to_dict()
        return type(config)(**{k: v for k, v in values.items() if k in known}, **more)

    rope = dict(rope_type="default", rope_theta=1e4)
    if mrope:
        rope["mrope_section"] = [4, 2, 2]
    rope |= kinds_more.ROPE.get(family, {})
    text = TEXT | kinds_more.TEXT.get(family, {})
    parts = dict(text_config=part(stock.get_text_config(), text, rope_parameters=rope))
    if hasattr(stock, "vision_config"):
        vision = part(stock.vision_config, VISION | kinds_more.VISION.get(family, {}))
        if name == "Qwen2VL":
            vision.hidden_size = 64  # of what comes out
        parts["vision_config"] = vision
    if hasattr(stock, "audio_config"):
        audio = AUDIO | kinds_more.AUDIO.get(family, {})
        parts["audio_config"] = part(stock.audio_config, audio)
    known = stock.to_dict()
    for kind, token in zip(("image", "video", "audio"), tokens):
        ends = [e for e in ("id", "index") if f"{kind}_token_{e}" in known]
        parts.update({f"{kind}_token_{e}": IDS[token] for e in ends if token})
    marks = dict(
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )
    parts.update({k: IDS[v] for k, v in marks.items() if k in known})
    if name == "InternVL":
        parts |= dict(image_seq_length=4)
    if name == "MiniCPMV4_6":
        parts |= dict(insert_layer_id=0)
    parts |= kinds_more.parts(family, IDS)
    settings = cls.config_class(**parts)
    settings.get_text_config()._experts_implementation = "eager"  # what torch's counter counts
    made = tiny.randomise(cls._from_config(settings, attn_implementation=attention), seed)
    for name, p in made.named_parameters():
        if name.endswith("A_log"):
            p.data -= 4  # so that a state holds what was read long ago
        if name.endswith("residual_gate.gate"):
            p.data -= 1  # so that half of a residual stays, and rounding is not amplified
    return made


def tokenizer(family):
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([*TOKENS, *MARKS])
    extra = kinds_gemma.MARKS if family in kinds_gemma.ROWS else kinds_more.MARKS.get(family, {})
    if family == "internvl":
        extra = dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<ctx>",
            video_token="<video>",
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=extra,
    )


def template(family):
    "user, the media in order, the question, assistant."
    name, _, tokens = ROWS[family]
    image = tokens[0]
    video = BEFORE.get(family, tokens[1] if len(tokens) > 1 else None)
    if family.startswith("qwen") and video:
        image, video = (f"<|vision_start|>{t}<|vision_end|>" for t in (image, video))
    if family.startswith("glm"):
        image = f"<|begin_of_image|>{image}<|end_of_image|>"
    audio = tokens[2] if len(tokens) > 2 else None
    if family == "qwen2-audio":
        audio = f"<|audio_bos|>{audio}<|audio_eos|>"
    return (
        "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
        "{% if c.type == 'video' %}" + f"{video} "
        "{% elif c.type == 'image' %}" + f"{image} "
        "{% elif c.type == 'audio' %}" + f"{audio} "
        "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}assistant"
    )


def processor(family):
    name = ROWS[family][0]
    given = dict(tokenizer=tokenizer(family), chat_template=template(family))
    if family in kinds_gemma.ROWS:
        return kinds_gemma.processor(family, **given)
    if (made := kinds_more.processor(name, given)) is not None:
        return made
    cls = getattr(transformers, name.removesuffix("Moe") + "Processor")
    if name.endswith("Audio") or name.startswith("Audio"):
        mel = transformers.WhisperFeatureExtractor(
            feature_size=16, chunk_length=30, return_attention_mask=True
        )
        return cls(feature_extractor=mel, **given)
    qwen = dict(size=dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28))
    side = dict(size=dict(height=28, width=28))
    if name in ("Qwen2VL", "Qwen2_5_VL"):
        given |= dict(
            image_processor=transformers.Qwen2VLImageProcessor(**qwen),
            video_processor=transformers.Qwen2VLVideoProcessor(**qwen),
        )
    elif name.startswith("Qwen3VL"):
        qwen = dict(qwen, patch_size=14)
        qwen["size"] = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28 * 2)
        given |= dict(
            image_processor=transformers.Qwen2VLImageProcessor(**qwen),
            video_processor=transformers.Qwen3VLVideoProcessor(**qwen),
        )
    elif name == "VideoLlama3":
        given |= dict(
            image_processor=transformers.VideoLlama3ImageProcessor(),
            video_processor=transformers.VideoLlama3VideoProcessor(
                size=dict(shortest_edge=28 * 28, longest_edge=32 * 28 * 28)
            ),
        )
    elif name in ("Glm4v", "Glm46V"):
        given |= dict(
            image_processor=getattr(transformers, name + "ImageProcessor")(),
            video_processor=getattr(transformers, name + "VideoProcessor")(),
        )
    elif name == "LlavaOnevision":
        given |= dict(
            image_processor=transformers.LlavaOnevisionImageProcessor(**side),
            video_processor=transformers.LlavaOnevisionVideoProcessor(**side),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
        )
    elif name == "InternVL":
        given |= dict(
            image_processor=transformers.GotOcr2ImageProcessor(**side),
            video_processor=transformers.InternVLVideoProcessor(**side),
            image_seq_length=1,
        )
    return cls(**given)


def samples(family):
    "Three questions of unequal length on clips of one size."

    def medium(seed):
        rng = np.random.default_rng(seed)
        wave = (rng.standard_normal(5 * 16000) * 0.1).astype("float32")
        frames = rng.integers(0, 255, (8, 56, 84, 3), dtype="uint8")
        return Clip(f"c{seed}", frames, 2.0, wave, 16000)

    choices = "red circle", "blue circle ?", "green"
    asked = "what colour is the circle ?", "where ?", "what is it heard first ?"
    return [
        Sample(id=f"q{i}", video=medium(i), question=q, choices=choices, answer=i)
        for i, q in enumerate(asked)
    ]
