"""What a training step needs, before anything is downloaded: parameters, memory and time, from configurations alone.

The language model's own code runs forwards and backwards on tensors without data, which tells what it would keep for the way
back and how much it would compute. Source: bytes of 4-bit NormalFloat with double quantisation, QLoRA (Dettmers et al. 2023,
arXiv 2305.14314), section 3; what is kept when layers are computed again, Chen et al. 2016 (arXiv 1604.06174).
"""

import copy
import dataclasses
import gc
import itertools
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from rvlm import adapters
from rvlm.actions import ActionSpec
from rvlm.backbones import language_part
from rvlm.structures import VLAConfig
from rvlm.vla import VLA

# Memory [GB], dense tensor cores [TFLOP/s] (16 bits in, 32 bits summed); source: NVIDIA's data sheets.
CARDS = {"RTX 3070": (8, 41), "T4": (16, 65), "L4": (24, 121), "L40S": (48, 362), "A100": (80, 312)}
UTILISATION = 0.35  # share of a card's peak that training reaches; an assumption
CONTEXT = 0.8e9  # what a GPU's driver and libraries take before anything is computed [byte]; an assumption
STATE = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}  # bytes for each trained one
FOUR_BITS = (4 + 0.127) / 8  # bytes of a parameter with its share of the constants of quantisation
SHAPES = Path(__file__).parent / "assets" / "shapes.json"  # configurations of models on the Hub


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs.

    Attributes:
        parameters: Of the whole policy.
        trained: Of these, how many learn.
        weights, gradients, optimizer, activations: [byte]; `activations` is what is kept for the way back.
        passing: Most that is there at a time on both ways, beside weights and optimizer [byte]: activations are freed as
            gradients are made, and some room is worked in.
        flops: Floating point operations, forwards and backwards.
    """

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    passing: float
    flops: float

    @property
    def peak(self) -> float:
        """Most memory at a time [byte]."""
        return self.weights + self.optimizer + self.passing

    def fits(self, card: str) -> bool:
        """Whether a card of `CARDS` holds it."""
        return self.peak + CONTEXT < CARDS[card][0] * 1e9

    def seconds(self, card: str) -> float:
        """Of a step on a card of `CARDS`, at the assumed utilisation [s]."""
        return self.flops / (CARDS[card][1] * 1e12 * UTILISATION)


def shapes() -> dict[str, tuple[PreTrainedConfig, int]]:
    """Models on the Hub by name: configuration, and tokens of an image. Source: named in the file, for each."""
    told = json.loads(SHAPES.read_text())
    return {name: (AutoConfig.for_model(**copy.deepcopy(m["config"])), m["n_image_tokens"]) for name, m in told.items()}


def plan(
    config: PreTrainedConfig,
    n_image_tokens: int,
    policy: dict[str, Any],
    *,
    tuning: str = "full",
    rank: int = 16,
    batch_size: int = 8,
    n_words: int = 24,
    precision: str = "bf16",
    optimizer: str = "adamw_torch_fused",
    is_checkpointed: bool = False,
) -> Plan:
    """What a training step needs.

    Args:
        config: Of the vision-language model; nothing else of it is read.
        n_image_tokens: Tokens of an image in its prompt, as `rvlm.probe.probe` tells.
        policy: Fields of `VLAConfig`: structure, head, window.
        tuning: What of the backbone learns (`rvlm.checkpoints.tune`).
        rank: Of adapters.
        batch_size: Windows that are computed at once.
        n_words: Tokens of an instruction with all that stands around it.
        precision: "fp32", "bf16" or "fp16", of what is computed.
        optimizer: Name in `STATE`.
        is_checkpointed: Whether layers are computed again on the way back.

    Raises:
        ValueError: An optimizer of which it is not known what it keeps, or a family that is built otherwise.
    """
    return _both(config, n_image_tokens, policy, tuning, rank, batch_size, n_words, precision, optimizer)[is_checkpointed]


def _both(
    config: PreTrainedConfig,
    n_image_tokens: int,
    policy: dict[str, Any],
    tuning: str = "full",
    rank: int = 16,
    batch_size: int = 8,
    n_words: int = 24,
    precision: str = "bf16",
    optimizer: str = "adamw_torch_fused",
) -> tuple[Plan, Plan]:
    """Plans without and with layers computed again, from one pass; arguments as `plan` takes them."""
    if optimizer not in STATE:
        raise ValueError(f"no optimizer {optimizer!r} in the plan; there are {', '.join(STATE)}")
    if (
        config.is_encoder_decoder
        or not hasattr(getattr(config, "vision_config", None), "patch_size")
        or config.get_text_config() is config
    ):
        raise ValueError(
            f"expected a vision transformer before a decoder, got {config.model_type!r}; measure a step of it instead: "
            "rvlm.trainer.rehearse(stage)"
        )
    model, four_bits = _on_paper(config, policy, tuning, rank)
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
    borders = language.num_hidden_layers * rows * length * language.hidden_size * (4 if tuning == "full" else half)
    one_layer = kept / language.num_hidden_layers  # with what enters each, all that is there of the pass when it is taken again
    passes = (kept, most, flops), (borders + one_layer, borders + one_layer + most - kept, flops * 4 / 3)
    held = {
        "parameters": n_trained + sum(frozen.values()),
        "trained": n_trained,
        "weights": 4 * n_trained + FOUR_BITS * small + wide * (4 if tuning == "full" else half),
        "gradients": 4.0 * n_trained,
        "optimizer": float(STATE[optimizer] * n_trained),
    }
    towers = _vision_tower(config, batch_size * t * n_cameras, precision, learns=tuning == "full")
    plain, again = (
        Plan(
            **held,
            activations=kept + seen,
            passing=max(most + seen, held["gradients"] + most_seen),
            flops=flops + looked,
        )
        for (kept, most, flops), (seen, most_seen, looked) in zip(passes, towers, strict=True)
    )
    return plain, again


def compare(
    models: Mapping[str, tuple[PreTrainedConfig, int]], tunings: Sequence[str], policy: dict[str, Any], **settings: Any
) -> pd.DataFrame:
    """Plans of several models, each trained in several ways, with and without layers computed again.

    Args:
        models: Name -> configuration, tokens of an image; as `shapes` gives them.
        tunings: As `plan` takes them.
        policy: As `plan` takes it.
        settings: Others of `plan`.

    Returns:
        Columns `model`, `tuning`, `is_checkpointed`, `trained [M]`, `weights`, `optimizer`, `passing` and `peak` [GB], `card`
        (the smallest of `CARDS` that holds it, or "none"), `step [s]` on that card.
    """
    rows = []
    made = {
        (name, tuning, again): one
        for (name, (config, n_tokens)), tuning in itertools.product(models.items(), tunings)
        for again, one in enumerate(_both(config, n_tokens, policy, tuning, **settings))
    }
    for (name, tuning, again), one in made.items():
        card = next((card for card in CARDS if one.fits(card)), "none")
        size = {part: getattr(one, part) / 1e9 for part in ("weights", "optimizer", "passing", "peak")}
        seconds = one.seconds(card) if card in CARDS else float("nan")
        what = {"model": name, "tuning": tuning, "is_checkpointed": bool(again), "trained [M]": one.trained / 1e6}
        rows.append({**what, **size, "card": card, "step [s]": seconds})
    return pd.DataFrame(rows)


def _on_paper(config: PreTrainedConfig, policy: dict[str, Any], tuning: str, rank: int) -> tuple[Any, set[int]]:
    """A policy without data, and which of its weights would be held in 4 bits."""
    from rvlm.checkpoints import tune

    spec = ActionSpec.from_card("tabletop_franka7").to_dict()
    whole = VLAConfig(backbone=config.to_dict(), spec=spec, stats={}, **policy)
    with torch.device("meta"):
        model = VLA(whole, adapters.skeleton(config))
    decoder = language_part(model.backbone)
    linear = {id(m.weight) for m in decoder.modules() if isinstance(m, torch.nn.Linear)} if tuning == "qlora" else set()
    if tuning in ("full", "head"):
        return tune(model, tuning, rank, None), linear
    adapters.attach(model.backbone, "dora" if tuning == "dora" else "lora", rank, 0)
    return model, linear


def _language_model(model: Any, rows: int, length: int, precision: str) -> tuple[float, float, float]:
    """As `_both_ways`, of the decoder over so many sequences of one length."""
    decoder = language_part(model.backbone)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake(decoder, dtype)
        words = torch.zeros(rows, length, model.backbone.config.get_text_config().hidden_size, requires_grad=True)
        return _both_ways(decoder, lambda: decoder(inputs_embeds=words, use_cache=False).last_hidden_state, precision != "fp32")


class _Peak(TorchDispatchMode):
    """Follows how many bytes are alive of all that is made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, n_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= n_bytes


def _both_ways(model: torch.nn.Module, call: Callable[[], Any], is_mixed: bool) -> tuple[float, float, float]:
    """Bytes that a pass forwards keeps for the way back, most bytes alive at a time on both ways, and operations.

    Weights are left out, their gradients are not.
    """
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        _Peak() as followed,
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        out = call()
        if out.requires_grad:
            out.sum().backward()
    return float(sum(kept.values())), float(followed.peak), float(counter.get_total_flops())


def _fake(model: torch.nn.Module, frozen: torch.dtype) -> None:
    """Give weights without data a device; inside a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                made = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else frozen)
                module._parameters[name] = torch.nn.Parameter(made, p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)


def _vision_tower(
    config: PreTrainedConfig, n_images: int, precision: str, learns: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """As `_both_ways`, of the tower, without and with blocks computed again; told by one block in its size, of SigLIP's kind."""
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
        kept, most, flops = _both_ways(layer, lambda: layer(patches, attention_mask=None), precision != "fp32")
    plain = n_blocks * kept, (n_blocks - 1) * kept + most, n_blocks * flops
    if not learns:
        return plain, plain
    borders = n_blocks * float(patches.numel()) * patches.element_size()
    return plain, (borders, borders + most, plain[2] * 4 / 3)


def measure(step: Callable[[], Any], held: float) -> dict[str, float]:
    """Peak memory and time of a training step, on the device where it runs.

    Args:
        step: One whole step, optimizer included; it is taken twice before it is measured.
        held: What lies there between steps: weights and optimizer [byte]; counted where only changes can be measured (CPU).

    Returns:
        `peak` [byte] and `seconds`.
    """
    for _ in range(2):
        step()
    gc.collect()
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return {"peak": float(torch.cuda.max_memory_allocated()), "seconds": time.perf_counter() - start}
    step()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results: Any = profiled.profiler
    events = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    return {"peak": held + max(itertools.accumulate(n for _, n in events)), "seconds": seconds}
