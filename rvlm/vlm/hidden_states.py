"""Hidden states of a vision-language model: at `<act>`, or at every token; of its last layer, or of several.

The action query is a special token `<act>` in the text: processor, attention and positions are the family's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from rvlm.vlm.backbones import as_encoder_outputs

Layers = int | Sequence[int] | None  # hidden layers to read: so many, evenly spaced; by index; or the last one


def action_query_states(
    model: PreTrainedModel,
    act_id: int,
    input_ids: Int[torch.Tensor, "b l"],
    offsets: Float[torch.Tensor, "m d"] | None = None,
    *,
    layers: Layers = None,
    **inputs: Any,
) -> tuple[Float[torch.Tensor, "m *v d"], Any]:
    """Hidden states at the batch's m `<act>`, row by row, from one forward pass of the base model without language-model head.

    Args:
        model: Vision-language model.
        act_id: Id of `<act>`.
        input_ids: (b, l).
        offsets: (m, d), added to the input embeddings of these `<act>`.
        layers: As of `token_states`.
        inputs: As of `token_states`, `image_features` among them.

    Returns:
        (m, d) of the last layer, or (m, v, d) of v `layers`; and the key-value cache or None.

    Raises:
        ValueError: As of `token_states`.
    """
    states, cache = token_states(model, act_id, input_ids, offsets, layers=layers, **inputs)
    at_act = [state[input_ids == act_id] for state in states]
    return at_act[0] if layers is None else torch.stack(at_act, dim=1), cache


def prompt_states(
    model: PreTrainedModel,
    act_id: int,
    input_ids: Int[torch.Tensor, "b l"],
    offsets: Float[torch.Tensor, "m d"] | None,
    attention_mask: Int[torch.Tensor, "b l"],
    *,
    layers: int | Sequence[int],
    **inputs: Any,
) -> Float[torch.Tensor, "m v l d"]:
    """Hidden states of v layers at every token up to each of the batch's m `<act>`, row by row; 0 behind it and at padding.

    Args, Raises: As of `token_states`.
    """
    states, _ = token_states(model, act_id, input_ids, offsets, attention_mask=attention_mask, layers=layers, **inputs)
    row, position = (input_ids == act_id).nonzero(as_tuple=True)
    is_before = torch.arange(input_ids.shape[1], device=input_ids.device) <= position[:, None]
    return torch.stack(states, dim=1)[row] * (is_before & attention_mask[row].bool())[:, None, :, None]


def token_states(
    model: PreTrainedModel,
    act_id: int,
    input_ids: Int[torch.Tensor, "b l"],
    offsets: Float[torch.Tensor, "m d"] | None = None,
    image_features: Float[torch.Tensor, "n p d"] | None = None,
    *,
    layers: Layers = None,
    **inputs: Any,
) -> tuple[list[Float[torch.Tensor, "b l d"]], Any]:
    """Hidden states at every token.

    Args:
        model: Vision-language model.
        act_id: Id of `<act>`.
        input_ids: (b, l).
        offsets: (m, d), added to the input embeddings of the batch's m `<act>`, row by row.
        image_features: (n, images * tokens, d) from `rvlm.vlm.backbones.vision_features`, instead of `pixel_values`.
        layers: Hidden layers to read: so many, evenly spaced up to the last; or indices (0: embeddings, -1: last); or the last.
        inputs: The backbone's other inputs: `attention_mask` (b, l), `pixel_values`, ...

    Returns:
        Of each layer (b, l, d); an encoder-decoder's are of its encoder. And the key-value cache or None.

    Raises:
        ValueError: The base model gives no hidden state per token, or has no such layer.
    """
    is_act = input_ids == act_id

    def add_offsets(module: torch.nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        return embedded if offsets is None else embedded.index_put((is_act,), offsets.to(embedded.dtype), accumulate=True)

    if layers is not None:
        inputs["output_hidden_states"] = True
    handle = model.get_input_embeddings().register_forward_hook(add_offsets)
    try:
        out = _base_forward(model, input_ids, image_features, inputs)
    finally:
        handle.remove()
    states = [_last_state(out)] if layers is None else _chosen(out.get("encoder_hidden_states", out.get("hidden_states")), layers)
    if any(state.shape[:2] != input_ids.shape for state in states):
        raise ValueError(
            f"expected hidden states at each of {tuple(input_ids.shape)} tokens, got {tuple(states[0].shape)} of "
            f"{model.config.model_type!r}, which exposes no hidden states of its text; take a family that reads images "
            "and text as one sequence, such as SmolVLM or Qwen-VL"
        )
    return states, out.get("past_key_values")


def _last_state(out: Any) -> torch.Tensor:
    hidden = out.get("encoder_last_hidden_state", out.get("last_hidden_state"))
    return out.hidden_states[-1] if hidden is None else hidden


def _chosen(hidden: Sequence[torch.Tensor], layers: int | Sequence[int]) -> list[torch.Tensor]:
    """Of the embeddings and the states of n layers, in that order."""
    n = len(hidden) - 1
    indices = [math.ceil((i + 1) * n / layers) for i in range(layers)] if isinstance(layers, int) else layers
    wrong = [i for i in indices if not -n - 1 <= i <= n]
    if wrong:
        raise ValueError(
            f"expected hidden layers from 0 (embeddings) to {n}, or from -1 (the last) down to {-n - 1}, got {wrong}"
        )
    return [hidden[i] for i in indices]


def _position_ids_after_cache(model: PreTrainedModel, input_ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Position ids for a KV-cache continuation, in families whose own would be wrong."""
    base: Any = model.base_model
    n_before = inputs["attention_mask"].cumsum(-1)[:, -input_ids.shape[1] :]
    if getattr(base, "rope_deltas", None) is not None:  # Qwen: images have positions by row and column
        first = n_before[:, :1] - 1 + base.rope_deltas
        if "image_grid_thw" not in inputs:
            return {"position_ids": (n_before - n_before[:, :1] + first).expand(3, -1, -1)}
        own = {k: inputs[k] for k in ("mm_token_type_ids", "image_grid_thw")}
        positions, deltas = base.get_rope_index(input_ids, **own)
        base.rope_deltas = base.rope_deltas + deltas
        return {"position_ids": positions + first}
    if base is model:  # KosMos-2 would count padding
        return {"position_ids": n_before + model.config.get_text_config().pad_token_id}
    return {}


def _base_forward(model: PreTrainedModel, input_ids: torch.Tensor, image_features: torch.Tensor | None, inputs: dict) -> Any:
    """The base model's output; without a cache unless asked for."""
    base: Any = model.base_model
    if base is model:  # KosMos-2's language-model head is part of its language model
        inputs |= {"output_hidden_states": True, "logits_to_keep": 1}
    if image_features is not None:
        inputs["mm_encoder_outputs"] = as_encoder_outputs(image_features)
    if inputs.get("past_key_values") is not None:
        inputs |= _position_ids_after_cache(model, input_ids, inputs)
    return base(input_ids=input_ids, **{"use_cache": False, **inputs})
