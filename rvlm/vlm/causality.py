"""Whether a vision-language model's attention is causal over its prompt, found by trying."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rvlm.vlm.hidden_states import action_query_states
from rvlm.vlm.prompts import PromptBuilder


def ensure_causal_attention(model: PreTrainedModel, prompt_builder: PromptBuilder, act_id: int) -> bool:
    """Make prefix-LM families (bidirectional attention within the prompt) causal by token types; tried with one prompt.

    Args:
        model: Vision-language model.
        prompt_builder: Its `is_causal_by_type` is set.
        act_id: Id of `<act>`.

    Returns:
        Whether attention is causal over this builder's prompts.
    """
    side, n_steps = prompt_builder.image_size, 1 if prompt_builder.n_queries > 1 else 2
    blank = np.zeros((n_steps, prompt_builder.n_images, side, side, 3), np.uint8)
    was_training = model.training
    model.eval()  # dropout would be taken for an effect of later tokens
    try:
        for prompt_builder.is_causal_by_type in (False, True):
            batch = {k: v.to(model.device) for k, v in prompt_builder(blank, ["lift it"], [n_steps]).items()}
            if _is_causal(model, batch, act_id):
                return True
            if "token_type_ids" not in batch:
                break
    finally:
        model.train(was_training)
    prompt_builder.is_causal_by_type = False
    return False


@torch.inference_mode()
def _is_causal(model: PreTrainedModel, batch: dict[str, Any], act_id: int) -> bool:
    """Whether the hidden state at the first `<act>` is the same after a change to the last one's embedding."""
    n_act = int((batch["input_ids"] == act_id).sum())
    offsets = torch.zeros(n_act, model.config.get_text_config().hidden_size, device=model.device)
    before, _ = action_query_states(model, act_id, offsets=offsets, **batch)
    offsets[-1] = torch.linspace(-1, 1, offsets.shape[-1])  # not constant: a layer norm would remove that
    after, _ = action_query_states(model, act_id, offsets=offsets, **batch)
    return torch.allclose(before[0], after[0], atol=1e-5)
