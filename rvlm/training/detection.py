"""Stage 0: the vision tower learns to see before it meets language, as every vision-language model's tower does.

Large models start from a tower trained on image-text pairs (SigLIP, CLIP). Ours starts by detecting what the renderer
knows to be there: for every image token, which things lie in its cell, where exactly, and of what shape.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from rvlm.envs.tabletop.rendered_scenes import FIXTURES
from rvlm.envs.tabletop.scene import COLORS, SHAPES
from rvlm.vlm.backbones import vision_modules
from rvlm.vlm.prompts import PromptBuilder

CLASSES = (*COLORS, *FIXTURES)  # what is detected: objects by color, and fixtures
SCENE_STATES = ("drawer", "light", "gripper")  # states of the scene, read from all tokens together
N_OUT = 3 * len(CLASSES) + len(COLORS) * len(SHAPES)


def targets(record: dict, camera: str, side: int) -> dict[str, np.ndarray]:
    """What stands in each of side x side cells of an image, row by row.

    Returns:
        `presence` (cells, things) in {0, 1}; `offset` (cells, things, 2) of a thing from its cell's middle, in cells,
        in [-0.5, 0.5]; `shape` (cells, colors) as an index, -100 where there is none.
    """
    presence = np.zeros((side * side, len(CLASSES)), np.float32)
    offset = np.zeros((side * side, len(CLASSES), 2), np.float32)
    shape = np.full((side * side, len(COLORS)), -100)
    for name, place in zip(record["names"], np.asarray(record[camera]), strict=True):
        thing = name if name in FIXTURES else name.split()[0]
        if thing not in CLASSES or not ((place > 0) & (place < 1)).all():
            continue
        column, row = (place * side).astype(int)
        cell, index = row * side + column, CLASSES.index(thing)
        presence[cell, index] = 1
        offset[cell, index] = place * side - (column, row) - 0.5
        if thing in COLORS:
            shape[cell, index] = SHAPES.index(name.split()[1])
    return {"presence": presence, "offset": offset, "shape": shape}


class Detector(nn.Module):
    """A linear read-out of a backbone's image tokens; only the tower and the connector are worth keeping afterwards."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self._backbone = [backbone]  # in a list, so that only the tower and the connector are this module's weights
        self.vision = nn.ModuleList(vision_modules(backbone))
        width = backbone.config.get_text_config().hidden_size
        self.tokens, self.flags = nn.Linear(width, N_OUT), nn.Linear(width, len(SCENE_STATES))

    def forward(
        self, pixel_values: torch.Tensor, presence: torch.Tensor, offset: torch.Tensor, shape: torch.Tensor, flags: torch.Tensor
    ) -> ModelOutput:
        """Loss on a batch of scenes.

        Args:
            pixel_values: (b, 2, 3, h, w), static image then wrist.
            presence: (b, 2, cells, things) in {0, 1}.
            offset: (b, 2, cells, things, 2), in cells.
            shape: (b, 2, cells, colors), an index or -100.
            flags: (b, flags) in {0, 1}.
        """
        features = torch.cat(list(self._backbone[0].model.get_image_features(pixel_values, return_dict=True).pooler_output))
        features = features.view(*presence.shape[:3], -1)
        n = len(CLASSES)
        found, place, kind = self.tokens(features).split((n, 2 * n, len(COLORS) * len(SHAPES)), dim=-1)
        detection = F.binary_cross_entropy_with_logits(found, presence) * n
        error = (place.unflatten(-1, (n, 2)) - offset).abs().sum(-1)
        offset_loss = (error * presence).sum() / presence.sum().clamp(min=1)
        kind_loss = F.cross_entropy(kind.reshape(-1, len(SHAPES)), shape.reshape(-1), ignore_index=-100)
        flag_loss = F.binary_cross_entropy_with_logits(self.flags(features[:, 0].mean(1)), flags)
        losses = {"presence_loss": detection, "offset_loss": offset_loss, "shape_loss": kind_loss, "flag_loss": flag_loss}
        return ModelOutput(loss=detection + 3 * offset_loss + 0.5 * kind_loss + 0.5 * flag_loss, **losses)

    def save_pretrained(self, folder: Any) -> None:
        """Keep the backbone; the read-out has done its work."""
        self._backbone[0].save_pretrained(folder)


class DetectionCollator:
    """Scenes to the batch that `Detector.forward` takes."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompt_builder, self.side = PromptBuilder(processor, 2), round(processor.image_seq_len**0.5)

    def __call__(self, scenes: Sequence[tuple[np.ndarray, dict]]) -> dict[str, torch.Tensor]:
        """Batch of scenes, each its images (2, h, w, 3) uint8 and its record."""
        found = [[targets(record, camera, self.side) for camera in ("static", "wrist")] for _, record in scenes]
        batch = {k: torch.from_numpy(np.stack([[t[k] for t in pair] for pair in found])) for k in found[0][0]}
        flags = [[r["drawer"], r["light"], r["opening"] > 0.06] for _, r in scenes]
        return {
            **batch,
            "flags": torch.tensor(flags).float(),
            "pixel_values": self.prompt_builder.pixels(np.stack([i for i, _ in scenes])),
        }
