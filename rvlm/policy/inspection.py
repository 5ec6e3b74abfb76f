"""Inspect a vision-language model by running it: prompt format, causality, KV cache, parameters, LoRA targets."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from rvlm.data.actions import ActionSpec
from rvlm.policy.config import VLAConfig
from rvlm.policy.model import VLA
from rvlm.policy.observation_history import KVCachedSequence
from rvlm.vlm.adapters import lora_target_pattern
from rvlm.vlm.backbones import load_backbone, vision_modules
from rvlm.vlm.causality import ensure_causal_attention
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.prompts import PromptBuilder


def parameter_summary(model: PreTrainedModel) -> pd.DataFrame:
    """Table of the parts of a vision-language model: class, blocks, parameters (shared ones once) and their share [%]."""
    rows, counted = [], set()
    embeddings = {"token embeddings": model.get_input_embeddings()}
    for name, part in (embeddings | dict(model.base_model.named_children()) | {"rest (language-model head)": model}).items():
        new = {id(p): p.numel() for p in part.parameters() if id(p) not in counted}
        counted |= set(new)
        blocks = max([len(m) for m in part.modules() if isinstance(m, torch.nn.ModuleList)] or [0])
        rows.append({"part": name, "class": type(part).__name__, "blocks": blocks, "parameters": sum(new.values())})
    table = pd.DataFrame(rows)
    return table.assign(**{"share [%]": 100 * table["parameters"] / table["parameters"].sum()})


def can_append_to_cache(model: PreTrainedModel, processor: Any) -> bool:
    """Whether an interleaved policy of this model can append observations to its KV cache, tried with three.

    Else the whole window is recomputed at every step (`rvlm.policy.observation_history.UncachedSequence`).

    Raises:
        ValueError: The family takes one image a prompt, or its attention is not causal.
    """
    spec = ActionSpec.from_card("tabletop_franka7")
    policy: dict[str, Any] = {"structure": "interleaved", "n_obs_steps": 3, "cameras": spec.cameras, "has_state": False}
    act_id = processor.tokenizer.convert_tokens_to_ids(ACT)
    config = VLAConfig(backbone=model.config.to_dict(), act_id=act_id, spec=spec.to_dict(), stats={}, **policy)
    vla = VLA(config, model).eval()
    return KVCachedSequence.matches_uncached(vla, vla.prompt_builder(processor))


def inspect_vlm(vlm: str | Path, is_tiled: bool = False) -> pd.Series:
    """What a vision-language model is and needs, found by running it.

    Args:
        vlm: Folder or Hub name.
        is_tiled: Whether images are split into tiles, as in a policy with `image_tiling`.

    Returns:
        Facts by name; of a family without a position for `<act>`, its class and the reason only.

    Example:
        >>> facts = rvlm.inspect_vlm("vlm")
        >>> facts["structures"]
        'all'
    """
    processor: Any = load_processor(vlm, is_tiled)
    model = load_backbone(vlm, processor).eval()
    config = model.config.get_text_config()
    facts: dict[str, Any] = {"class": type(model).__name__}
    act_id = processor.tokenizer.convert_tokens_to_ids(ACT)
    try:
        prompt_builder = PromptBuilder(processor, 1, n_queries=2)
        is_causal = ensure_causal_attention(model, prompt_builder, act_id)
    except ValueError as reason:
        return pd.Series({**facts, "refused": str(reason)})
    tower, has_several = vision_modules(model), prompt_builder.input_format != "image_first"
    cached = {True: "yes", False: "no, the window is recomputed"}
    n_tokens = sum(i in prompt_builder.image_token_ids for i in prompt_builder.token_ids("lift it"))
    return pd.Series({
        **facts,
        "parameters [M]": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "width of hidden states": config.hidden_size,
        "layers": config.num_hidden_layers,
        "image size [px]": prompt_builder.image_size,
        "tokens per image": n_tokens,
        "several images": "yes" if has_several else "no",
        "prompt": prompt_builder.text("…").split(ACT)[0],
        "causal attention": "if given token types" if prompt_builder.is_causal_by_type else "yes" if is_causal else "no",
        "appends to KV cache": cached[can_append_to_cache(model, processor)] if is_causal and has_several else "–",
        "padding side": processor.tokenizer.padding_side,
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "LoRA targets": lora_target_pattern(model).split("(")[-1].strip(")").replace("|", ", "),
        "freezable": ", ".join(name for name, part in model.base_model.named_children() if any(part is t for t in tower)),
        "structures": "all" if is_causal and has_several else "one_step, policy_head",
    })  # fmt: skip
