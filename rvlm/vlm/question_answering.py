"""Visual question answering (VQA) batches for the next-token loss."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from transformers import ProcessorMixin

from rvlm.vlm.processors import ACT
from rvlm.vlm.prompt_batches import pad
from rvlm.vlm.prompts import PromptBuilder


def encode_vqa(prompt_builder: PromptBuilder, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of images, questions and answers, and labels that supervise the answers alone (-100 elsewhere)."""
    tokenizer = prompt_builder.processor.tokenizer
    prompt = prompt_builder.token_ids("")
    ids = prompt[: prompt.index(tokenizer.convert_tokens_to_ids(ACT))]
    labels = [-100] * len(ids)
    texts = [text for question, answer in pairs for text in (question, answer)]
    for i, part in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        is_answer = i % 2 == 1
        part = [*part, tokenizer.eos_token_id] if is_answer else part
        ids += part
        labels += part if is_answer else [-100] * len(part)
    return ids, labels


class VQACollator:
    """Images with questions and answers as a batch for the next-token loss.

    Raises:
        ValueError: The family has other vision inputs than `pixel_values`.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompt_builder = PromptBuilder(processor, n_images=2)
        side = self.prompt_builder.image_size
        if not self.prompt_builder.is_separable(side, side):
            raise ValueError(
                f"expected a family whose only vision input is pixel_values, got that of {type(processor).__name__}; "
                "train it on VQA by its own recipe, and its policy here"
            )

    def __call__(
        self, samples: Sequence[tuple[UInt8[np.ndarray, "2 h w 3"] | Float[np.ndarray, "2 p d"], list[tuple[str, str]]]]
    ) -> dict[str, torch.Tensor]:
        """Images, or cached features of them, with (question, answer) pairs to `input_ids`, `labels` (b, l), vision inputs."""
        ids, labels = zip(*(encode_vqa(self.prompt_builder, pairs) for _, pairs in samples), strict=True)
        pad_id = self.prompt_builder.processor.tokenizer.pad_token_id
        vision = self.prompt_builder.vision_inputs(np.stack([images for images, _ in samples]))
        return {**pad(ids, pad_id), "labels": pad(labels, -100)["input_ids"], **vision}
