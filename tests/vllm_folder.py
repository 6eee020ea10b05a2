"""The testbed as the full checkpoint that vLLM loads, or one of its shape with random weights:

python tests/vllm_folder.py FOLDER [LAYERS WIDTH]
"""

import json
import math
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from seats_analysis.storage.files import shipped_folder
from seats_analysis.testbed.load import build_config

FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
ARCHITECTURES = dict(
    qwen2_5_omni="Qwen2_5OmniModel", qwen3_omni_moe="Qwen3OmniMoeForConditionalGeneration"
)


def full_checkpoint(
    thinker,  # folder of a Qwen2.5-Omni or Qwen3-Omni thinker
    out,
) -> Path:
    "Write the thinker as a part of the full model, which vLLM expects."
    thinker, out = Path(thinker), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((thinker / "config.json").read_text())
    model_type = config["model_type"].removesuffix("_thinker")
    if "num_position_embeddings" in (vision := config["vision_config"]):  # in vLLM's words
        side = math.isqrt(vision["num_position_embeddings"])
        vision |= dict(image_size=side * vision["patch_size"], apply_vit_abs_pos_embed=True)
    full = dict(
        architectures=[ARCHITECTURES[model_type]],
        model_type=model_type,
        thinker_config=config,
        enable_audio_output=False,
        dtype=config["dtype"],
    )
    (out / "config.json").write_text(json.dumps(full))
    weights = {f"thinker.{k}": v for k, v in load_file(thinker / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        shutil.copy(thinker / name, out / name)
    return out


def random_thinker(out, layers, width) -> Path:
    "A thinker of the testbed's make: it answers nothing, but takes the time of its size."
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = build_config(layers=layers, width=width)
    sections = [width // 16, width // 32, width // 32]
    config.text_config.rope_parameters["mrope_section"] = sections
    Qwen2_5OmniThinkerForConditionalGeneration(config).save_pretrained(out)
    for name in FILES:
        shutil.copy(shipped_folder("testbed") / "qwen2.5-omni" / name, out)
    return Path(out)


if __name__ == "__main__":
    thinker = shipped_folder("testbed") / "qwen2.5-omni"
    if sys.argv[2:]:
        thinker = random_thinker(Path(sys.argv[1], "thinker"), *map(int, sys.argv[2:]))
    print(full_checkpoint(thinker, sys.argv[1]))
