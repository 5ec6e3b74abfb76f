"""What a training step needs, before anything is downloaded: parameters, memory and time, from configurations alone.

The language model's own code runs forward and backward on fake tensors, which tells what it saves for backward and how much it
computes. Source: bytes of 4-bit NormalFloat with double quantisation, QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section
3; gradient checkpointing, Chen et al. 2016 (arXiv 1604.06174).
"""

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from rvlm.data.actions import ActionSpec
from rvlm.files import PACKAGE
from rvlm.policy.checkpoints import set_trainable
from rvlm.policy.config import VLAConfig
from rvlm.policy.model import VLA
from rvlm.training.cost import materialise_fake, profile_forward_backward
from rvlm.vlm.backbones import language_model
from rvlm.vlm.quantization import meta_model

# Memory [GB], dense tensor cores [TFLOP/s] (16 bits in, 32 bits summed); source: NVIDIA's data sheets.
GPUS = {"RTX 3070": (8, 41), "T4": (16, 65), "L4": (24, 121), "L40S": (48, 362), "A100": (80, 312)}
UTILISATION = 0.35  # share of a card's peak throughput that training reaches; an assumption
CUDA_CONTEXT_BYTES = 0.8e9  # what a GPU's driver and libraries take before anything is computed [byte]; an assumption
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "sgd": 0,
}  # bytes of state for each trained parameter
FOUR_BITS = (4 + 0.127) / 8  # bytes of a parameter with its share of the constants of quantisation
HUB_CONFIGS = PACKAGE / "assets" / "shapes.json"  # configurations of models on the Hub


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs.

    Attributes:
        parameters: Of the whole policy.
        trained: Of these, how many learn.
        weights, gradients, optimizer, activations: [byte]; `activations` are those saved for backward.
        peak_activations: Peak during forward and backward, without weights and optimizer [byte]: activations are freed while
            gradients are made, and kernels need workspace.
        flops: Floating point operations of forward and backward.
    """

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    peak_activations: float
    flops: float

    @property
    def peak(self) -> float:
        """Most memory at a time [byte]."""
        return self.weights + self.optimizer + self.peak_activations

    def fits(self, card: str) -> bool:
        """Whether a card of `GPUS` holds it."""
        return self.peak + CUDA_CONTEXT_BYTES < GPUS[card][0] * 1e9

    def seconds(self, card: str) -> float:
        """Of a step on a card of `GPUS`, at the assumed utilisation [s]."""
        return self.flops / (GPUS[card][1] * 1e12 * UTILISATION)


def hub_configs() -> dict[str, tuple[PreTrainedConfig, int]]:
    """Models on the Hub by name: configuration, and tokens of an image. Source: named in the file, for each."""
    entries = json.loads(HUB_CONFIGS.read_text())
    return {name: (AutoConfig.for_model(**copy.deepcopy(m["config"])), m["n_image_tokens"]) for name, m in entries.items()}


def plans(
    config: PreTrainedConfig,
    n_image_tokens: int,
    policy: dict[str, Any],
    *,
    finetuning: str = "full",
    rank: int = 16,
    batch_size: int = 8,
    n_words: int = 24,
    precision: str = "bf16",
    optimizer: str = "adamw_torch_fused",
) -> tuple[Plan, Plan]:
    """What a training step needs, without and with gradient checkpointing.

    Args:
        config: Of the vision-language model; nothing else of it is read.
        n_image_tokens: Tokens of an image in its prompt, as `rvlm.policy.inspection.inspect_vlm` tells.
        policy: Fields of `VLAConfig`: structure, head, window.
        finetuning: Which parts of the backbone are trained (`rvlm.policy.checkpoints.set_trainable`).
        rank: Of adapters.
        batch_size: Windows that are computed at once.
        n_words: Tokens of the instruction and of the prompt template around it.
        precision: "fp32", "bf16" or "fp16", of the computation.
        optimizer: Name in `OPTIMIZER_BYTES`.

    Raises:
        ValueError: An optimizer of unknown state size, or a family of another architecture.
    """
    _refuse_unknown(config, optimizer)
    model, four_bits = _meta_policy(config, policy, finetuning, rank)
    half, language = 4 if precision == "fp32" else 2, config.get_text_config()
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    frozen = {id(p): p.numel() for p in model.parameters() if not p.requires_grad}
    small = sum(frozen[i] for i in four_bits)
    wide = sum(frozen.values()) - small
    n_trained, t, n_cameras = sum(trained.values()), model.config.n_obs_steps, len(model.config.cameras)
    per_step, rows = n_cameras * n_image_tokens + model.head.n_queries, batch_size
    length = n_words + per_step * t
    if model.config.structure != "interleaved":
        rows, length = batch_size * t, n_words + per_step
    kept, most, flops = _language_model(model, rows, length, precision)
    layer_inputs = language.num_hidden_layers * rows * length * language.hidden_size * (4 if finetuning == "full" else half)
    one_layer = kept / language.num_hidden_layers  # activations of the one layer that is recomputed
    passes = (kept, most, flops), (layer_inputs + one_layer, layer_inputs + one_layer + most - kept, flops * 4 / 3)
    held = {
        "parameters": n_trained + sum(frozen.values()),
        "trained": n_trained,
        "weights": 4 * n_trained + FOUR_BITS * small + wide * (4 if finetuning == "full" else half),
        "gradients": 4.0 * n_trained,
        "optimizer": float(OPTIMIZER_BYTES[optimizer] * n_trained),
    }
    towers = _vision_tower(config, batch_size * t * n_cameras, precision, learns=finetuning == "full")
    plain, checkpointed = (
        Plan(
            **held,
            activations=kept + vision,
            peak_activations=max(most + vision, held["gradients"] + vision_peak),
            flops=flops + vision_flops,
        )
        for (kept, most, flops), (vision, vision_peak, vision_flops) in zip(passes, towers, strict=True)
    )
    return plain, checkpointed


def plan_memory(
    config: PreTrainedConfig, n_image_tokens: int, policy: dict[str, Any], gradient_checkpointing: bool = False, **settings: Any
) -> Plan:
    """One of both `plans`, with or without gradient checkpointing.

    Example:
        >>> config = AutoConfig.from_pretrained("vlm")
        >>> plan = rvlm.plan_memory(config, n_image_tokens=4, policy={"structure": "one_step"}, finetuning="lora", batch_size=8)
        >>> plan.fits("L4")
        True
    """
    return plans(config, n_image_tokens, policy, **settings)[gradient_checkpointing]


def compare(
    models: Mapping[str, tuple[PreTrainedConfig, int]], finetuning_modes: Sequence[str], policy: dict[str, Any], **settings: Any
) -> pd.DataFrame:
    """Plans of several models and finetuning modes, without and with gradient checkpointing.

    Args:
        models: Name -> configuration, tokens of an image; as `hub_configs` gives them.
        finetuning_modes: As `plans` takes them.
        policy: As `plans` takes it.
        settings: Others of `plans`.

    Returns:
        Columns `model`, `finetuning`, `gradient_checkpointing`, `trained [M]`, `weights`, `optimizer`, `peak_activations` and
        `peak` [GB], `card` (the smallest of `GPUS` that holds it, or "none"), `step [s]` on that card.
    """
    rows = []
    for (name, (config, n_tokens)), finetuning in itertools.product(models.items(), finetuning_modes):
        for is_checkpointed, plan in enumerate(plans(config, n_tokens, policy, finetuning=finetuning, **settings)):
            card = next((card for card in GPUS if plan.fits(card)), "none")
            rows.append({
                "model": name,
                "finetuning": finetuning,
                "gradient_checkpointing": bool(is_checkpointed),
                "trained [M]": plan.trained / 1e6,
                **{part: getattr(plan, part) / 1e9 for part in ("weights", "optimizer", "peak_activations", "peak")},
                "card": card,
                "step [s]": plan.seconds(card) if card in GPUS else float("nan"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _refuse_unknown(config: PreTrainedConfig, optimizer: str) -> None:
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"no optimizer {optimizer!r} in the plan; there are {', '.join(OPTIMIZER_BYTES)}")
    if (
        config.is_encoder_decoder
        or not hasattr(getattr(config, "vision_config", None), "patch_size")
        or config.get_text_config() is config
    ):
        raise ValueError(
            f"expected a vision transformer before a decoder, got {config.model_type!r}; measure a step of it instead: "
            "rvlm.training.trainer.profile_training_step(stage)"
        )


def _meta_policy(config: PreTrainedConfig, policy: dict[str, Any], finetuning: str, rank: int) -> tuple[Any, set[int]]:
    """A policy on the meta device, and which of its weights would be held in 4 bits."""
    spec = ActionSpec.from_card("tabletop_franka7").to_dict()
    whole = VLAConfig(backbone=config.to_dict(), spec=spec, stats={}, **policy)
    with torch.device("meta"):
        model = VLA(whole, meta_model(config))
    decoder = language_model(model.backbone)
    linear = {id(m.weight) for m in decoder.modules() if isinstance(m, torch.nn.Linear)} if finetuning == "qlora" else set()
    if finetuning in ("full", "head"):
        return set_trainable(model, finetuning, rank, None), linear
    from rvlm.vlm import adapters  # and with it peft, which takes seconds

    adapters.add_lora(model.backbone, "dora" if finetuning == "dora" else "lora", rank, 0)
    return model, linear


def _language_model(model: Any, rows: int, length: int, precision: str) -> tuple[float, float, float]:
    """`profile_forward_backward` of the decoder over `rows` sequences of one length."""
    decoder = language_model(model.backbone)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise_fake(decoder, dtype)
        words = torch.zeros(rows, length, model.backbone.config.get_text_config().hidden_size, requires_grad=True)
        return profile_forward_backward(
            decoder, lambda: decoder(inputs_embeds=words, use_cache=False).last_hidden_state, precision != "fp32"
        )


def _vision_tower(
    config: PreTrainedConfig, n_images: int, precision: str, learns: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`profile_forward_backward` of the tower, without and with gradient checkpointing, from one block like SigLIP's."""
    tower: Any = config.vision_config
    size = {"hidden_size": tower.hidden_size, "intermediate_size": getattr(tower, "intermediate_size", 4 * tower.hidden_size)}
    heads = getattr(tower, "num_attention_heads", None) or tower.num_heads
    side, patch = getattr(tower, "image_size", 224), tower.patch_size
    side, patch = (v[0] if isinstance(v, (list, tuple)) else v for v in (side, patch))
    n_blocks = getattr(tower, "num_hidden_layers", None) or tower.depth
    block: Any = SiglipVisionConfig(**size, num_attention_heads=heads)
    block._attn_implementation = "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = SiglipEncoderLayer(block).requires_grad_(learns)
        patches = torch.zeros(n_images, (side // patch) ** 2, tower.hidden_size, requires_grad=learns)
        kept, most, flops = profile_forward_backward(layer, lambda: layer(patches, attention_mask=None), precision != "fp32")
    plain = n_blocks * kept, (n_blocks - 1) * kept + most, n_blocks * flops
    if not learns:
        return plain, plain
    layer_inputs = n_blocks * float(patches.numel()) * patches.element_size()
    return plain, (layer_inputs, layer_inputs + most, plain[2] * 4 / 3)
