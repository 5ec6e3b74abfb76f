"""What is read at `<act>` of a frozen backbone: computed once per frame, so that a training step runs history and head alone.

The weights that are trained are those that a backbone at every step gives.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from rvlm.caches import Code
from rvlm.files import config_hash
from rvlm.training.feature_cache import FRAMES_PER_BATCH, array_hash, cached_arrays, hash_of_network, write_batches
from rvlm.training.stages import Stage
from rvlm.vlm.hidden_states import action_query_states
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.quantization import compute_device, dtype_of

OBSERVATIONS_CODE = Code(("rvlm.training.frozen_backbone",))
ROWS_PER_FILE = 4096  # so that processes share the work, and a killed one loses little of it


def why_at_every_step(stage: Stage, model: Any, n_rows: int, is_one_text: bool) -> str | None:
    """Why the backbone must run at every step of a robot stage; None if what is read at `<act>` can be computed once.

    Args:
        stage: The stage.
        model: Its policy.
        n_rows: Frames that it trains on.
        is_one_text: Whether all frames of an episode have the same instruction.
    """
    policy, random = model.config, ", ".join(random_settings(model.backbone))
    n_read = stage.n_samples * policy.n_obs_steps
    reasons = {
        f"finetuning={stage.finetuning!r} trains the backbone": stage.finetuning != "head",
        "the state enters at <act>": policy.has_state,
        "a learned embodiment token enters at <act>": policy.embodiment_conditioning == "token",
        f"head {policy.head!r} has trained query embeddings": policy.head in ("tokens", "fast"),
        "an action expert attends to every token": policy.head == "expert",
        "several layers of the backbone are mixed by trained weights": policy.vlm_layers is not None,
        f"structure {policy.structure!r} reads the whole window in one sequence": policy.structure == "interleaved",
        "images are augmented": bool(stage.augment),
        f"instructions are {stage.instructions}": stage.instructions == "paraphrased",
        "it is trained on questions too": bool(stage.vqa_data),
        f"the backbone is random in training: {random}": bool(random),
        "an instruction changes within an episode": policy.n_obs_steps > 1 and not is_one_text,
        f"the budget reads {n_read} observations, fewer than the {n_rows} frames": n_read < n_rows,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def random_settings(backbone: PreTrainedModel) -> list[str]:
    """What makes a backbone's output in training another one than in evaluation: dropout, stochastic depth, batch statistics."""
    norms = {type(module).__name__ for module in backbone.modules() if isinstance(module, _BatchNorm)}
    return [*_random_settings_of(backbone.config.to_dict()), *sorted(norms)]


def _random_settings_of(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in ((str(name), value) for name, value in config.items()):
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _random_settings_of(value))
        elif ("drop" in name or "jitter" in name) and isinstance(value, int | float) and value > 0:
            yield f"{name}={value}"


@dataclasses.dataclass(frozen=True)
class FeaturesOfRows:
    """Features of some rows of a dataset, indexed by row.

    Attributes:
        rows: Sorted.
        files: Of `ROWS_PER_FILE` rows each, in their order.
    """

    rows: Int[np.ndarray, " n"]
    files: Sequence[Float[np.ndarray, "_ d"]]

    def __getitem__(self, rows: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b d"]:
        """Features (..., d) of rows (...)."""
        file, at = np.divmod(np.searchsorted(self.rows, rows), ROWS_PER_FILE)
        out = np.empty((*rows.shape, self.files[0].shape[-1]), self.files[0].dtype)
        for i in np.unique(file):
            out[file == i] = self.files[i][at[file == i]]
        return out


def observation_features(
    backbone: Any,
    act_id: int,
    prompt_builder: PromptBuilder,
    frames: Sequence[UInt8[np.ndarray, "n h w 3"]],
    rows: Int[np.ndarray, " m"],
    texts: Sequence[str],
    precision: str,
) -> FeaturesOfRows:
    """Hidden states at `<act>` of a dataset's rows, float32, cached on disk; the backbone is moved to this process's device.

    Args:
        backbone: Vision-language model, frozen.
        act_id: Id of `<act>`.
        prompt_builder: Of the policy.
        frames: Of each camera, in the order of the prompt's images.
        rows: Sorted.
        texts: Instruction of each of them.
        precision: Of the computation: "fp32", "bf16" or "fp16".

    Raises:
        FloatingPointError: Features are NaN or infinite.
    """
    parts = {str(i): (rows[i : i + ROWS_PER_FILE], texts[i : i + ROWS_PER_FILE]) for i in range(0, len(rows), ROWS_PER_FILE)}
    made_from = {
        "frames": [array_hash(images) for images in frames],
        "backbone": hash_of_network(backbone, prompt_builder.processor, [backbone]),
        "precision": precision,
        "code": OBSERVATIONS_CODE.hash,
    }
    settings = {
        name: {**made_from, "rows": array_hash(rows_of), "prompts": _hash_of_prompts(prompt_builder, texts_of)}
        for name, (rows_of, texts_of) in parts.items()
    }
    backbone.to(compute_device())

    def write(name: str, path: Path) -> None:
        prompts = _prompts(prompt_builder, frames, *parts[name])
        batches = (_states_at_act(backbone, act_id, batch, dtype_of(precision)) for batch in prompts)
        write_batches(path, (len(parts[name][0]),), batches, np.float32)

    return FeaturesOfRows(rows, list(cached_arrays(settings, OBSERVATIONS_CODE, write).values()))


def _prompts(
    prompt_builder: PromptBuilder, frames: Sequence[np.ndarray], rows: np.ndarray, texts: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    for i in range(0, len(rows), FRAMES_PER_BATCH):
        at = slice(i, i + FRAMES_PER_BATCH)
        yield prompt_builder(np.stack([images[rows[at]] for images in frames], axis=1), texts[at])


@torch.inference_mode()
def _states_at_act(
    backbone: Any, act_id: int, prompts: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Float[np.ndarray, "n d"]:
    """Hidden states at `<act>`, computed as a training step computes them."""
    inputs: dict[str, Any] = {name: value.to(backbone.device) for name, value in prompts.items()}
    with torch.autocast(backbone.device.type, dtype, enabled=dtype != torch.float32):
        hidden, _ = action_query_states(backbone, act_id, **inputs)
    return hidden.float().cpu().numpy()


def _hash_of_prompts(prompt_builder: PromptBuilder, texts: Sequence[str]) -> str:
    """Hash of the token ids of each text, and of the processor's class, which may change them with the images."""
    distinct = sorted(set(texts))
    index = {text: i for i, text in enumerate(distinct)}
    ids = [prompt_builder.token_ids(text) for text in distinct]
    processor = type(prompt_builder.processor).__name__
    return config_hash({"ids": ids, "text_of_row": [index[text] for text in texts], "processor": processor})
