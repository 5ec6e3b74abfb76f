"""Stage 0: detection pre-training of the vision tower, before vision-language training.

Large models start from a tower trained on image-text pairs (SigLIP, CLIP). The small one is trained on the renderer's ground
truth: for every image token, which classes lie in its cell, where exactly, and of what shape.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from rvlm.data.scenes import SceneWords
from rvlm.vlm.backbones import vision_modules
from rvlm.vlm.prompts import PromptBuilder


def classes(words: SceneWords) -> tuple[str, ...]:
    """What is detected: objects by color, and fixtures."""
    return (*words.colors, *words.fixtures)


def targets(record: dict, camera: str, side: int, words: SceneWords) -> dict[str, Shaped[np.ndarray, "cells _ ..."]]:
    """Detection targets of one image, for side x side cells in row-major order.

    Returns:
        `presence` (cells, classes) in {0, 1}; `offset` (cells, classes, 2) of an object from the cell's centre, in cells,
        in [-0.5, 0.5]; `shape` (cells, colors) as an index, -100 where there is no object.
    """
    names = classes(words)
    presence = np.zeros((side * side, len(names)), np.float32)
    offset = np.zeros((side * side, len(names), 2), np.float32)
    shape = np.full((side * side, len(words.colors)), -100)
    for name, position in zip(record["names"], np.asarray(record[camera]), strict=True):
        label = name if name in words.fixtures else name.split()[0]
        if label not in names or not ((position > 0) & (position < 1)).all():
            continue
        column, row = (position * side).astype(int)
        cell, index = row * side + column, names.index(label)
        presence[cell, index] = 1
        offset[cell, index] = position * side - (column, row) - 0.5
        if label in words.colors:
            shape[cell, index] = words.shapes.index(name.split()[1])
    return {"presence": presence, "offset": offset, "shape": shape}


class Detector(nn.Module):
    """A linear detection head on a backbone's image tokens; trains the vision tower and the connector.

    The states of a scene are predicted from the mean of all tokens of the first image.
    """

    def __init__(self, backbone: PreTrainedModel, words: SceneWords) -> None:
        super().__init__()
        self.n_classes, self.n_colors, self.n_shapes = len(classes(words)), len(words.colors), len(words.shapes)
        self._backbone = [backbone]  # in a list, so that it is no submodule
        self.vision = nn.ModuleList(vision_modules(backbone))
        width, n_out = backbone.config.get_text_config().hidden_size, 3 * self.n_classes + self.n_colors * self.n_shapes
        self.token_head, self.state_head = nn.Linear(width, n_out), nn.Linear(width, len(words.states))

    def forward(
        self,
        pixel_values: Float[torch.Tensor, "b 2 3 h w"],
        presence: Float[torch.Tensor, "b 2 cells classes"],
        offset: Float[torch.Tensor, "b 2 cells classes 2"],
        shape: Int[torch.Tensor, "b 2 cells colors"],
        scene_states: Float[torch.Tensor, "b states"],
    ) -> ModelOutput:
        """Loss on a batch of scenes.

        Args:
            pixel_values: Images of both cameras.
            presence: In {0, 1}.
            offset: In cells.
            shape: Index of a shape, or -100.
            scene_states: In {0, 1}.
        """
        features = torch.cat(list(self._backbone[0].model.get_image_features(pixel_values, return_dict=True).pooler_output))
        features = features.view(*presence.shape[:3], -1)
        n = self.n_classes
        sizes = (n, 2 * n, self.n_colors * self.n_shapes)
        class_logits, offsets, shape_logits = self.token_head(features).split(sizes, dim=-1)
        presence_loss = F.binary_cross_entropy_with_logits(class_logits, presence) * n
        error = (offsets.unflatten(-1, (n, 2)) - offset).abs().sum(-1)
        offset_loss = (error * presence).sum() / presence.sum().clamp(min=1)
        shape_loss = F.cross_entropy(shape_logits.reshape(-1, self.n_shapes), shape.reshape(-1), ignore_index=-100)
        state_loss = F.binary_cross_entropy_with_logits(self.state_head(features[:, 0].mean(1)), scene_states)
        return ModelOutput(
            loss=presence_loss + 3 * offset_loss + 0.5 * shape_loss + 0.5 * state_loss,
            presence_loss=presence_loss,
            offset_loss=offset_loss,
            shape_loss=shape_loss,
            state_loss=state_loss,
        )

    def save_pretrained(self, folder: Any) -> None:
        """Save the backbone without the detection head."""
        self._backbone[0].save_pretrained(folder)


class DetectionCollator:
    """Collates scenes to the arguments of `Detector.forward`."""

    def __init__(self, processor: ProcessorMixin, words: SceneWords) -> None:
        self.words = words
        self.prompt_builder, self.side = PromptBuilder(processor, 2), round(processor.image_seq_len**0.5)

    def __call__(self, scenes: Sequence[tuple[UInt8[np.ndarray, "2 h w 3"], dict]]) -> dict[str, Shaped[torch.Tensor, "b ..."]]:
        """Batch of scenes, each its images and its record."""
        per_image = [[targets(record, c, self.side, self.words) for c in self.words.cameras] for _, record in scenes]
        batch = {k: torch.from_numpy(np.stack([[t[k] for t in pair] for pair in per_image])) for k in per_image[0][0]}
        scene_states = [[record[state] for state in self.words.states] for _, record in scenes]
        return {
            **batch,
            "scene_states": torch.tensor(scene_states).float(),
            "pixel_values": self.prompt_builder.pixels(np.stack([i for i, _ in scenes])),
        }
