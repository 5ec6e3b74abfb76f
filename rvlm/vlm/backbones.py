"""Vision-language backbones: load one, find its parts, freeze them, and compute its image features."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from rvlm.files import PACKAGE
from rvlm.vlm.tiling import use_grid_of

transformers_logging.disable_progress_bar()

LOAD_LOCK = threading.RLock()  # transformers patches itself while loading: two threads at once both lose tied weights
ADAPTERS = "adapter"  # a policy's subfolder of peft adapters
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # of the library
SMALL_VLM = PACKAGE / "assets" / "small-vlm"  # the shipped vision-language model


def load_backbone(
    name_or_path: str | Path,
    processor: ProcessorMixin,
    *,
    is_pretrained: bool = True,
    dtype: torch.dtype = torch.float32,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load an image-text-to-text model of any class in transformers.

    Args:
        name_or_path: Folder or Hub name.
        processor: From `load_processor`; the embedding table grows to its tokenizer's vocabulary.
        is_pretrained: False draws random weights for the same architecture (no vision-language pre-training).
        dtype: Of the weights.
        quantization: A `BitsAndBytesConfig` from `rvlm.vlm.quantization.nf4_config`.

    Raises:
        ValueError: A weight of the architecture is missing in the checkpoint, or has another shape.
    """
    dtype = dtype if quantization is None else quantization.bnb_4bit_compute_dtype
    with LOAD_LOCK:
        if is_pretrained:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name_or_path,
                trust_remote_code=False,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                quantization_config=quantization,
            )
            model, report = loaded
            check_loaded_weights(name_or_path, {k: v for k, v in report.items() if k != "unexpected_keys"})
        else:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()  # as `from_pretrained` does
        _grow_embeddings(model, len(processor.tokenizer))
    use_grid_of(model.config, processor)
    disable_bf16_repacking(model)
    return model


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Let a model compute attention by one of `ATTENTION`; None leaves the library's choice.

    Raises:
        ValueError: An unknown name, or one that is not installed or not supported by the family; with the library's reason.
    """
    if name is None:
        return
    if name not in ATTENTION:  # the library would run code from the Hub for others
        raise ValueError(f"no attn_implementation {name!r}; there are {', '.join(ATTENTION)}")
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"expected an attention implementation that is installed and that {type(model).__name__} supports, got {name!r}: "
            f"{error}; take 'sdpa' or 'eager'"
        ) from error


def disable_bf16_repacking(model: torch.nn.Module) -> None:
    """Keep 4-bit layers in the compute dtype: on some CPUs bitsandbytes repacks them to bfloat16 for inference."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _grow_embeddings(model: PreTrainedModel, n_tokens: int) -> None:
    """Add rows for new tokens; existing rows keep their values and ids."""
    table: Any = model.get_input_embeddings()
    n_additional = getattr(table, "num_additional_embeddings", 0)  # Idefics has a second table for added tokens
    missing = n_tokens - table.num_embeddings - n_additional
    if missing > 0 and not n_additional:
        n_image_rows = max(0, table.num_embeddings - model.config.get_text_config().vocab_size)  # Mllama's image token
        table = model.resize_token_embeddings(n_tokens)
        table.weight = _with_mean_rows(table.weight, n_image_rows)
        table.num_embeddings += n_image_rows
        model.tie_weights()
    elif missing > 0:
        lm_head: Any = model.get_output_embeddings()
        for layer in (table.additional_embedding, lm_head.additional_fc):
            layer.weight = _with_mean_rows(layer.weight, missing)
        table.num_additional_embeddings = table.additional_embedding.num_embeddings = n_additional + missing
        lm_head.out_additional_features = lm_head.additional_fc.out_features = n_additional + missing
        model.config.additional_vocab_size = n_additional + missing
        model.tie_weights()


def _with_mean_rows(weight: torch.Tensor, n: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.cat([weight, weight.mean(0, keepdim=True).expand(n, -1)]))


def check_loaded_weights(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Require that a loading report (problem -> weights) lists no weight.

    Raises:
        ValueError: Weights are missing, unexpected or mismatched; with their names.
    """
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(
            f"{folder}: expected exactly the weights of its configuration; got {wrong}; was it saved "
            "by another version? restore or train it again"
        )


def state_dict_diff(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """Weights in which a checkpoint differs from a model: missing, unexpected, or of another shape (mismatched)."""
    mismatched = {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}
    return {"missing": own.keys() - saved.keys(), "unexpected": saved.keys() - own.keys(), "mismatched": mismatched}


def language_model(model: PreTrainedModel) -> torch.nn.Module:
    """The part that reads the prompt: the decoder, or the encoder of an encoder-decoder."""
    base: Any = model.base_model
    part = base.get_decoder()
    for inner in ("model", "encoder"):
        part = getattr(part, inner, part)
    return part


def vision_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Vision tower and connector: all of the base model but the language model.

    The tower alone where it is a part of the language model (Idefics).
    """
    base: Any = model.base_model
    language = language_model(model)
    if language is base:
        return [base.get_encoder("image")]
    return [part for part in base.children() if language not in set(part.modules()) and part is not model.get_output_embeddings()]


def freeze_unused(model: PreTrainedModel) -> None:
    """Freeze parameters outside the action path: an untied language-model head, the decoder of an encoder-decoder."""
    base: Any = model.base_model
    used = [language_model(model), model.get_input_embeddings(), *vision_modules(model)]
    trainable = {id(p) for part in used for p in part.parameters()} | {id(p) for p in base.parameters(recurse=False)}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in trainable)


def freeze_vision(model: PreTrainedModel) -> None:
    """Freeze vision tower and connector; their features can then be cached."""
    for part in vision_modules(model):
        part.requires_grad_(False)


@torch.inference_mode()
def vision_features(
    model: PreTrainedModel, pixel_values: Float[torch.Tensor, "..."], n_prompts: int | None = None
) -> Float[torch.Tensor, "n p d"]:
    """Image features (n, images * tokens, d) of n prompts, as the language model receives them.

    Args:
        model: Vision-language model.
        pixel_values: From `PromptBuilder.pixels`.
        n_prompts: n, if it is not the first axis of `pixel_values`.
    """
    base: Any = model.base_model
    features = base.get_image_features(pixel_values, return_dict=True).pooler_output
    rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    return rows.reshape(n_prompts or len(pixel_values), -1, rows.shape[-1])


def as_encoder_outputs(image_features: Float[torch.Tensor, "n p d"]) -> dict[str, BaseModelOutputWithPooling]:
    """Features from `vision_features` as an input of transformers' models, instead of pixels."""
    rows: Any = _PerImageFeatures(image_features)
    return {"image": BaseModelOutputWithPooling(pooler_output=rows)}


class _PerImageFeatures(list):
    """A list of each image's features with a tensor's `to`: some families concatenate the list, others call `to`."""

    def to(self, *args: Any) -> torch.Tensor:
        """All features as one tensor, on a device or in a dtype."""
        return torch.stack(list(self)).to(*args)
