"""Whether a vision-language model reads its prompt in order, found out by trying it."""

import numpy as np
import torch
from transformers import PreTrainedModel

from rvlm.vlm.backbones import action_query_states
from rvlm.vlm.prompts import PromptBuilder


def ensure_causal_attention(model: PreTrainedModel, prompter: PromptBuilder, act_id: int) -> bool:
    """Have a family that lets a prompt's tokens see each other read it in order, by token types; tried with one prompt.

    Args:
        model: Vision-language model.
        prompter: Told by `is_causal_by_type` what was found out.
        act_id: Id of `<act>`.

    Returns:
        Whether the model reads in order now.
    """
    side, n_steps = prompter.image_size, 1 if prompter.n_queries > 1 else 2
    blank = np.zeros((n_steps, prompter.n_images, side, side, 3), np.uint8)
    was_training = model.training
    model.eval()  # dropout would read as looking ahead
    try:
        for prompter.is_causal_by_type in (False, True):
            batch = {k: v.to(model.device) for k, v in prompter(blank, ["lift it"], [n_steps]).items()}
            if _is_in_order(model, batch, act_id):
                return True
            if "token_type_ids" not in batch:
                break
    finally:
        model.train(was_training)
    prompter.is_causal_by_type = False
    return False


@torch.inference_mode()
def _is_in_order(model: PreTrainedModel, batch: dict[str, torch.Tensor], act_id: int) -> bool:
    """Whether what is read at the first `<act>` stays the same when the last one changes."""
    n_act = int((batch["input_ids"] == act_id).sum())
    offsets = torch.zeros(n_act, model.config.get_text_config().hidden_size, device=model.device)
    before, _ = action_query_states(model, act_id, offsets=offsets, **batch)
    offsets[-1] = torch.linspace(-1, 1, offsets.shape[-1])  # no constant: a layer norm would not see it
    after, _ = action_query_states(model, act_id, offsets=offsets, **batch)
    return torch.allclose(before[0], after[0], atol=1e-5)
