"""Prompts: images and instructions to what a vision-language model reads, with `<act>` where actions are read.

The family's own processor and chat template say how a prompt is written; the same object serves training and evaluation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from rvlm.vlm.processors import ACT, detect_input_format, knowing_images, pictures, side_of_images
from rvlm.vlm.templates import Chat, any_of, mark_of, special_words

MOST_KEPT = 4096  # instructions whose token ids are remembered
TEXT = {"input_ids", "attention_mask"}
WORDS = "lift it"  # an instruction to try a processor with

Images = np.ndarray | Sequence[np.ndarray]  # of observations: one array (m, n_images, h, w, 3), or a list where sizes differ


class PromptBuilder:
    """Images and instructions to what the backbone reads; the same object serves training and evaluation.

    The text is the turn of a user as the model's chat template writes it, images and instruction, up to where the answer begins,
    and `<act>`; further observations of the same sequence follow as images and `<act>` alone, their words as the template writes
    them behind those before (it may number them: the first image of the second observation of two cameras is the third).
    Where the family's processor only rescales and normalises an image of the model's size, which is tried once, prompts are made
    without it: token ids are remembered per text, pixels are two operations. Other families, and other sizes, go through the
    whole processor, and all that it gives is handed on.

    Args:
        processor: The backbone's processor.
        n_images: Images per observation.
        n_queries: `<act>` per observation: the positions that the action head reads.
        padding_side: "right" or "left", the side on which shorter prompts are filled up.
        is_interleaved: Whether the observations of a sample share one prompt, o1 `<act>` o2 `<act>` ...

    Attributes:
        image_size: Side of the images that the model takes without resizing [px].
        layout: How the processor takes images and text (`detect_input_format`).
        image_ids: Token ids that hold the place of images; known with the first prompt.
        is_causal_by_type: Whether the family must be told by token types that no token may look ahead.

    Raises:
        ValueError: The processor takes no images with text, one image a prompt and more are asked for, or its chat template
            cannot be used.
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
        self.image_size = side_of_images(processor)
        self.layout = detect_input_format(processor, self.image_size)
        if self.layout == "first" and (n_images > 1 or is_interleaved):
            raise ValueError(
                f"expected one image a prompt, for {type(processor).__name__} sets it before the text itself; got {n_images} an "
                f"observation{', interleaved' * is_interleaved}; take one camera, with structure 'one_step' or 'policy_head'"
            )
        self.chat = Chat(processor, n_images) if self.layout == "marked" else None
        if self.chat is not None and is_interleaved:
            self.chat.images(n_images, 2 * n_images)
        self.image_ids: set[int] = set()
        self._special = any_of([mark_of(processor), *special_words(processor.tokenizer)])
        self._of_text = knowing_images(processor)
        self._ids: dict[tuple[str, int], list[int]] = {}
        self._is_separable: dict[tuple[int, ...], bool] = {}
        self._first, self._options = "", {}
        if self.layout == "marked":
            self._first, self._options = self._beginning()

    def _beginning(self) -> tuple[str, dict[str, bool]]:
        """What to take off the text, and what to tell the tokenizer, for a prompt to begin with one token of its beginning."""
        word, text = self.processor.tokenizer.bos_token, self.text(WORDS)
        if word is None:
            return "", {}
        bos, most, seen = self.processor.tokenizer.convert_tokens_to_ids(word), max(1, text.count(word)), self._blank(1)
        ways: list[tuple[str, dict[str, bool]]] = [("", {}), ("", {"add_special_tokens": False}), (word, {})]
        for self._first, self._options in ways:
            if self._processed(seen, [WORDS], [1], self._of_text)["input_ids"][0].tolist().count(bos) <= most:
                return self._first, self._options
        raise ValueError(
            f"expected one {word} at the beginning of a prompt, got more of {type(self.processor).__name__}: its template, its "
            "tokenizer and its own code each write one; take it out of the chat template"
        )

    def _blank(self, n_steps: int) -> np.ndarray:
        return np.zeros((n_steps, self.n_images, self.image_size, self.image_size, 3), np.uint8)

    @functools.cached_property
    def _plain(self) -> dict[str, torch.Tensor]:
        """What the processor makes of an image of the model's size, where `_scaled` makes the same pixels; else nothing."""
        noise = np.random.default_rng(0).integers(0, 256, self._blank(1).shape, np.uint8)
        whole = self._processed(noise, [WORDS], [1])
        if not _are_pixels_alone(whole):
            return {}
        ours, theirs = self._scaled(noise), whole["pixel_values"]
        is_same = ours.numel() == theirs.numel() and torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-5)
        return whole if is_same else {}

    def _processed(
        self, images: Images, instructions: Sequence[str], n_steps: Sequence[int], process: Any = None
    ) -> dict[str, torch.Tensor]:
        process, observations = process or self.processor, iter(images)
        rows = [[pictures(next(observations)) for _ in range(n)] for n in n_steps]
        queries, options = ACT * self.n_queries, {"padding": True, "padding_side": self.padding_side, "return_tensors": "pt"}
        if self.layout == "marked":
            texts = [self.text(text, n).replace(self._first, "", 1) for text, n in zip(instructions, n_steps, strict=True)]
            seen = [[image for step in row for image in step] for row in rows]
            batch = dict(process(images=seen, text=texts, **options, **self._options))
        elif self.layout == "listed":
            steps = [
                zip(row, [text + queries, *[queries] * (len(row) - 1)], strict=True)
                for row, text in zip(rows, instructions, strict=True)
            ]
            batch = dict(process(text=[[part for seen, said in row for part in (*seen, said)] for row in steps], **options))
        else:
            process.tokenizer.padding_side = self.padding_side  # KosMos-2 looks nowhere else
            texts = [text + queries for text in instructions]
            batch = dict(process(images=[row[0][0] for row in rows], text=texts, **options))
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
        """Whether all that the family is given of an image of the model's size is its pixels."""
        return self.is_separable(self.image_size, self.image_size)

    def is_separable(self, height: int, width: int) -> bool:
        """Whether images of this size [px] become pixels beside a text that does not depend on them; tried once a size.

        Then their features can be computed once and kept. Not so where a family cuts wide images into tiles, fills them up, or
        counts their rows and columns.
        """
        if (height, width) not in self._is_separable:
            shape = (1, self.n_images, height, width, 3)
            whole = self._processed(np.random.default_rng(0).integers(0, 256, shape, np.uint8), [WORDS], [1])
            own = self._processed(self._blank(1), [WORDS], [1])
            self._is_separable[height, width] = (
                _are_pixels_alone(whole)
                and torch.equal(whole["input_ids"], own["input_ids"])
                and whole["pixel_values"].shape == own["pixel_values"].shape
            )
        return self._is_separable[height, width]

    def can_skip_processor(self, images: Images) -> bool:
        """Whether prompts of these images are made without the processor."""
        shapes = {image.shape[-3:-1] for image in images}
        return shapes == {(self.image_size, self.image_size)} and bool(self._plain)

    def text(self, instruction: str, n_steps: int = 1) -> str:
        """The prompt of `n_steps` observations as text, before the processor expands the image words.

        Raises:
            ValueError: The instruction holds a special token, such as `<act>` or an image's.
        """
        found = self._special.search(instruction)
        if found:
            raise ValueError(
                f"expected an instruction in words, got {instruction!r}; {found.group()} is the prompt's own: take it out"
            )
        n, queries = self.n_images, ACT * self.n_queries
        if self.chat is None:
            image = mark_of(self.processor) * n
            return f"{image}{instruction}{queries}" + (image + queries) * (n_steps - 1)
        words = self.chat.images(n, n * n_steps)
        later = ["".join(words[n * i : n * (i + 1)]) + queries for i in range(n_steps - 1)]
        return self.chat(instruction, n) + queries + "".join(later)

    def token_ids(self, instruction: str, n_steps: int = 1) -> list[int]:
        """Token ids of the prompt of `n_steps` observations of images of the model's size, expanded by the processor itself.

        Raises:
            ValueError: As `text`.
        """
        ids = self._ids.pop((instruction, n_steps), None) or self._tokenized(instruction, n_steps)
        self._ids[instruction, n_steps] = ids  # the last one asked for stands last
        if len(self._ids) > MOST_KEPT:
            self._ids.pop(next(iter(self._ids)))
        return list(ids)

    def _tokenized(self, instruction: str, n_steps: int) -> list[int]:
        self.text(instruction)
        whole = self._processed(self._blank(n_steps), [instruction], [n_steps], self._of_text)
        process: Any = self.processor
        names = [getattr(process, "image_token_id", -1), *(getattr(process, "image_token_ids", None) or [])]
        # one of them holds places, others may stand around them
        by_name = [whole["input_ids"] == (-1 if name is None else name) for name in names]
        where = whole.get("image_embeds_position_mask", max(by_name, key=torch.sum))  # KosMos-2 says it by a mask
        self.image_ids = {int(whole["input_ids"][0, i]) for i in where[0].nonzero().flatten()}
        return whole["input_ids"][0].tolist()

    def token_roles(self, instruction: str, n_steps: int = 1) -> tuple[list[str], list[str]]:
        """Tokens of the prompt of `n_steps` observations as texts, and the kind of each, for `rvlm.report.plots.token_map`.

        Proprioception has no token of its own: it is added to the embedding of `<act>`.
        """
        tokenizer, ids = self.processor.tokenizer, self.token_ids(instruction, n_steps)
        kinds = {**dict.fromkeys(self.image_ids, "image"), tokenizer.convert_tokens_to_ids(ACT): "action"}
        special = dict.fromkeys(tokenizer.added_tokens_decoder, "other")
        return tokenizer.convert_ids_to_tokens(ids), [{**special, **kinds}.get(i, "instruction") for i in ids]

    def vision_inputs(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Pixels of images (n, m, h, w, 3) uint8, or features (n, m, tokens, d) of a frozen tower as they are."""
        if images.dtype == np.uint8:
            return {"pixel_values": self.pixels(images)}
        return {"image_features": torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))}

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """What the processor makes of images (b, n, h, w, 3) uint8 RGB: float32, in the shape that the family takes.

        Raises:
            ValueError: The text depends on images of this size, so that their pixels mean nothing without it (`is_separable`).
        """
        if self.can_skip_processor(images):
            scaled = self._scaled(images)
            return scaled if self._plain["pixel_values"].ndim == scaled.ndim else scaled.flatten(0, 1)
        height, width = images.shape[-3:-1]
        if not self.is_separable(height, width):
            raise ValueError(
                f"expected images that {type(self.processor).__name__} takes as whole pictures, got {height} x {width}, which it "
                f"cuts into tiles, fills up, or places in rows and columns; resize them to {self.image_size} x {self.image_size} "
                "or give them with their text"
            )
        return self._processed(images, [WORDS] * len(images), [1] * len(images))["pixel_values"]

    def __call__(
        self, images: Images, instructions: Sequence[str], n_steps: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Batch of prompts.

        Args:
            images: (m, n_images, h, w, 3) uint8 RGB of all observations, those of one prompt side by side; or a list of m, where
                they have several sizes.
            instructions: b texts.
            n_steps: Observations of each prompt; one each if left out.

        Returns:
            `input_ids`, `attention_mask` (b, l) int64, `pixel_values`, and what else the family's processor gives.
        """
        n_steps = [1] * len(instructions) if n_steps is None else list(n_steps)
        if not self.can_skip_processor(images):
            return self._processed(images, instructions, n_steps)
        batch = {**self.tokens(instructions, n_steps), "pixel_values": self.pixels(np.asarray(images))}
        if "pixel_attention_mask" in self._plain:
            shape = batch["pixel_values"].select(-3, 0).shape
            batch["pixel_attention_mask"] = self._plain["pixel_attention_mask"].new_ones(()).expand(shape)
        return batch

    def tokens(self, instructions: Sequence[str], n_steps: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """The text half of a batch: `input_ids` and `attention_mask` (b, l)."""
        n_steps = [1] * len(instructions) if n_steps is None else n_steps
        rows = [self.token_ids(text, n) for text, n in zip(instructions, n_steps, strict=True)]
        return pad(rows, self.processor.tokenizer.pad_token_id, self.padding_side)


def _are_pixels_alone(batch: dict[str, torch.Tensor]) -> bool:
    """Whether a prompt is text and whole pixels: no sizes, places or types, and no mask that leaves pixels out."""
    mask = batch.get("pixel_attention_mask")
    is_whole = mask is None or bool(mask.all())
    return is_whole and set(batch) <= {*TEXT, "pixel_values", "pixel_attention_mask"}


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
