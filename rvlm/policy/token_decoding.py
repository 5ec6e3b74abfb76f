"""Greedy decoding of action tokens, one by one in the backbone's KV cache."""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def generate_tokens(
    model: Any,
    state: Float[Tensor, "b _"],
    input_ids: Int[Tensor, "b l"],
    attention_mask: Int[Tensor, "b l"],
    is_present: Bool[Tensor, " a"],
    **inputs: Any,
) -> Int[Tensor, "b N"]:
    """Tokens (b, N) of an autoregressive `VLA`'s actions, until all chunks are complete; prompts are padded on the left.

    Args:
        model: An autoregressive `VLA`.
        state: (b, s), as `VLA.conditioning` gives it.
        input_ids: (b, l).
        attention_mask: (b, l).
        is_present: Which action slots (a,) the robot has; tokens of others are those that training feeds there.
        inputs: As `VLA.backbone_forward` takes them.
    """
    b, n_tokens = len(input_ids), model.head.n_queries
    absent = model.head.absent_tokens(is_present).expand(b, -1)
    prefix_len = input_ids.shape[1] - n_tokens + 1  # up to the first <act>; the others are placeholders of later tokens
    offsets = cast(Tensor, model.action_query_embeddings(b, state)).unflatten(0, (b, n_tokens))
    prefix = {k: v[:, :prefix_len] if v.shape[:2] == input_ids.shape else v for k, v in inputs.items()}
    prefix |= {"input_ids": input_ids[:, :prefix_len], "attention_mask": attention_mask[:, :prefix_len]}
    hidden, cache = model.backbone_forward(offsets=offsets[:, 0], use_cache=True, **prefix)
    generated = [_next_tokens(model.head, hidden, absent[:, 0])]
    for i in range(1, n_tokens):
        if model.head.is_complete(torch.stack(generated, dim=1)):
            break
        end = prefix_len + i
        offset = offsets[:, i] + model.head.tokens(generated[-1])
        step = {"input_ids": input_ids[:, end - 1 : end], "attention_mask": attention_mask[:, :end]}
        for mask in {"image_attention_mask", "image_embeds_position_mask"} & inputs.keys():  # Idefics and KosMos-2 take
            step |= {mask: inputs[mask][:, end - 1 : end], "pixel_values": inputs["pixel_values"]}  # images at every step
        hidden, cache = model.backbone_forward(offsets=offset, past_key_values=cache, use_cache=True, **step)
        generated.append(_next_tokens(model.head, hidden, absent[:, i]))
    return torch.stack(generated, dim=1)


def _next_tokens(head: Any, hidden: Float[Tensor, "b d"], absent: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    return torch.where(absent < 0, head.greedy_tokens(hidden), absent)
