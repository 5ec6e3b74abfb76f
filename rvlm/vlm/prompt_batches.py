"""Prompts as batches of tensors: padded, cut at `<act>`, continued by an observation."""

from collections.abc import Sequence

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
