"""Prompts as batches of tensors: padded, cut at `<act>`, continued by an observation."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

TEXT_KEYS = {"input_ids", "attention_mask"}


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> dict[str, Int[torch.Tensor, "b l"]]:
    """Rows of token ids as `input_ids` and `attention_mask` (b, l), padded on one side."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        positions = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, positions] = torch.tensor(row)
        mask[i, positions] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_rows(rows: Sequence[dict[str, torch.Tensor]], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Inputs per token (1, l, ...) of prompts as those of a batch (b, l, ...), padded with 0, ids with `pad_id`."""
    length, batch = max(row["input_ids"].shape[1] for row in rows), {}
    for name, first in rows[0].items():
        batch[name] = first.new_full((len(rows), length, *first.shape[2:]), pad_id if name == "input_ids" else 0)
        for values, row in zip(batch[name], rows, strict=True):
            n = row[name].shape[1]
            values[length - n if side == "left" else 0 :][:n] = row[name][0]
    return batch


def inputs_per_token(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a processor's output, what has a value for each token (b, l, ...)."""
    return {name: value for name, value in batch.items() if value.shape[:2] == batch["input_ids"].shape}


def image_token_ids(processor: Any, batch: dict[str, torch.Tensor]) -> set[int]:
    """Ids of the tokens of a prompt (1, l) at which the image's features enter."""
    candidates = [getattr(processor, "image_token_id", -1), *(getattr(processor, "image_token_ids", None) or [])]
    # one of them is the placeholder, others may mark an image's begin and end
    masks = [batch["input_ids"] == (-1 if token is None else token) for token in candidates]
    is_image = batch.get("image_embeds_position_mask", max(masks, key=torch.sum))  # KosMos-2 gives the mask itself
    return {int(batch["input_ids"][0, i]) for i in is_image[0].nonzero().flatten()}


def bos_in_first_observation(
    input_ids: Int[torch.Tensor, "b l"], bos_id: int | None, image_id: int, act_id: int
) -> Int[torch.Tensor, "b l"]:
    """Rows of interleaved observations in which a BOS that stands after the last image is moved to after the first ones.

    PaliGemma's processor writes it after the last image: earlier tokens would depend on the number of observations, and a KV
    cache could not be appended to.
    """
    moved = input_ids.clone()
    for row in moved:
        bos, acts = (row == bos_id).nonzero().flatten(), (row == act_id).nonzero().flatten()
        if len(bos) == 1 and len(acts) > 1 and acts[0] < bos[0]:
            start = int((row[: acts[0]] == image_id).nonzero()[-1]) + 1
            row[start : bos[0] + 1] = row[start : bos[0] + 1].roll(1)
    return moved


def without_tokens_after(batch: dict[str, torch.Tensor], token_id: int) -> dict[str, torch.Tensor]:
    """A processor's output, padded on the left, without the tokens after the last of this id."""
    shape, is_token = batch["input_ids"].shape, batch["input_ids"] == token_id
    end = int(is_token.nonzero()[:, 1].max()) + 1
    return {k: v[:, :end] if v.shape[:2] == shape else v for k, v in batch.items()}


def added_tokens(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs per token (1, l, ...) of the tokens by which a prompt continues another; empty if it does not begin with it."""
    start, shape = before["input_ids"].shape[1], now["input_ids"].shape
    is_continued = torch.equal(now["input_ids"][:, :start], before["input_ids"])
    return {k: v[:, start:] for k, v in now.items() if v.shape[:2] == shape} if is_continued else {}


def has_pixel_values_only(batch: dict[str, torch.Tensor]) -> bool:
    """Whether a prompt is text and unmasked pixels, without image sizes, positions or token types."""
    mask = batch.get("pixel_attention_mask")
    is_unmasked = mask is None or bool(mask.all())
    return is_unmasked and set(batch) <= {*TEXT_KEYS, "pixel_values", "pixel_attention_mask"}
