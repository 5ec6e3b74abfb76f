"""Vision-language backbones: load one, give it an `<act>` token, and build its prompts.

The action query is a special token `<act>` in the text: the family's own processor, attention and positions do the
work, and the policy reads the hidden state where the token stands.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

ACT = "<act>"
SMALL_VLM = Path(__file__).parent / "assets" / "small-vlm"  # the shipped vision-language model


def load_processor(name_or_path: str | Path) -> ProcessorMixin:
    """The processor of a vision-language model, with `<act>` in its tokenizer."""
    processor = AutoProcessor.from_pretrained(name_or_path)
    if ACT not in processor.tokenizer.get_vocab():
        processor.tokenizer.add_special_tokens({"additional_special_tokens": [ACT]}, replace_extra_special_tokens=False)
    return processor


def load_backbone(name_or_path: str | Path, processor: ProcessorMixin, *, is_pretrained: bool = True) -> PreTrainedModel:
    """Load an image-text-to-text model of any class in transformers.

    Args:
        name_or_path: A folder or a name on the Hub; default the shipped model.
        processor: As `load_processor` gives it; the embeddings grow where its tokenizer is larger than their table.
        is_pretrained: False draws random weights for the same architecture (no vision-language pre-training).
    """
    if is_pretrained:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path)
    else:
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name_or_path))
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer))
    return model


def parts(model: PreTrainedModel) -> pd.DataFrame:
    """What a vision-language model is made of: part, class, blocks, parameters (shared ones once) and their share [%]."""
    rows, counted = [], set()
    embeddings = {"token embeddings": model.get_input_embeddings()}
    for name, part in (embeddings | dict(model.base_model.named_children()) | {"rest (language-model head)": model}).items():
        new = {id(p): p.numel() for p in part.parameters() if id(p) not in counted}
        counted |= set(new)
        blocks = max([len(m) for m in part.modules() if isinstance(m, torch.nn.ModuleList)] or [0])
        rows.append({"part": name, "class": type(part).__name__, "blocks": blocks, "parameters": sum(new.values())})
    table = pd.DataFrame(rows)
    return table.assign(**{"share [%]": 100 * table["parameters"] / table["parameters"].sum()})


class Prompter:
    """Images and instructions to what the backbone reads; the same object serves training and evaluation.

    The text is the model's own image placeholders, the instruction, and `<act>`. The processor runs once per distinct
    text and its token ids are remembered; images go through the processor's image part at every call.

    Args:
        processor: The backbone's processor.
        n_images: Images per prompt.
    """

    def __init__(self, processor: ProcessorMixin, n_images: int) -> None:
        self.processor, self.n_images = processor, n_images
        self._ids: dict[str, list[int]] = {}

    def text(self, instruction: str) -> str:
        """The prompt as text, before the processor expands the image placeholders."""
        return f"{self.processor.image_token * self.n_images}{instruction}{ACT}"

    def token_ids(self, instruction: str) -> list[int]:
        """Token ids of the prompt, image placeholders expanded by the processor itself."""
        if instruction not in self._ids:
            side = self.processor.image_processor.size["longest_edge"]
            blank = [np.zeros((side, side, 3), np.uint8)] * self.n_images
            encoded = self.processor(images=[blank], text=[self.text(instruction)])
            self._ids[instruction] = list(encoded["input_ids"][0])
        return self._ids[instruction]

    def ribbon(self, instruction: str) -> tuple[list[str], list[str]]:
        """Tokens of the prompt as texts, and the kind of each, for `rvlm.plots.token_map`.

        Proprioception has no token of its own: it is added to the embedding of `<act>`.
        """
        tokenizer, ids = self.processor.tokenizer, self.token_ids(instruction)
        kinds = {self.processor.image_token_id: "image", tokenizer.convert_tokens_to_ids(ACT): "action"}
        special = dict.fromkeys(tokenizer.added_tokens_decoder, "other")
        return tokenizer.convert_ids_to_tokens(ids), [{**special, **kinds}.get(i, "instruction") for i in ids]

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """What the processor's image part makes of (b, n, h, w, 3) uint8: (b, n, 3, h, w) float32.

        Images that already have the model's size only need rescaling and normalisation; the others take the full way.
        """
        part = self.processor.image_processor
        if images.shape[2] != part.size["longest_edge"] or images.shape[2] != images.shape[3]:
            return part([list(sample) for sample in images], return_tensors="pt")["pixel_values"]
        scale = part.rescale_factor / np.asarray(part.image_std, np.float32)
        shift = np.asarray(part.image_mean, np.float32) / np.asarray(part.image_std, np.float32)
        channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
        return channels_first * torch.tensor(scale, dtype=torch.float32)[:, None, None] - torch.tensor(shift)[:, None, None]

    def __call__(self, images: np.ndarray, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Batch of prompts.

        Args:
            images: (b, n_images, h, w, 3) uint8 RGB.
            instructions: b texts.

        Returns:
            `input_ids`, `attention_mask` (b, l) int64, padded on the right, and `pixel_values`.
        """
        return {**self.tokens(instructions), "pixel_values": self.pixels(images)}

    def tokens(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text half of a batch: `input_ids` and `attention_mask` (b, l)."""
        return pad([self.token_ids(text) for text in instructions], self.processor.tokenizer.pad_token_id)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Token id rows of different lengths as `input_ids` and `attention_mask` (b, l), padded on the right."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


# -- the small vision-language model -----------------------------------------------------------------------------------
_SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", ACT]


def train_tokenizer(texts: Sequence[str], extra_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose words are those of `texts`; any other text still has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=_SPECIAL + list(extra_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token"), _SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, additional_special_tokens=[*_SPECIAL[3:], *extra_tokens])


def small_vlm(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = 96,
    patch_size: int = 12,
    width: int = 128,
    vision_width: int = 96,
    vision_layers: int = 3,
    text_layers: int = 3,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An untrained Idefics3 model (SmolVLM's class) small enough to train on two CPU cores, and its processor.

    Weights are drawn with standard deviation 1 / sqrt(width); the library's default of 0.02 leaves so narrow a model on
    a plateau.
    """
    scale_factor, n_heads = 2, 4

    def size(width: int, n_layers: int) -> dict[str, Any]:
        spread = {"initializer_range": width**-0.5, "hidden_size": width, "intermediate_size": 3 * width}
        return {**spread, "num_hidden_layers": n_layers, "num_attention_heads": n_heads}

    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vocabulary = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **special}
    config = Idefics3Config(
        vision_config={**size(vision_width, vision_layers), "image_size": image_size, "patch_size": patch_size},
        text_config={**size(width, text_layers), "model_type": "llama", "num_key_value_heads": n_heads, **vocabulary},
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
    )
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        position = model.model.vision_model.embeddings.position_embedding.weight
        position.copy_(grid_encoding(image_size // patch_size, vision_width))
    side = {"longest_edge": image_size}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=(image_size // patch_size // scale_factor) ** 2)
    return model, processor


def grid_encoding(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column of a square grid, (side * side, width), from which position can be read linearly.

    Source: Vaswani et al. 2017, section 3.5, in two dimensions as in He et al. 2021 (MAE), appendix A.1.
    """
    frequency = torch.pi / side * 2 ** torch.linspace(-1, 3, width // 4)
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)
