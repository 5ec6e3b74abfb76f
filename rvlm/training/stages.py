"""`Stage`: the configuration of a training: data, initial weights and a budget.

Its folder is named by a hash of every setting, the content of the data and of the initial weights, and the code that trains.
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
from rvlm.importing import code_roots, describe, import_by_name
from rvlm.policy.config import FINETUNING_MODES, check_settings
from rvlm.vlm import quantization

STEP_DECAY = "step_decay"
_CHOICES = {
    "finetuning": FINETUNING_MODES,
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optimizer": tuple(o.value for o in OptimizerNames),
    "instructions": ("original", "paraphrased", "canonical"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup", STEP_DECAY),
}
AUGMENTATIONS = {"shift": 16, "crop": 0.5, "color": 1}  # name -> maximum
_MINIMA = {
    "n_samples": 1,
    "batch_size": 1,
    "n_processes": 1,
    "gradient_accumulation_steps": 1,
    "lora_rank": 1,
    "n_loader_workers": 0,
    "shots": 0,
    "seed": 0,
}
_MAXIMA = {"learning_rate": math.inf, "weight_decay": math.inf, "max_grad_norm": math.inf, "warmup_ratio": 1, "vqa_fraction": 1}
_MAXIMA |= {"backbone_learning_rate": math.inf, "ema_decay": 1 - 1e-9}
STAGE_KINDS = DETECTION, VISION_LANGUAGE, ROBOT = "detection", "vision_language", "robot"
_PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Modules that a training imports without using them: recording, rendering, and those of other kinds of stages.
_RECORDING = ("rvlm.data.writer", "rvlm.data.lerobot_format", "rvlm.training.cost")
_RENDERING = tuple(f"rvlm.envs.tabletop.{name}" for name in ("env", "experts", "failures", "world", "arms", "robosuite_arms"))
_POLICIES = (
    *(
        f"rvlm.policy.{name}"
        for name in ("factory", "model", "config", "heads", "history_modules", "embodiments", "collation", "inspection")
    ),
    *(f"rvlm.data.{name}" for name in ("windows", "dataset", "video", "augmentation")),
    "rvlm.training.action_vocabulary",
)
UNUSED_MODULES = {
    DETECTION: (*_RECORDING, *_RENDERING, *_POLICIES, "rvlm.training.feature_cache", "rvlm.training.frozen_backbone"),
    VISION_LANGUAGE: (*_RECORDING, *_RENDERING, *_POLICIES, "rvlm.training.detection", "rvlm.training.frozen_backbone"),
    ROBOT: (*_RECORDING, *_RENDERING, "rvlm.training.detection"),
}


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number, not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: For figures and folders.
        kind: "detection" (vision tower alone), "vision_language" (next-token loss on answers) or "robot" (action loss).
        data: Folders of scenes, or of demonstrations; of several embodiments the first is the policy's default.
        data_weights: Sampling weights of the folders of demonstrations; equal by default.
        shots: Training episodes per task (column "task" of the episodes); 0 for all.
        instructions: "original", "paraphrased" (a training paraphrase, drawn for each sample), or "canonical" (one per task).
        paraphrases: "package.module:function", instruction -> its wordings, the canonical one first; the tabletop's by default.
        allow_new_embodiment: Allow fine-tuning a policy on an embodiment that it does not know.
        vqa_data, vqa_fraction: Folders of scenes, and the fraction of VQA batches in a robot stage: co-training.
        init: Folder or Hub name of the initial weights.
        questions: "package.module:function", (record of a scene, numpy generator, **vqa) -> pairs of question and answer, for
            vision-language stages and co-training; the tabletop's by default.
        vqa: Its arguments.
        is_pretrained: False for random weights (the recipe `scratch`).
        policy: Fields of `VLAConfig`, for robot stages.
        n_samples: Budget: samples seen.
        batch_size: Global batch size: samples per optimizer step, over all processes.
        learning_rate, weight_decay, warmup_ratio: Of AdamW; `warmup_ratio` is a fraction of the steps.
        backbone_learning_rate: Of the backbone's trained weights, if it is another one.
        ema_decay: Of an exponential moving average of the trained weights, which is saved instead of them; 0 for none.
        lr_scheduler_type: "cosine", "linear", "constant_with_warmup", "step_decay" (a tenth after half of the steps, a hundredth
            after three quarters), all after warm-up; "constant" has none.
        max_grad_norm: Gradients are clipped to this norm.
        freeze_vision: Freeze vision tower and connector, and compute their features once per frame.
        finetuning: Which parts of the backbone a robot stage trains, as of `rvlm.policy.factory.set_trainable`.
        lora_rank: Of adapters.
        augment: Image augmentation: "shift", "crop", "color", as arguments of `rvlm.data.augmentation.augment`.
        seed: Of initial weights, sample order and augmentation.
        optimizer: Name in transformers: "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", ...
        gradient_accumulation_steps: Forward and backward passes per optimizer step, each on a part of a process's batch.
        gradient_checkpointing: Save only the input of each layer, and recompute the layer during backward.
        precision: Of the computation: "fp32", "bf16" or "fp16" (trained weights stay in fp32); "auto" is the machine's fastest,
            fp32 on a CPU.
        attn_implementation: How attention is computed, as `rvlm.policy.factory.make_policy` takes it.
        n_processes: Data-parallel processes; on GPUs at most one each.
        n_loader_workers: Processes, for each of these, that read and collate the next batches; by default 0 on CPUs, 4 on GPUs.

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
    questions: str = "rvlm.envs.tabletop.questions:sample_questions"
    vqa: dict[str, Any] = dataclasses.field(default_factory=lambda: {"n": 6})
    is_pretrained: bool = True
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_weights: Sequence[float] = ()
    shots: int = 0
    instructions: str = "original"
    paraphrases: str = "rvlm.envs.tabletop.tasks:paraphrases"
    allow_new_embodiment: bool = False
    vqa_data: Sequence[str] = ()
    vqa_fraction: float = 0.25
    batch_size: int = 64
    learning_rate: float = 1e-3
    backbone_learning_rate: float | None = None
    ema_decay: float = 0.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 1.0
    freeze_vision: bool = False
    finetuning: str = "full"
    lora_rank: int = 16
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    optimizer: str = "adamw_torch_fused"
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: str = "auto"
    attn_implementation: str | None = None
    n_processes: int = 2
    n_loader_workers: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("data", "data_weights", "vqa_data"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_weights()
        if self.kind not in STAGE_KINDS:
            raise ValueError(f"stage {self.name!r}: no kind {self.kind!r}; there are {', '.join(STAGE_KINDS)}")
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
        defaults = {
            "policy": {},
            "finetuning": "full",
            "attn_implementation": None,
            "backbone_learning_rate": None,
            "data_weights": (),
            "shots": 0,
            "instructions": "original",
            "vqa_data": (),
        }
        for name, value in {**defaults, "augment": {}, "allow_new_embodiment": False}.items():
            if getattr(self, name) != value and self.kind != ROBOT:
                raise ValueError(
                    f"stage {self.name!r}: {name!r} is read by {ROBOT!r} stages only, and this one is {self.kind!r}; leave it out"
                )
        self._check_augment()
        object.__setattr__(self, "augment", {name: value for name, value in self.augment.items() if value})
        if self.backbone_learning_rate is not None and self.finetuning == "head":
            raise ValueError(
                f"stage {self.name!r}: 'backbone_learning_rate' is for a backbone that is trained, not for finetuning='head'; "
                "leave it out"
            )
        if self.lora_rank != 16 and self.finetuning in ("full", "head"):
            raise ValueError(
                f"stage {self.name!r}: 'lora_rank' is for adapters only, not for finetuning={self.finetuning!r}; leave it out"
            )

    def _check_types(self) -> None:
        for name in ("data", "data_weights", "vqa_data"):
            if not isinstance(value := getattr(self, name), tuple | list):
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a tuple, got {value!r}; write ({value!r},)")
        if not self.data:
            raise ValueError(f"stage {self.name!r}: expected at least one folder in 'data', got none")
        for name in ("policy", "vqa", "augment"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"stage {self.name!r}: expected {name!r} as a dict of settings, got {value!r}")
        try:
            check_settings(self.policy)
        except TypeError as error:
            raise TypeError(f"stage {self.name!r}: 'policy' has {error}") from error
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if (name, value) != ("n_loader_workers", None) and (type(value) is not int or value < minimum):
                raise ValueError(f"stage {self.name!r}: expected {name!r} as an integer from {minimum} on, got {value!r}")
        for name, maximum in _MAXIMA.items():
            value = getattr(self, name)
            if (name, value) != ("backbone_learning_rate", None) and not (_is_finite(value) and 0 <= value <= maximum):
                raise ValueError(
                    f"stage {self.name!r}: expected {name!r} as a finite number from 0 to {maximum:g}, got {value!r}"
                )

    def _check_weights(self) -> None:
        if self.data_weights and (
            len(self.data_weights) != len(self.data) or not all(_is_finite(w) and w > 0 for w in self.data_weights)
        ):
            raise ValueError(
                f"stage {self.name!r}: expected 'data_weights' above 0, one for each of {len(self.data)} folders of data, "
                f"got {list(self.data_weights)}"
            )

    def _check_augment(self) -> None:
        for name, value in self.augment.items():
            if name not in AUGMENTATIONS:
                raise ValueError(
                    f"stage {self.name!r}: no augmentation {name!r}; there are {', '.join(AUGMENTATIONS)} (images are never "
                    "mirrored: actions, states and words such as 'left' would have to be mirrored too)"
                )
            if not _is_finite(value) or not 0 <= value <= AUGMENTATIONS[name] or (name == "shift" and value % 1):
                unit = "whole pixels" if name == "shift" else "a fraction"
                raise ValueError(f"stage {self.name!r}: expected {name} as {unit} from 0 to {AUGMENTATIONS[name]}; got {value}")
        if any(self.augment.values()) and self.freeze_vision:
            raise ValueError(
                f"stage {self.name!r}: expected no augmentation with freeze_vision=True, which caches image features; got "
                f"augment={self.augment}; leave one of them out"
            )

    @property
    def resolved_precision(self) -> str:
        """Precision on this machine: "fp32", "bf16" or "fp16"."""
        return _PRECISION_NAMES[quantization.precision()] if self.precision == "auto" else self.precision

    @property
    def training_code(self) -> Code:
        """The code that its result depends on; that of paraphrases and questions where it uses them."""
        named = [root for function in self._functions for root in code_roots(function)]
        return Code(("rvlm.training.trainer", "rvlm.vlm.quantization:precision", *named), UNUSED_MODULES[self.kind])

    @property
    def _functions(self) -> list[Any]:
        """The functions by name that it uses."""
        asks = self.kind == VISION_LANGUAGE or bool(self.vqa_data)
        used = {self.questions: asks, self.paraphrases: self.instructions != "original"}
        return [import_by_name(name) for name, is_used in used.items() if is_used]

    @property
    def folder(self) -> Path:
        """Where its result is: its name, and the hash of all that determines it; how the work is split does not count.

        Raises:
            ValueError: A folder of data is missing.
        """
        not_hashed = (
            "name",
            "questions",
            "paraphrases",
            "n_processes",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "n_loader_workers",
        )
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in not_hashed}
        content |= {"data": self._folder_hashes(self.data), "vqa_data": self._folder_hashes(self.vqa_data)}
        content |= {"functions": [describe(function) for function in self._functions]}
        content |= {"init": model_hash(self.init), "precision": self.resolved_precision, "code": self.training_code.hash}
        return artifacts_dir() / "stages" / f"{self.name}-{config_hash(content)}"

    def _folder_hashes(self, folders: Sequence[str]) -> list[str]:
        try:
            return [folder_hash(folder) for folder in folders]
        except ValueError as error:
            raise ValueError(f"stage {self.name!r}: {error}") from error
