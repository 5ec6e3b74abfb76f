"""Families of vision-language models at a size where computing dominates: tiny ones with width 256, 4 layers, images of 96 px."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rvlm.vlm.tiny import FAMILIES, SIDE

FACTORS = {  # setting -> its factor; heads keep their width
    **dict.fromkeys(
        ("hidden_size", "out_hidden_size", "projection_dim", "embed_dim", "intermediate_size", "vision_output_dim"), 8
    ),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "attention_heads", "resampler_n_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 8),
    **dict.fromkeys(("image_seq_length", "image_seq_len", "num_image_tokens", "mm_tokens_per_image", "resampler_n_latents"), 4),
}
N_LAYERS = 4
PIXELS = {SIDE: 2 * SIDE, SIDE // 2: SIDE, SIDE**2: 4 * SIDE**2}  # sides and areas of images


def enlarged(value: Any, key: str = "") -> Any:
    """A tiny model's settings, of model or processor, at this size."""
    if isinstance(value, dict):
        return {k: enlarged(v, k) for k, v in value.items()}
    if key == "layer_types":
        return (value * N_LAYERS)[:N_LAYERS]
    if isinstance(value, list):
        return [enlarged(v, key) for v in value]
    if key in ("num_hidden_layers", "depth"):
        return N_LAYERS
    is_size = isinstance(value, int) and any(word in key for word in ("size", "edge", "height", "width", "pixels", "pinpoints"))
    return value * FACTORS[key] if key in FACTORS else PIXELS.get(value, value) if is_size else value


def build_enlarged(name: str, folder: Path) -> None:
    """Save this family's model and processor at this size."""
    FAMILIES[name](folder)
    for path in folder.glob("*.json"):
        if path.name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            path.write_text(json.dumps(enlarged(json.loads(path.read_text()))))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
