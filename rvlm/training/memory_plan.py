"""Parameters, memory and time of a training step, estimated from configurations alone, without downloading weights.

The language model's own code runs forward and backward on fake tensors, which gives activations saved for backward and FLOPs.
Source: bytes of 4-bit NormalFloat with double quantisation, QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3; gradient
checkpointing, Chen et al. 2016 (arXiv 1604.06174).
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
from rvlm.policy.config import VLAConfig
from rvlm.policy.factory import set_trainable
from rvlm.policy.model import VLA
from rvlm.training.cost import StepCost, materialise_fake, profile_forward_backward
from rvlm.vlm.backbones import language_model
from rvlm.vlm.quantization import meta_model

# Memory [GB], peak of dense tensor cores [TFLOP/s] (16-bit inputs, 32-bit accumulation); source: NVIDIA's data sheets.
GPUS = {"RTX 3070": (8, 41), "T4": (16, 65), "L4": (24, 121), "L40S": (48, 362), "A100": (80, 312)}
GPUS |= {"H100": (80, 989), "H200": (141, 989)}
UTILISATION = 0.35  # model FLOPs utilisation: fraction of the peak throughput that training reaches; an assumption
CUDA_CONTEXT_BYTES = 0.8e9  # of the CUDA context and libraries [byte]; an assumption
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "sgd": 0,
}  # bytes of optimizer state per trained parameter
FOUR_BITS = (4 + 0.127) / 8  # bytes per 4-bit parameter, quantisation constants included
HUB_CONFIGS = PACKAGE / "assets" / "shapes.json"  # configurations of models on the Hub


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Parameters, memory and FLOPs of one training step.

    Attributes:
        parameters: Number of the whole policy's.
        trained: How many of them are trained.
        weights, gradients, optimizer, activations: [byte]; `activations` are those saved for backward.
        peak_activations: Peak during forward and backward, without weights and optimizer [byte]: activations are freed while
            gradients are allocated, and kernels need workspace.
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
        """Peak memory [byte]."""
        return self.weights + self.optimizer + self.peak_activations

    def fits(self, gpu: str) -> bool:
        """Whether it fits in the memory of one of `GPUS`."""
        return self.peak + CUDA_CONTEXT_BYTES < GPUS[gpu][0] * 1e9

    def seconds(self, gpu: str) -> float:
        """Time of a step on one of `GPUS`, at the assumed utilisation [s]."""
        return self.flops / (GPUS[gpu][1] * 1e12 * UTILISATION)


def hub_configs() -> dict[str, tuple[PreTrainedConfig, int]]:
    """Models on the Hub by name: configuration, and tokens of an image. Source: named in the file, for each."""
    entries = json.loads(HUB_CONFIGS.read_text())
    return {name: (AutoConfig.for_model(**copy.deepcopy(m["config"])), m["n_image_tokens"]) for name, m in entries.items()}


def hub_n_tiles() -> dict[str, int]:
    """Tiles of an image of the model's size where `image_tiling` is on, of the models of `hub_configs`."""
    return {name: m.get("n_tiles", 1) for name, m in json.loads(HUB_CONFIGS.read_text()).items()}


def plans(
    config: PreTrainedConfig,
    n_image_tokens: int,
    policy: dict[str, Any],
    *,
    finetuning: str = "full",
    lora_rank: int = 16,
    batch_size: int = 8,
    n_text_tokens: int = 24,
    n_tiles: int | None = None,
    precision: str = "bf16",
    optimizer: str = "adamw_torch_fused",
    ema_decay: float = 0.0,
) -> tuple[MemoryPlan, MemoryPlan]:
    """Plans of a training step without and with gradient checkpointing.

    Args:
        config: Of the vision-language model.
        n_image_tokens: Tokens per image in its prompt, as `rvlm.policy.inspection.inspect_vlm` finds them; of one tile.
        policy: Fields of `VLAConfig`: structure, head, history.
        finetuning: Which parts of the backbone are trained (`rvlm.policy.factory.set_trainable`).
        lora_rank: Of adapters.
        batch_size: Windows per forward pass.
        n_text_tokens: Tokens of the instruction and of the prompt template around it.
        n_tiles: Tiles per image of a policy with `image_tiling`, as of `hub_n_tiles`; 1 without.
        precision: Of the computation: "fp32", "bf16" or "fp16".
        optimizer: Name in `OPTIMIZER_BYTES`.
        ema_decay: As of `Stage`: an average of the trained weights is held beside them unless it is 0.

    Raises:
        ValueError: An optimizer of unknown state size, an unsupported architecture, or `image_tiling` without `n_tiles`.
    """
    _check_supported(config, optimizer)
    n_tiles = _tiles(policy, n_tiles)
    model, four_bits = _meta_policy(config, policy, finetuning, lora_rank)
    frozen_bytes = 4 if finetuning == "full" or precision == "fp32" else 2
    static = _static_memory(model, four_bits, frozen_bytes, optimizer)
    static["weights"] += 4 * static["trained"] * bool(ema_decay)
    decoder = _decoder_costs(model, batch_size, n_text_tokens, n_tiles * n_image_tokens, precision, frozen_bytes)
    n_images = n_tiles * batch_size * model.config.n_obs_steps * len(model.config.cameras)
    tower = _vision_tower_costs(config, n_images, precision, is_trained=finetuning == "full")
    plain, checkpointed = (
        MemoryPlan(
            **static,
            activations=text.saved + vision.saved,
            peak_activations=max(text.peak + vision.saved, static["gradients"] + vision.peak),
            flops=text.flops + vision.flops,
        )
        for text, vision in zip(decoder, tower, strict=True)
    )
    return plain, checkpointed


def plan_memory(
    config: PreTrainedConfig, n_image_tokens: int, policy: dict[str, Any], gradient_checkpointing: bool = False, **settings: Any
) -> MemoryPlan:
    """The plan of a training step, as `plans`, with or without gradient checkpointing.

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
        models: Name -> configuration and tokens per image, as of `hub_configs`.
        finetuning_modes: As `finetuning` of `plans`.
        policy: As of `plans`.
        settings: Other arguments of `plans`.

    Returns:
        Columns `model`, `finetuning`, `gradient_checkpointing`, `trained [M]`, `weights`, `optimizer`, `peak_activations` and
        `peak` [GB], `gpu` (the smallest of `GPUS` that it fits, or "none"), `step [s]` on that GPU.
    """
    rows = []
    for (name, (config, n_tokens)), finetuning in itertools.product(models.items(), finetuning_modes):
        for is_checkpointed, plan in enumerate(plans(config, n_tokens, policy, finetuning=finetuning, **settings)):
            gpu = next((gpu for gpu in GPUS if plan.fits(gpu)), "none")
            rows.append({
                "model": name,
                "finetuning": finetuning,
                "gradient_checkpointing": bool(is_checkpointed),
                "trained [M]": plan.trained / 1e6,
                **{part: getattr(plan, part) / 1e9 for part in ("weights", "optimizer", "peak_activations", "peak")},
                "gpu": gpu,
                "step [s]": plan.seconds(gpu) if gpu in GPUS else float("nan"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _check_supported(config: PreTrainedConfig, optimizer: str) -> None:
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"no optimizer {optimizer!r} in the plan; there are {', '.join(OPTIMIZER_BYTES)}")
    has_patches = hasattr(getattr(config, "vision_config", None), "patch_size")
    if config.is_encoder_decoder or not has_patches or config.get_text_config() is config:
        raise ValueError(
            f"expected a vision transformer before a decoder, got {config.model_type!r}; measure a step of it instead: "
            "rvlm.training.trainer.profile_training_step(stage)"
        )


def _tiles(policy: dict[str, Any], n_tiles: int | None) -> int:
    if policy.get("image_tiling") and n_tiles is None:
        raise ValueError(
            "expected n_tiles, the tiles per image, with a policy of image_tiling=True, got none; give it, as of "
            f"rvlm.training.memory_plan.hub_n_tiles(): {hub_n_tiles()}"
        )
    return n_tiles or 1


def _meta_policy(config: PreTrainedConfig, policy: dict[str, Any], finetuning: str, lora_rank: int) -> tuple[Any, set[int]]:
    """A policy on the meta device, and the ids of its weights that are stored in 4 bits."""
    spec = ActionSpec.from_card("tabletop_franka7").to_dict()
    with torch.device("meta"):
        model = VLA(VLAConfig(backbone=config.to_dict(), spec=spec, stats={}, **policy), meta_model(config))
    decoder = language_model(model.backbone)
    four_bits = {id(m.weight) for m in decoder.modules() if isinstance(m, torch.nn.Linear)} if finetuning == "qlora" else set()
    if finetuning in ("full", "head"):
        return set_trainable(model, finetuning, lora_rank, None), four_bits
    from rvlm.vlm import adapters  # imports peft, which takes seconds

    adapters.add_lora(model.backbone, "dora" if finetuning == "dora" else "lora", lora_rank, 0)
    return model, four_bits


def _static_memory(model: Any, four_bits: set[int], frozen_bytes: int, optimizer: str) -> dict[str, Any]:
    """Parameters, and what stays allocated between steps [byte], as fields of `MemoryPlan`."""
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    frozen = {id(p): p.numel() for p in model.parameters() if not p.requires_grad}
    n_trained, n_frozen, n_quantized = sum(trained.values()), sum(frozen.values()), sum(frozen[i] for i in four_bits)
    return {
        "parameters": n_trained + n_frozen,
        "trained": n_trained,
        "weights": 4 * n_trained + FOUR_BITS * n_quantized + frozen_bytes * (n_frozen - n_quantized),
        "gradients": 4.0 * n_trained,
        "optimizer": float(OPTIMIZER_BYTES[optimizer] * n_trained),
    }


def _decoder_costs(
    model: Any, batch_size: int, n_text_tokens: int, n_image_tokens: int, precision: str, activation_bytes: int
) -> tuple[StepCost, StepCost]:
    """Of the language model, without and with gradient checkpointing, which recomputes one layer at a time."""
    config, text = model.config, model.backbone.config.get_text_config()
    tokens_per_step = len(config.cameras) * n_image_tokens + model.head.n_queries
    if config.structure == "interleaved":
        n_sequences, length = batch_size, n_text_tokens + tokens_per_step * config.n_obs_steps
    else:
        n_sequences, length = batch_size * config.n_obs_steps, n_text_tokens + tokens_per_step
    plain = _profile_decoder(model, n_sequences, length, precision)
    layer_inputs = text.num_hidden_layers * n_sequences * length * text.hidden_size * activation_bytes
    saved = layer_inputs + plain.saved / text.num_hidden_layers
    peak = saved + plain.peak - plain.saved
    if not all(p.requires_grad for p in language_model(model.backbone).parameters()):  # else the decoder's peak has them
        peak += 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # gradients gather while layers are recomputed
    return plain, StepCost(saved, peak, plain.flops * 4 / 3)


def _profile_decoder(model: Any, n_sequences: int, length: int, precision: str) -> StepCost:
    decoder = language_model(model.backbone)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise_fake(decoder, dtype)
        hidden = model.backbone.config.get_text_config().hidden_size
        embeddings = torch.zeros(n_sequences, length, hidden, requires_grad=True)
        return profile_forward_backward(
            decoder, lambda: decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state, precision != "fp32"
        )


def _vision_tower_costs(config: PreTrainedConfig, n_images: int, precision: str, is_trained: bool) -> tuple[StepCost, StepCost]:
    """Of the vision tower, without and with gradient checkpointing; estimated from one SigLIP block of its size."""
    tower: Any = config.vision_config
    size = {"hidden_size": tower.hidden_size, "intermediate_size": getattr(tower, "intermediate_size", 4 * tower.hidden_size)}
    heads = getattr(tower, "num_attention_heads", None) or tower.num_heads
    side, patch = getattr(tower, "image_size", 224), tower.patch_size
    side, patch = (v[0] if isinstance(v, (list, tuple)) else v for v in (side, patch))
    n_blocks = getattr(tower, "num_hidden_layers", None) or tower.depth
    block: Any = SiglipVisionConfig(**size, num_attention_heads=heads)
    block._attn_implementation = "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = SiglipEncoderLayer(block).requires_grad_(is_trained)
        patches = torch.zeros(n_images, (side // patch) ** 2, tower.hidden_size, requires_grad=is_trained)
        one = profile_forward_backward(layer, lambda: layer(patches, attention_mask=None), precision != "fp32")
    plain = StepCost(n_blocks * one.saved, (n_blocks - 1) * one.saved + one.peak, n_blocks * one.flops)
    if not is_trained:
        return plain, plain
    layer_inputs = n_blocks * float(patches.numel()) * patches.element_size()
    return plain, StepCost(layer_inputs, layer_inputs + one.peak, plain.flops * 4 / 3)
