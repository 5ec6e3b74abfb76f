"""The small vision-language model that ships and its tokenizer: SmolVLM's class, small enough to train on two CPU cores."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from rvlm.vlm.processors import ACT

_SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", ACT]


def train_tokenizer(texts: Sequence[str], extra_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; any other text still has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=_SPECIAL + list(extra_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token"), _SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=[*_SPECIAL[3:], *extra_tokens]
    )


def small_vlm(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = 96,
    patch_size: int = 12,
    width: int = 128,
    vision_width: int = 96,
    vision_layers: int = 3,
    text_layers: int = 3,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An untrained Idefics3 model (SmolVLM's class) and its processor.

    Weights are initialised with standard deviation 1 / sqrt(width); with the library's default of 0.02, training of so narrow a
    model stays on a plateau.
    """
    scale_factor, n_heads = 2, 4

    def transformer(width: int, n_layers: int) -> dict[str, Any]:
        widths = {"initializer_range": width**-0.5, "hidden_size": width, "intermediate_size": 3 * width}
        return {**widths, "num_hidden_layers": n_layers, "num_attention_heads": n_heads}

    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vocabulary = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **special}
    config = Idefics3Config(
        vision_config={**transformer(vision_width, vision_layers), "image_size": image_size, "patch_size": patch_size},
        text_config={**transformer(width, text_layers), "model_type": "llama", "num_key_value_heads": n_heads, **vocabulary},
        scale_factor=scale_factor,
        image_token_id=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        tie_word_embeddings=True,
        **{"initializer_range": width**-0.5},
    )
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        position = model.model.vision_model.embeddings.position_embedding.weight
        position.copy_(grid_encoding(image_size // patch_size, vision_width))
    side = {"longest_edge": image_size}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=(image_size // patch_size // scale_factor) ** 2)
    return model, processor


def grid_encoding(side: int, width: int) -> Float[torch.Tensor, "p d"]:
    """Sinusoidal position embeddings of a square grid's patches: (side * side, width), rows in the first half.

    Source: Vaswani et al. 2017, section 3.5, in two dimensions as in He et al. 2021 (MAE), appendix A.1.
    """
    frequency = torch.pi / side * 2 ** torch.linspace(-1, 3, width // 4)
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)
