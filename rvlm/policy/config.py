"""What a policy is made of: structure, head, history and window, and which of them go together.

Three structures say where history lives (RoboVLMs, arXiv 2412.14058, section on VLA formulations): nowhere ("one_step"),
in the backbone's own sequence o1 `<act>` o2 `<act>` ... ("interleaved"), or in a module that fuses the features of single
observations ("policy_head").
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from rvlm.data.normalization import NormStats
from rvlm.data.representations import REPRESENTATIONS
from rvlm.policy.action_expert import EXPERT_LAYERS
from rvlm.policy.heads import HEADS
from rvlm.policy.history_modules import HISTORIES, MAX_OBS_STEPS

FINETUNING_MODES = ("full", "head", "lora", "dora", "qlora")  # what of the backbone is trained
TOKENIZED_BY = ("head", "head_options", "chunk_size", "action_slots")  # with others, learned byte pairs mean nothing
EMBODIMENT_CONDITIONING = (None, "name", "token")
MAX_EMBODIMENTS = 32  # rows of the embodiment embedding
CONTINUOUS = ("mlp", "flow")
STRUCTURES = {  # structure -> (heads, histories) that it supports; all but "one_step" take several observations
    "one_step": ((*CONTINUOUS, "tokens", "fast", "expert"), (None,)),
    "interleaved": ((*CONTINUOUS, "expert"), (None,)),
    "policy_head": (CONTINUOUS, tuple(HISTORIES)),
}


class VLAConfig(PreTrainedConfig):
    """What a policy is made of.

    Args:
        backbone: Configuration of the vision-language model, as a dict with its `model_type`.
        action_representation: Name in `rvlm.data.representations.REPRESENTATIONS`: what the head predicts.
        structure: Name in `STRUCTURES`.
        head: Name in `HEADS`; `head_options` are its arguments by name.
        vlm_layers: Hidden layers of the backbone that are read: so many, evenly spaced up to the last, or their indices (0:
            embeddings, -1: last); None: the last, or one for each layer of an action expert. At `<act>` they are mixed by learned
            weights; of an action expert's layers each attends to one.
        history: Name in `HISTORIES`, for "policy_head" only.
        n_obs_steps: Observations that the policy sees (t).
        chunk_size: Actions that it predicts (k).
        n_action_steps: Actions of a chunk that are executed before the next prediction.
        cameras: Names of the card's cameras, in the order of the prompt's images.
        has_state: Whether proprioception enters.
        image_tiling: Whether images are split into tiles, as the vision-language model's processor does; else each is one tile.
        image_size: Height and width that images of all cameras are resized to [px]; those of the first camera's recordings if
            left out, None where that is not known.
        camera_sizes: Dataset -> camera -> height and width of the images that it was trained on [px].
        action_vocabulary: Byte pairs that head "fast" has learned from its training chunks, and the most tokens of a chunk.
        act_id: Id of `<act>`.
        action_slots: Kind, name and whether it is binary, of each dimension that the head predicts, for all its robots.
        directions: Sign of each action slot (`rvlm.policy.embodiments.slot_directions`); None in policies of before.
        state_slots: Names of the state dimensions that it takes, of all its robots.
        spec: `ActionSpec` of the robot, as a dict.
        stats: `NormStats` of "action" and "observation.state" over the training episodes, as dicts.
        embodiments: Other robots that it was trained on: dataset -> `Embodiment.to_dict`.
        embodiment_conditioning: How it knows which robot acts: None, by "name" before the instruction, or by "token", a learned
            offset of `<act>` for each robot.
        embodiment_ids: Datasets of all robots that it was trained on; the position is the index of a robot's token.
        vlm: Vision-language model that it was made of: its `name`, and the `revision` of one from the Hub.
        base_model: Of a policy that is saved without its backbone: the backbone's `name`, `revision` and `weights` (a hash), the
            `finetuning` mode, and the `precision` that it is held in.
    """

    model_type = "rvlm"
    __no_type_check__ = True  # the library builds it from more than its fields, which a checker of signatures would refuse

    backbone: dict | None = None
    action_representation: str = "recorded"
    structure: str = "one_step"
    head: str = "mlp"
    head_options: dict | None = None
    vlm_layers: int | list | tuple | None = None
    history: str | None = None
    n_obs_steps: int = 1
    chunk_size: int = 4
    n_action_steps: int = 1
    cameras: list | tuple = ("static", "wrist")
    has_state: bool = True
    image_tiling: bool = False
    image_size: list | tuple | None = None
    camera_sizes: dict | None = None
    action_vocabulary: dict | None = None
    act_id: int = 0
    action_slots: list | None = None
    directions: list | None = None
    state_slots: list | None = None
    spec: dict | None = None
    stats: dict | None = None
    embodiments: dict | None = None
    embodiment_conditioning: str | None = None
    embodiment_ids: list | None = None
    vlm: dict | None = None
    base_model: dict | None = None

    @property
    def head_arguments(self) -> dict[str, Any]:
        """Arguments of the head by name: its options, and what it has learned of the data."""
        learned = {} if self.action_vocabulary is None else {"vocabulary": self.action_vocabulary}
        return {**(self.head_options or {}), **learned}

    @property
    def relative_chunk(self) -> int | None:
        """Size of its chunks if their actions are relative to the state at their start, None if they are as recorded."""
        return self.chunk_size if self.action_representation == "relative" else None

    def with_stored_backbone(self, **settings: Any) -> "VLAConfig":
        """The same configuration without a base model, for a policy that stores its backbone, with other settings."""
        own = {name: getattr(self, name) for name in VLAConfig.__annotations__ if name != "model_type"}
        return VLAConfig(**{**own, **settings, "base_model": None})


# Not settings: derived from the backbone and the data.
DERIVED_FIELDS = {"model_type", "backbone", "act_id", "vlm", "base_model"}
DERIVED_FIELDS |= {"camera_sizes", "action_vocabulary", "action_slots", "directions", "state_slots"}
DERIVED_FIELDS |= {"spec", "stats", "embodiments", "embodiment_ids"}
POLICY_FIELDS = sorted(set(VLAConfig.__annotations__) - DERIVED_FIELDS)
AutoConfig.register(VLAConfig.model_type, VLAConfig)  # AutoConfig recognises a policy's folder


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse fields that no policy has.

    Raises:
        TypeError: An unknown setting, with those that exist.
    """
    unknown = sorted(set(settings) - set(POLICY_FIELDS), key=str)
    if unknown:
        raise TypeError(f"unknown settings {unknown}; there are {', '.join(POLICY_FIELDS)}")


def _check_tokens(config: VLAConfig) -> None:
    """Refuse tokens of actions that normalisation leaves outside of [-1, 1], to which they are clipped, of any robot."""
    robots = [config.stats, *(robot["stats"] for robot in (config.embodiments or {}).values())]
    for action in (stats["action"] for stats in robots if stats and config.head in ("tokens", "fast")):
        stats = NormStats.from_dict(action)
        reach = np.abs([stats.normalize(stats.q01), stats.normalize(stats.q99)]).max(0)
        if (furthest := np.delete(reach, stats.passthrough).max(initial=0)) > 1.01:
            raise ValueError(
                f"head {config.head!r}: expected statistics that bring 98 % of each action into [-1, 1], where tokens end, got "
                f"{furthest:.2g} by kind {stats.kind!r}; take stats(kind='q01_q99')"
            )


def check_structure(config: VLAConfig) -> None:
    """Refuse unsupported combinations.

    Raises:
        ValueError: Unknown or contradicting structure, head, history, window, embodiment or statistics, with what is possible.
    """
    histories = (None, *HISTORIES)
    for name, table in (
        ("structure", STRUCTURES),
        ("head", HEADS),
        ("history", histories),
        ("embodiment_conditioning", EMBODIMENT_CONDITIONING),
        ("action_representation", REPRESENTATIONS),
    ):
        if getattr(config, name) not in table:
            raise ValueError(f"no {name} {getattr(config, name)!r}; there are {', '.join(map(str, table))}")
    for name in ("n_obs_steps", "chunk_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is expected to be at least 1; got {getattr(config, name)}")
    if config.history == "gpt" and config.n_obs_steps > MAX_OBS_STEPS:
        raise ValueError(f"history 'gpt' is expected to hold at most {MAX_OBS_STEPS} observations; got {config.n_obs_steps}")
    if not 1 <= config.n_action_steps <= config.chunk_size:
        raise ValueError(
            f"n_action_steps is expected between 1 and the chunk of {config.chunk_size} predicted actions; "
            f"got {config.n_action_steps}"
        )
    _check_layers(config)
    _check_tokens(config)
    heads, histories = STRUCTURES[config.structure]
    is_window_right = (config.n_obs_steps == 1) == (config.structure == "one_step")
    if config.head not in heads or config.history not in histories or not is_window_right:
        raise ValueError(
            f"structure={config.structure!r}, head={config.head!r}, history={config.history!r}, "
            f"n_obs_steps={config.n_obs_steps} do not go together; there are {'; '.join(supported_combinations())}"
        )


def _check_layers(config: VLAConfig) -> None:
    layers: Any = config.vlm_layers
    if layers is None:
        return
    indices = layers if isinstance(layers, list | tuple) else range(layers) if type(layers) is int else ()
    if not indices or not all(type(i) is int for i in indices) or len(set(indices)) < len(indices):
        raise ValueError(f"vlm_layers is expected as a number from 1 on or as indices of different layers; got {layers!r}")
    n_expert = (config.head_options or {}).get("n_layers", EXPERT_LAYERS)
    if config.head == "expert" and len(indices) > n_expert:
        raise ValueError(
            f"vlm_layers is expected to name at most {n_expert} layers, one for each of the action expert's; got {layers!r}; "
            "take fewer, or more of the expert's by head_options={'n_layers': ...}"
        )


def supported_combinations() -> list[str]:
    """Every supported combination of structure, heads, histories and window, as text."""
    return [
        f"{structure} with {' or '.join(heads)}, "
        f"{'no history' if histories == (None,) else ' or '.join(map(str, histories))}, "
        f"n_obs_steps {'of 1' if structure == 'one_step' else 'from 2 on'}"
        for structure, (heads, histories) in STRUCTURES.items()
    ]
