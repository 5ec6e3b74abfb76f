"""Prompts: images and instructions to what a vision-language model reads, with `<act>` where actions are read.

The family's own processor and chat template say how a prompt is written; the same object serves training and evaluation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from rvlm.processors import ACT, image_mark, layout, markup

ANY_SIZE = 224  # side of images for families that take any [px]


def _image_size(part: Any) -> int:
    """Side of the images that an image processor takes as they are; of one that takes any, `ANY_SIZE` or the largest [px]."""
    size = dict(part.size)
    if size.get("shortest_edge") and size.get("longest_edge"):  # then they are areas
        step = part.patch_size * part.merge_size
        return int(min(size["longest_edge"] ** 0.5, ANY_SIZE)) // step * step
    return int(next(size[k] for k in ("longest_edge", "height", "shortest_edge") if size.get(k)))


class Prompter:
    """Images and instructions to what the backbone reads; the same object serves training and evaluation.

    The text is the model's own image placeholders, the instruction, and `<act>`; further observations of the same sequence
    follow as placeholders and `<act>` alone. Where the family's processor only rescales and normalises an image of the
    model's size, which is tried once, prompts are made without it: token ids are remembered per text, pixels are two
    operations. Other families, and other sizes, go through the whole processor.

    Args:
        processor: The backbone's processor.
        n_images: Images per observation.
        n_queries: `<act>` per observation: the positions that the action head reads.
        padding_side: "right" or "left", the side on which shorter prompts are filled up.
        is_interleaved: Whether the observations of a sample share one prompt, o1 `<act>` o2 `<act>` ...

    Attributes:
        image_size: Side of the images that the model takes without resizing [px].
        layout: How the processor takes images and text (`layout`).
        image_ids: Token ids that hold the place of images; known with the first prompt.
        before, image, after: The family's own words around a prompt (`markup`).
        is_causal_by_type: Whether the family must be told by token types that no token may look ahead.

    Raises:
        ValueError: The processor takes no images with text, or one image a prompt and more are asked for.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        n_images: int,
        n_queries: int = 1,
        padding_side: str = "right",
        is_interleaved: bool = False,
    ) -> None:
        self.processor, self.n_images, self.n_queries = processor, n_images, n_queries
        self.padding_side, self.is_interleaved = padding_side, is_interleaved
        self.is_causal_by_type = False
        self.image_size = _image_size(processor.image_processor)
        self.layout = layout(processor, self.image_size)
        self.before, self.image, self.after = markup(processor) if self.layout == "marked" else ("", image_mark(processor), "")
        if self.layout == "first" and (n_images > 1 or is_interleaved):
            raise ValueError(
                f"expected one image a prompt, for {type(processor).__name__} sets it before the text itself; got {n_images} an "
                f"observation{', interleaved' * is_interleaved}; take one camera, with structure 'one_step' or 'policy_head'"
            )
        self.image_ids: set[int] = set()
        self._ids: dict[tuple[str, int], list[int]] = {}

    @functools.cached_property
    def _n_axes(self) -> int:
        """Axes of the processor's `pixel_values` where `_scaled` makes the same; 0 where it does not."""
        noise = np.random.default_rng(0).integers(0, 256, (1, self.n_images, self.image_size, self.image_size, 3), np.uint8)
        whole = self._processed(noise, [""], [1])
        if set(whole) - {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}:
            return 0
        ours, theirs = self._scaled(noise), whole["pixel_values"]
        is_same = ours.numel() == theirs.numel() and torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-5)
        return theirs.ndim if is_same else 0

    def _processed(self, images: np.ndarray, instructions: Sequence[str], n_steps: Sequence[int]) -> dict[str, torch.Tensor]:
        process: Any = self.processor
        rows = np.split(images, np.cumsum(n_steps)[:-1])
        queries, options = ACT * self.n_queries, {"padding": True, "padding_side": self.padding_side, "return_tensors": "pt"}
        if self.layout == "marked":
            texts = [self.text(text, n) for text, n in zip(instructions, n_steps, strict=True)]
            batch = dict(process(images=[[image for step in row for image in step] for row in rows], text=texts, **options))
        elif self.layout == "listed":
            steps = [
                zip(row, [text + queries, *[queries] * (len(row) - 1)], strict=True)
                for row, text in zip(rows, instructions, strict=True)
            ]
            batch = dict(process(text=[[part for seen, said in row for part in (*seen, said)] for row in steps], **options))
        else:
            process.tokenizer.padding_side = self.padding_side  # KosMos-2 looks nowhere else
            texts = [text + queries for text in instructions]
            batch = dict(process(images=[row[0, 0] for row in rows], text=texts, **options))
        batch.pop("labels", None)
        if self.padding_side == "left":  # what a family says behind the last <act> is not said, for more may follow there
            shape, is_act = batch["input_ids"].shape, batch["input_ids"] == process.tokenizer.convert_tokens_to_ids(ACT)
            end = int(is_act.nonzero()[:, 1].max()) + 1
            batch = {k: v[:, :end] if v.shape[:2] == shape else v for k, v in batch.items()}
        if self.is_causal_by_type:
            batch["token_type_ids"] = torch.ones_like(batch["token_type_ids"])
        return batch

    def _scaled(self, images: np.ndarray) -> torch.Tensor:
        """Images (b, n, h, w, 3) uint8, rescaled and normalised: (b, n, 3, h, w) float32."""
        part = self.processor.image_processor
        scale = part.rescale_factor / np.asarray(part.image_std, np.float32)
        shift = np.asarray(part.image_mean, np.float32) / np.asarray(part.image_std, np.float32)
        channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
        return channels_first * torch.tensor(scale, dtype=torch.float32)[:, None, None] - torch.tensor(shift)[:, None, None]

    @property
    def sees_pixels_alone(self) -> bool:
        """Whether all that the family is given of an image is its pixels: then its features can be kept beside the text."""
        return bool(self._n_axes)

    def is_plain(self, images: np.ndarray) -> bool:
        """Whether prompts of these images (..., h, w, 3) are made without the processor."""
        return images.shape[-3:-1] == (self.image_size, self.image_size) and self.sees_pixels_alone

    def text(self, instruction: str, n_steps: int = 1) -> str:
        """The prompt of `n_steps` observations as text, before the processor expands the image placeholders."""
        images, queries = self.image * self.n_images, ACT * self.n_queries
        return f"{self.before}{images}{instruction}{self.after}{queries}" + (images + queries) * (n_steps - 1)

    def token_ids(self, instruction: str, n_steps: int = 1) -> list[int]:
        """Token ids of the prompt of `n_steps` observations, image placeholders expanded by the processor itself.

        Raises:
            ValueError: The instruction itself holds `<act>` or an image placeholder.
        """
        if (instruction, n_steps) not in self._ids:
            mark = image_mark(self.processor)
            if ACT in instruction or mark in instruction:
                raise ValueError(
                    f"expected an instruction in words, got {instruction!r}; {ACT} and {mark} are the prompt's own: take them out"
                )
            blank = np.zeros((n_steps, self.n_images, self.image_size, self.image_size, 3), np.uint8)
            whole = self._processed(blank, [instruction], [n_steps])
            self._ids[instruction, n_steps] = ids = whole["input_ids"][0].tolist()
            is_image = whole["input_ids"] == getattr(self.processor, "image_token_id", -1)
            where = whole.get("image_embeds_position_mask", is_image)  # KosMos-2 says it by a mask
            self.image_ids = {ids[i] for i in where[0].nonzero().flatten()}
        return self._ids[instruction, n_steps]

    def ribbon(self, instruction: str, n_steps: int = 1) -> tuple[list[str], list[str]]:
        """Tokens of the prompt of `n_steps` observations as texts, and the kind of each, for `rvlm.plots.token_map`.

        Proprioception has no token of its own: it is added to the embedding of `<act>`.
        """
        tokenizer, ids = self.processor.tokenizer, self.token_ids(instruction, n_steps)
        kinds = {**dict.fromkeys(self.image_ids, "image"), tokenizer.convert_tokens_to_ids(ACT): "action"}
        special = dict.fromkeys(tokenizer.added_tokens_decoder, "other")
        return tokenizer.convert_ids_to_tokens(ids), [{**special, **kinds}.get(i, "instruction") for i in ids]

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """What the processor's image part makes of (b, n, h, w, 3) uint8 RGB: float32, in the shape that the family takes."""
        if not self.is_plain(images):
            whole = self.processor.image_processor([list(sample) for sample in images], return_tensors="pt")["pixel_values"]
            return whole if isinstance(whole, torch.Tensor) else torch.cat([torch.as_tensor(part) for part in whole])
        scaled = self._scaled(images)
        return scaled if self._n_axes == scaled.ndim else scaled.flatten(0, 1)

    def __call__(
        self, images: np.ndarray, instructions: Sequence[str], n_steps: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Batch of prompts.

        Args:
            images: (m, n_images, h, w, 3) uint8 RGB of all observations, those of one prompt side by side.
            instructions: b texts.
            n_steps: Observations of each prompt; one each if left out.

        Returns:
            `input_ids`, `attention_mask` (b, l) int64, `pixel_values`, and what else the family takes.
        """
        n_steps = [1] * len(instructions) if n_steps is None else list(n_steps)
        if not self.is_plain(images):
            return self._processed(images, instructions, n_steps)
        return {**self.tokens(instructions, n_steps), "pixel_values": self.pixels(images)}

    def tokens(self, instructions: Sequence[str], n_steps: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """The text half of a batch: `input_ids` and `attention_mask` (b, l)."""
        n_steps = [1] * len(instructions) if n_steps is None else n_steps
        rows = [self.token_ids(text, n) for text, n in zip(instructions, n_steps, strict=True)]
        return pad(rows, self.processor.tokenizer.pad_token_id, self.padding_side)


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Token id rows of different lengths as `input_ids` and `attention_mask` (b, l), padded on one side."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
