"""What a training stage is: data, a start and a budget. Its result is a folder that is named by what makes it.

That is: every setting, the content of the data and of the start, and the code that trains (`Stage.code`).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from rvlm.caches import Code
from rvlm.files import artifacts_dir, config_hash, folder_hash, model_hash
from rvlm.policy.config import FINETUNING_MODES, check_settings
from rvlm.vlm import quantization

_CHOICES = {
    "finetuning": FINETUNING_MODES,
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optimizer": tuple(o.value for o in OptimizerNames),
    "instructions": ("original", "paraphrased", "canonical"),
    "schedule": ("cosine", "linear", "constant", "constant_with_warmup", "step_decay"),
}
AUGMENTATIONS = {"shift": 16, "crop": 0.5, "color": 1}  # the most that is allowed of each
# The least, and the most, that is allowed of each.
WHOLE = {"n_samples": 1, "batch_size": 1, "n_processes": 1, "gradient_accumulation_steps": 1, "rank": 1, "shots": 0, "seed": 0}
REAL = {"learning_rate": math.inf, "weight_decay": math.inf, "max_grad_norm": math.inf, "warmup": 1, "vqa_fraction": 1}
KINDS = DETECTION, VISION_LANGUAGE, ROBOT = "detection", "vision_language", "robot"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# What is imported on the way to a training and not used by it: recorders, what renders scenes, and what only other kinds need.
_RECORDING = ("rvlm.data.writer", "rvlm.data.lerobot_format", "rvlm.training.cost")
_RENDERING = tuple(f"rvlm.envs.tabletop.{name}" for name in ("env", "experts", "failures", "world", "arms", "real_arms"))
_POLICIES = (
    *(
        f"rvlm.policy.{name}"
        for name in ("checkpoints", "model", "config", "heads", "histories", "embodiments", "collation", "inspection")
    ),
    *(f"rvlm.data.{name}" for name in ("windows", "dataset", "video", "augmentation")),
)
UNUSED = {
    DETECTION: (*_RECORDING, *_RENDERING, *_POLICIES, "rvlm.training.features"),
    VISION_LANGUAGE: (*_RECORDING, *_RENDERING, *_POLICIES, "rvlm.training.detection"),
    ROBOT: (*_RECORDING, *_RENDERING, "rvlm.training.detection"),
}


def is_real(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: What it is called in figures and folders.
        kind: "detection" (the vision tower alone), "vision_language" (next-token loss on answers) or "robot" (action loss).
        data: Folders of scenes, or of demonstrations; of several robots the first is the one that the policy is for.
        weights: Share of each folder of demonstrations among the samples; equal if left out.
        shots: Training episodes of each task family that are used; 0 for all.
        instructions: "original", "paraphrased" (any training paraphrase, drawn for each sample), or "canonical" (one a task).
        allow_new_embodiment: Whether a policy is meant to move to a robot that it was not for.
        vqa_data, vqa_fraction: Folders of scenes, and the share of a robot stage's batches that ask about them: co-training.
        init: Folder or Hub name that the weights come from.
        vqa: Arguments of `questions.sample_questions`, for vision-language stages and co-training.
        is_pretrained: False draws random weights instead (the recipe `scratch`).
        policy: Fields of `VLAConfig`, for robot stages.
        n_samples: Budget: samples seen.
        batch_size: Samples per optimizer step, over all processes.
        learning_rate, weight_decay, warmup: Of AdamW; `warmup` is a fraction of the steps.
        schedule: Of the learning rate behind its warm-up: "cosine", "linear", "constant_with_warmup", or "step_decay" (a tenth
            after half of the steps, a hundredth after three quarters); "constant" has no warm-up.
        max_grad_norm: Gradients are clipped to this norm.
        freeze_vision: Keep vision tower and connector as they are and compute their features once per frame.
        finetuning: What of the backbone learns in a robot stage (`checkpoints.set_trainable`); all that stands around it does.
        rank: Of adapters.
        augment: What is varied in images, and how much: "shift", "crop", "color", as `rvlm.data.augmentation.augment` takes them.
        seed: Of weights, order and augmentation.
        optimizer: Name of transformers: "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", ...
        gradient_accumulation_steps: Parts in which a process works through its share of a batch, one after another.
        gradient_checkpointing: Keep only what enters each layer, and compute the layer again on the way back.
        precision: "fp32", "bf16" or "fp16" for what is computed (weights that learn stay in fp32); "auto" is what the machine is
            fastest in, fp32 on a CPU.
        n_processes: Data-parallel processes; on GPUs no more than one each.

    Example:
        >>> stage = rvlm.Stage(
        ...     "fine-tuning", "robot", data=("demonstrations",), init="vlm", n_samples=256, policy={"head": "mlp"}
        ... )
        >>> stage.folder.name.startswith("fine-tuning-")
        True
    """

    name: str
    kind: str
    data: Sequence[str]
    init: str
    n_samples: int
    vqa: dict[str, Any] = dataclasses.field(default_factory=lambda: {"n": 6})
    is_pretrained: bool = True
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Sequence[float] = ()
    shots: int = 0
    instructions: str = "original"
    allow_new_embodiment: bool = False
    vqa_data: Sequence[str] = ()
    vqa_fraction: float = 0.25
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.03
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    freeze_vision: bool = False
    finetuning: str = "full"
    rank: int = 16
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    optimizer: str = "adamw_torch_fused"
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: str = "auto"
    n_processes: int = 2

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in ("data", "weights", "vqa_data"):  # lists, where it was read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_weights()
        if self.kind not in KINDS:
            raise ValueError(f"stage {self.name!r}: no kind {self.kind!r}; there are {', '.join(KINDS)}")
        if self.n_samples < self.batch_size:
            raise ValueError(
                f"stage {self.name!r}: expected n_samples of at least one batch of {self.batch_size}; got {self.n_samples}"
            )
        if self.batch_size % (self.n_processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"stage {self.name!r}: expected a batch_size that {self.n_processes} processes can share evenly, "
                f"each in {self.gradient_accumulation_steps} part(s); got {self.batch_size}"
            )
        for name, possible in _CHOICES.items():
            if getattr(self, name) not in possible:
                raise ValueError(f"stage {self.name!r}: no {name} {getattr(self, name)!r}; there are {', '.join(possible)}")
        usual = {
            "policy": {},
            "finetuning": "full",
            "weights": (),
            "shots": 0,
            "instructions": "original",
            "vqa_data": (),
            "augment": {},
        }
        for name, value in {**usual, "allow_new_embodiment": False}.items():
            if getattr(self, name) != value and self.kind != ROBOT:
                raise ValueError(
                    f"stage {self.name!r}: {name!r} is read by {ROBOT!r} stages only, and this one is {self.kind!r}; leave it out"
                )
        self._check_augment()
        object.__setattr__(self, "augment", {name: most for name, most in self.augment.items() if most})
        if self.rank != 16 and self.finetuning in ("full", "head"):
            raise ValueError(
                f"stage {self.name!r}: 'rank' is read with adapters only, not with finetuning={self.finetuning!r}; leave it out"
            )

    def _check_kinds(self) -> None:
        for name in ("data", "weights", "vqa_data"):
            if not isinstance(value := getattr(self, name), tuple | list):
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a tuple, got {value!r}; write ({value!r},)")
        if not self.data:
            raise ValueError(f"stage {self.name!r}: expected at least one folder in 'data' to learn from, got none")
        for name in ("policy", "vqa", "augment"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a dict of settings, got {value!r}")
        try:
            check_settings(self.policy)
        except TypeError as error:
            raise TypeError(f"stage {self.name!r}: 'policy' has {error}") from error
        for name, least in WHOLE.items():
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a whole number from {least} on, got {value!r}")
        for name, most in REAL.items():
            if not is_real(value := getattr(self, name)) or not 0 <= value <= most:
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a finite number from 0 to {most:g}, got {value!r}")

    def _check_weights(self) -> None:
        if self.weights and (len(self.weights) != len(self.data) or not all(is_real(w) and w > 0 for w in self.weights)):
            raise ValueError(
                f"stage {self.name!r}: expected 'weights' above 0, one for each of {len(self.data)} folders of data, "
                f"got {list(self.weights)}"
            )

    def _check_augment(self) -> None:
        for name, most in self.augment.items():
            if name not in AUGMENTATIONS:
                raise ValueError(
                    f"stage {self.name!r}: no augmentation {name!r}; there are {', '.join(AUGMENTATIONS)} (images are never "
                    "mirrored: actions, states and words such as 'left' would have to be mirrored too)"
                )
            if not is_real(most) or not 0 <= most <= AUGMENTATIONS[name] or (name == "shift" and most % 1):
                kind = "whole pixels" if name == "shift" else "a share"
                raise ValueError(f"stage {self.name!r}: expected {name} as {kind} from 0 to {AUGMENTATIONS[name]}; got {most}")
        if any(self.augment.values()) and self.freeze_vision:
            raise ValueError(
                f"stage {self.name!r}: expected images as they are with freeze_vision=True, which keeps their features; got "
                f"augment={self.augment}; leave one of them out"
            )

    @property
    def computes_in(self) -> str:
        """Its precision on this machine: "fp32", "bf16" or "fp16"."""
        return PRECISIONS[quantization.precision()] if self.precision == "auto" else self.precision

    @property
    def code(self) -> Code:
        """The code that its result depends on; the tabletop's only where it words instructions anew or asks about scenes."""
        asks = self.kind != ROBOT or self.vqa_data or self.instructions != "original"
        return Code(
            ("rvlm.training.trainer", "rvlm.vlm.quantization:precision"), (*UNUSED[self.kind], *(() if asks else ("rvlm.envs",)))
        )

    @property
    def folder(self) -> Path:
        """Where its result is: its name, and the hash of all that makes it, except who shares the work.

        Raises:
            ValueError: Data that it is to learn from is not there.
        """
        shared = ("name", "n_processes", "gradient_accumulation_steps", "gradient_checkpointing")
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in shared}
        content |= {"data": self._content_of(self.data), "vqa_data": self._content_of(self.vqa_data)}
        content |= {"init": model_hash(self.init), "precision": self.computes_in, "code": self.code.hash}
        return artifacts_dir() / "stages" / f"{self.name}-{config_hash(content)}"

    def _content_of(self, folders: Sequence[str]) -> list[str]:
        try:
            return [folder_hash(folder) for folder in folders]
        except ValueError as error:
            raise ValueError(f"stage {self.name!r}: {error}") from error
