"""Questions about images and their answers as batches for the next-token loss."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import ProcessorMixin

from rvlm.vlm.processors import ACT
from rvlm.vlm.prompts import PromptBuilder, pad


def encode_vqa(prompter: PromptBuilder, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of images, questions and answers, and labels that supervise the answers alone (-100 elsewhere)."""
    tokenizer = prompter.processor.tokenizer
    prompt = prompter.token_ids("")
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
    """Scenes with drawn questions to a batch for the next-token loss."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompter = PromptBuilder(processor, n_images=2)
        if not self.prompter.sees_pixels_alone:
            raise ValueError(
                f"expected a family that is given nothing of images but pixels, got that of {type(processor).__name__}; "
                "train such a one on dialogues by its own recipe, and its policy here"
            )

    def __call__(self, samples: Sequence[tuple[np.ndarray, list[tuple[str, str]]]]) -> dict[str, torch.Tensor]:
        """Images (2, h, w, 3) uint8 with (question, answer) pairs, to `input_ids`, `labels` (b, l) and `pixel_values`."""
        ids, labels = zip(*(encode_vqa(self.prompter, pairs) for _, pairs in samples), strict=True)
        pad_id = self.prompter.processor.tokenizer.pad_token_id
        seen = self.prompter.vision_inputs(np.stack([images for images, _ in samples]))
        return {**pad(ids, pad_id), "labels": pad(labels, -100)["input_ids"], **seen}
