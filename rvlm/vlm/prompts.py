"""Prompts: images and instructions as inputs of a vision-language model, with `<act>` where the action head reads.

The family's own processor and chat template write the prompt; one object does it for training and evaluation.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from transformers import ProcessorMixin

from rvlm.vlm import prompt_batches as batches
from rvlm.vlm.processor_shortcut import ProcessorShortcut, find_shortcut, is_same_batch
from rvlm.vlm.processors import ACT, detect_image_size, detect_input_format, to_pil, with_cached_images
from rvlm.vlm.prompt_batches import TEXT_KEYS, inputs_per_token, pad_rows
from rvlm.vlm.templates import ChatTemplate, image_token, special_tokens, token_pattern

MAX_CACHED_PROMPTS = 4096
EXAMPLE_INSTRUCTION = "lift it"  # to try a processor with

Images = UInt8[np.ndarray, "m n h w 3"] | Sequence[UInt8[np.ndarray, "n _ _ 3"]]  # of m observations; a list if sizes differ


class PromptBuilder:
    """Images and instructions as the backbone's inputs.

    The text is a user's turn (images and instruction) in the model's chat template, up to where the answer begins, and `<act>`.
    Further observations of the sequence follow as the image tokens that the template would write next (it may number them) and
    `<act>`. If the processor only rescales, normalises and reorders the pixels of images of a size, which is tried once, prompts
    are made without it, bit for bit the same: pixels are looked up, and the text is kept. Its outputs are all passed on.

    Args:
        processor: The backbone's processor.
        n_images: Images per observation.
        n_queries: `<act>` per observation: the positions that the action head reads.
        padding_side: "right" or "left".
        is_interleaved: Whether the observations of a sample share one prompt, o1 `<act>` o2 `<act>` ...

    Attributes:
        image_size: Side of the images that the model takes without resizing [px].
        input_format: How the processor takes images and text (`detect_input_format`).
        image_token_ids: Ids of image tokens; empty before the first prompt.
        is_causal_by_type: Whether token types make all of the prompt causal, in families that have such types.

    Raises:
        ValueError: The processor takes no images with text, takes only one per prompt, or its chat template cannot be used.
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
        self.image_size = detect_image_size(processor)
        self.input_format = detect_input_format(processor, self.image_size)
        if self.input_format == "image_first" and (n_images > 1 or is_interleaved):
            raise ValueError(
                f"expected one image a prompt, which {type(processor).__name__} puts before the text; got {n_images} an "
                f"observation{', interleaved' * is_interleaved}; take one camera, with structure 'one_step' or 'policy_head'"
            )
        self.template = ChatTemplate(processor, n_images) if self.input_format == "placeholder" else None
        if self.template is not None and is_interleaved:
            self.template.image_markup(n_images, 2 * n_images)
        self.image_token_ids: set[int] = set()
        self._special_pattern = token_pattern([image_token(processor), *special_tokens(processor.tokenizer)])
        self._text_processor = with_cached_images(processor)
        self._known: dict[tuple, dict[str, torch.Tensor]] = {}
        self._shortcuts: dict[tuple[int, int], ProcessorShortcut | None] = {}
        self._continuations: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self._is_separable: dict[tuple[int, ...], bool] = {}
        self._extra_bos, self._bos_options = "", {}
        if self.input_format == "placeholder":
            self._extra_bos, self._bos_options = self._find_single_bos()

    def _find_single_bos(self) -> tuple[str, dict[str, bool]]:
        """The BOS token to remove from the text, and the tokenizer's options, for a prompt to have no duplicate of it."""
        tokenizer = self.processor.tokenizer
        bos, text, images = tokenizer.bos_token, self.text(EXAMPLE_INSTRUCTION), self._black_images(1)
        if bos is None:
            return "", {}
        options: list[tuple[str, dict[str, bool]]] = [("", {}), ("", {"add_special_tokens": False}), (bos, {})]
        for self._extra_bos, self._bos_options in options:
            ids = self._run_processor(images, [EXAMPLE_INSTRUCTION], [1], self._text_processor)["input_ids"][0].tolist()
            if ids.count(tokenizer.convert_tokens_to_ids(bos)) <= max(1, text.count(bos)):
                return self._extra_bos, self._bos_options
        raise ValueError(
            f"expected one {bos} at the beginning of a prompt, got more of {type(self.processor).__name__}: its template, its "
            "tokenizer and its own code each write one; take it out of the chat template"
        )

    def _black_images(self, n_steps: int, *size: int) -> np.ndarray:
        return np.zeros((n_steps, self.n_images, *(size or (self.image_size, self.image_size)), 3), np.uint8)

    def shortcut(self, images: Images) -> ProcessorShortcut | None:
        """The way around the processor for these images, if they have one size and there is one; searched once a size."""
        size, *others = {image.shape[-3:-1] for image in images}
        if others:
            return None
        if size not in self._shortcuts:
            self._shortcuts[size] = self._find_shortcut(*size)
        return self._shortcuts[size]

    def _find_shortcut(self, height: int, width: int) -> ProcessorShortcut | None:
        """A shortcut for images of this size [px] that gives the processor's output for three prompts with noise, bit for bit."""
        example = self._text_batch(EXAMPLE_INSTRUCTION, 1, height, width)
        shortcut = find_shortcut(self._example_prompts, example, self.n_images, height, width)
        depends_on_images = any(value.ndim > 2 for value in inputs_per_token(example).values())
        if shortcut is None or (self.is_interleaved and depends_on_images):  # of which prompts then have different numbers
            return None
        n_steps, texts = [1 + self.is_interleaved] * 3, [EXAMPLE_INSTRUCTION, "lift", EXAMPLE_INSTRUCTION * 3]
        noise = np.random.default_rng(1).integers(0, 256, self._black_images(sum(n_steps), height, width).shape, np.uint8)
        ours, theirs = self._assemble(shortcut, noise, texts, n_steps), self._run_processor(noise, texts, n_steps)
        return shortcut if is_same_batch(ours, theirs) else None

    def _example_prompts(self, images: UInt8[np.ndarray, "m n h w 3"]) -> dict[str, torch.Tensor]:
        """The processor's output for m observations with the example's instruction."""
        return self._run_processor(images, [EXAMPLE_INSTRUCTION] * len(images), [1] * len(images))

    def _assemble(
        self, shortcut: ProcessorShortcut, images: Images, instructions: Sequence[str], n_steps: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """A batch of prompts without the processor."""
        size, pad_id = images[0].shape[-3:-1], self.processor.tokenizer.pad_token_id
        rows = [self._inputs_per_token(text, n, *size) for text, n in zip(instructions, n_steps, strict=True)]
        return self._causal(pad_rows(rows, pad_id, self.padding_side)) | shortcut(np.asarray(images))

    def _run_processor(
        self, images: Images, instructions: Sequence[str], n_steps: Sequence[int], processor: Any = None
    ) -> dict[str, torch.Tensor]:
        """Batch of prompts from the family's processor; with left padding, tokens after the last `<act>` are dropped."""
        processor, remaining = processor or self.processor, iter(images)
        samples = [[to_pil(next(remaining)) for _ in range(n)] for n in n_steps]
        if self.input_format == "image_first":
            processor.tokenizer.padding_side = self.padding_side  # KosMos-2 ignores the option
        options = {"padding": True, "padding_side": self.padding_side, "return_tensors": "pt"}
        batch = dict(processor(**self._processor_inputs(samples, instructions), **options))
        batch.pop("labels", None)
        tokenizer = processor.tokenizer
        image_id, act_id = tokenizer.convert_tokens_to_ids([image_token(processor), ACT])
        if max(n_steps) > 1:
            batch["input_ids"] = batches.bos_in_first_observation(batch["input_ids"], tokenizer.bos_token_id, image_id, act_id)
        if self.padding_side == "left":
            batch = batches.without_tokens_after(batch, act_id)
        return self._causal(batch)

    def _causal(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch | ({"token_type_ids": torch.ones_like(batch["token_type_ids"])} if self.is_causal_by_type else {})

    def _processor_inputs(self, samples: Sequence[Sequence[list]], instructions: Sequence[str]) -> dict[str, Any]:
        """Samples (PIL images of each observation) and instructions in the processor's `input_format`."""
        queries, pairs = ACT * self.n_queries, list(zip(samples, instructions, strict=True))
        if self.input_format == "placeholder":
            texts = [self.text(text, len(sample)).replace(self._extra_bos, "", 1) for sample, text in pairs]
            return {"images": [list(itertools.chain(*sample)) for sample in samples], "text": texts, **self._bos_options}
        if self.input_format == "image_first":
            return {"images": [sample[0][0] for sample in samples], "text": [text + queries for text in instructions]}
        steps = [[[*sample[0], text + queries], *([*images, queries] for images in sample[1:])] for sample, text in pairs]
        return {"text": [list(itertools.chain(*parts)) for parts in steps]}

    def is_separable(self, height: int, width: int) -> bool:
        """Whether images of this size [px] leave the text as it is and become pixels alone; tried once a size.

        Their features can then be cached. False where a family tiles or pads them, or encodes their rows and columns.
        """
        if (height, width) not in self._is_separable:
            noise = np.random.default_rng(0).integers(0, 256, (1, self.n_images, height, width, 3), np.uint8)
            resized, native = self._example_prompts(noise), self._example_prompts(self._black_images(1))
            self._is_separable[height, width] = (
                batches.has_pixel_values_only(resized)
                and torch.equal(resized["input_ids"], native["input_ids"])
                and resized["pixel_values"].shape == native["pixel_values"].shape
            )
        return self._is_separable[height, width]

    def text(self, instruction: str, n_steps: int = 1) -> str:
        """The prompt of `n_steps` observations as text, before the processor expands the image tokens.

        Raises:
            ValueError: The instruction contains a special token, such as `<act>` or an image's.
        """
        found = self._special_pattern.search(instruction)
        if found:
            raise ValueError(
                f"expected an instruction in words, got {instruction!r}; {found.group()} is a special token: take it out"
            )
        n, queries = self.n_images, ACT * self.n_queries
        if self.template is None:
            image = image_token(self.processor) * n
            return f"{image}{instruction}{queries}" + (image + queries) * (n_steps - 1)
        markup = self.template.image_markup(n, n * n_steps)
        later = ["".join(markup[n * i : n * (i + 1)]) + queries for i in range(n_steps - 1)]
        return self.template(instruction, n) + queries + "".join(later)

    def token_ids(self, instruction: str, n_steps: int = 1) -> list[int]:
        """Token ids of a prompt of `n_steps` observations with images of the model's size, image tokens expanded.

        Raises:
            ValueError: As `text`.
        """
        return self._inputs_per_token(instruction, n_steps, self.image_size, self.image_size)["input_ids"][0].tolist()

    def _inputs_per_token(self, instruction: str, n_steps: int, *size: int) -> dict[str, torch.Tensor]:
        """Inputs per token (1, l, ...) of a prompt of `n_steps` observations with images of this height and width [px]; kept."""
        key = (instruction, n_steps, size, self.is_causal_by_type)
        inputs = self._known.pop(key, None)
        if inputs is None:
            self.text(instruction)
            batch = self._text_batch(instruction, n_steps, *size)
            self.image_token_ids, inputs = batches.image_token_ids(self.processor, batch), inputs_per_token(batch)
        self._known[key] = inputs  # most recently used last
        if len(self._known) > MAX_CACHED_PROMPTS:
            self._known.pop(next(iter(self._known)))
        return inputs

    def _text_batch(self, instruction: str, n_steps: int, *size: int) -> dict[str, torch.Tensor]:
        """The processor's output for a prompt with black images, of the model's size or of this height and width [px]."""
        return self._run_processor(self._black_images(n_steps, *size), [instruction], [n_steps], self._text_processor)

    def continuation(self, n_steps: int, height: int, width: int) -> dict[str, Int[torch.Tensor, "1 l ..."]]:
        """What the last of `n_steps` observations, with images of this size [px], adds to a prompt, whatever its instruction.

        Returns:
            `input_ids` (1, l) of l tokens and the family's other inputs per token, such as types; empty if others change too.
        """
        key = (n_steps, height, width)
        if key not in self._continuations:
            prompts = [self._text_batch(EXAMPLE_INSTRUCTION, n, height, width) for n in (n_steps - 1, n_steps)]
            self._continuations[key] = batches.added_tokens(*prompts)
        return self._continuations[key]

    def token_roles(self, instruction: str, n_steps: int = 1) -> tuple[list[str], list[str]]:
        """Tokens of the prompt of `n_steps` observations, and each one's role, for `rvlm.report.plots.tokens.token_map`.

        Roles: "image", "instruction", "action" or "other". Proprioception is added to the embedding of `<act>`.
        """
        tokenizer, ids = self.processor.tokenizer, self.token_ids(instruction, n_steps)
        roles = dict.fromkeys(tokenizer.added_tokens_decoder, "other") | dict.fromkeys(self.image_token_ids, "image")
        roles[tokenizer.convert_tokens_to_ids(ACT)] = "action"
        return tokenizer.convert_ids_to_tokens(ids), [roles.get(i, "instruction") for i in ids]

    def vision_inputs(
        self, images: UInt8[np.ndarray, "n m h w 3"] | Float[np.ndarray, "n m p d"]
    ) -> dict[str, Float[torch.Tensor, "..."]]:
        """`pixel_values` of images (n, m, h, w, 3) uint8, or `image_features` from cached ones (n, m, tokens, d)."""
        if images.dtype == np.uint8:
            return {"pixel_values": self.pixels(images)}
        return {"image_features": torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))}

    def pixels(self, images: UInt8[np.ndarray, "b n h w 3"]) -> Float[torch.Tensor, "..."]:
        """`pixel_values` of images (b, n, h, w, 3) uint8 RGB: float32, in the family's own shape.

        Raises:
            ValueError: The text depends on images of this size (`is_separable`).
        """
        height, width = images.shape[-3:-1]
        if not self.is_separable(height, width):
            raise ValueError(
                f"expected images that {type(self.processor).__name__} processes without the text, got {height} x {width}, which "
                f"it tiles, pads, or encodes in rows and columns; resize them to {self.image_size} x {self.image_size} "
                "or give them with their text"
            )
        return (self.shortcut(images) or self._example_prompts)(images)["pixel_values"]

    def __call__(
        self, images: Images, instructions: Sequence[str], n_steps: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Batch of prompts.

        Args:
            images: RGB of all m observations, prompt by prompt; a list of m arrays (n_images, h, w, 3) if sizes differ.
            instructions: b texts.
            n_steps: Observations of each prompt; default one each.

        Returns:
            `input_ids`, `attention_mask` (b, l) int64, `pixel_values`, and other outputs of the family's processor.
        """
        n_steps = [1] * len(instructions) if n_steps is None else list(n_steps)
        shortcut = self.shortcut(images)
        arguments = (images, instructions, n_steps)
        return self._assemble(shortcut, *arguments) if shortcut else self._run_processor(*arguments)

    def tokens(self, instructions: Sequence[str], n_steps: Sequence[int] | None = None) -> dict[str, Int[torch.Tensor, "b l"]]:
        """Text inputs of a batch: `input_ids` and `attention_mask` (b, l)."""
        n_steps = [1] * len(instructions) if n_steps is None else n_steps
        side, pairs = self.image_size, zip(instructions, n_steps, strict=True)
        rows = [{k: self._inputs_per_token(text, n, side, side)[k] for k in TEXT_KEYS} for text, n in pairs]
        return pad_rows(rows, self.processor.tokenizer.pad_token_id, self.padding_side)
