"""What `kinds` needs for the families with recurrent layers, beyond what all have."""

import transformers

QWEN = "<|image_pad|>", "<|video_pad|>"
ROWS = {
    "qwen3.5": ("Qwen3_5", True, QWEN),
    "qwen3.5-moe": ("Qwen3_5Moe", True, QWEN),
    "minicpm-v-4.6": ("MiniCPMV4_6", False, QWEN),
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
TEXT = dict.fromkeys(ROWS, RECURRENT)
ROPE = dict.fromkeys(ROWS, dict(partial_rotary_factor=0.5, mrope_section=[4, 2, 2]))


def processor(name, given):
    "The processor of a class, or None: `kinds` knows it."
    if name.startswith("Qwen3_5"):
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28 * 2)
        return transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=size),
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=14, size=size),
            **given,
        )
    return None
