"""What `kinds` needs for the families with recurrent layers, beyond what all have."""

import transformers

QWEN = "<|image_pad|>", "<|video_pad|>"
ROWS = {
    "qwen3.5": ("Qwen3_5", True, QWEN),
    "qwen3.5-moe": ("Qwen3_5Moe", True, QWEN),
    "minicpm-v-4.6": ("MiniCPMV4_6", False, QWEN),
    "hyperclovax-vision-v2": ("HyperCLOVAXVisionV2", False, QWEN),
}
RECURRENT = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
    head_dim=32,  # of which one half is rotated
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=8,
    shared_expert_intermediate_size=24,
)
TEXT = dict.fromkeys(list(ROWS)[:3], RECURRENT)
ROPE = dict.fromkeys(TEXT, dict(partial_rotary_factor=0.5, mrope_section=[4, 2, 2]))
TEXT["hyperclovax-vision-v2"] = dict(
    logits_scaling=0.5, embedding_multiplier=2.0, attention_multiplier=0.3, residual_multiplier=0.8
)
MARKS = {  # of the tokenizer
    "minicpm-v-4.6": dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
        slice_start_token="<img>",
        slice_end_token="</img>",
        image_id_start_token="<|vision_start|>",
        image_id_end_token="<|vision_end|>",
    )
}


def processor(name, given):
    "The processor of a class, or None: `kinds` knows it."
    if name.startswith("Qwen3_5"):
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28 * 2)
        return transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=size),
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=14, size=size),
            **given,
        )
    if name == "HyperCLOVAXVisionV2":
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28)
        return transformers.HyperCLOVAXVisionV2Processor(
            image_processor=transformers.Qwen2VLImageProcessor(size=size),
            video_processor=transformers.Qwen2VLVideoProcessor(size=size),
            **given,
        )
    if name == "MiniCPMV4_6":
        return transformers.MiniCPMV4_6Processor(
            image_processor=transformers.MiniCPMV4_6ImageProcessor(scale_resolution=56),
            video_processor=transformers.MiniCPMV4_6VideoProcessor(
                scale_resolution=84, slice_mode=False, use_image_id=False
            ),
            **given,
        )
    return None
