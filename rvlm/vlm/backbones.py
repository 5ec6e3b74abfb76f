"""Vision-language backbones: load one, find its parts, freeze them, and read hidden states at `<act>`.

The action query is a special token `<act>` in the text: the family's own processor, attention and positions do the
work, and the policy reads the hidden state where the token stands.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from rvlm.files import PACKAGE

# No bar for each file of weights, which load at once here and are named when they do not.
transformers_logging.disable_progress_bar()

LOAD_LOCK = threading.RLock()  # the library changes itself while it loads: of two threads that do, both leave tied weights out
ADAPTERS = "adapter"  # where a policy's folder keeps its adapters, in peft's own form
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
        name_or_path: A folder or a name on the Hub; default the shipped model.
        processor: As `load_processor` gives it; the embeddings grow where its tokenizer is larger than their table.
        is_pretrained: False draws random weights for the same architecture (no vision-language pre-training).
        dtype: Of the weights.
        quantization: A `BitsAndBytesConfig` to hold layers in fewer bits, as `rvlm.vlm.quantization.nf4_config` makes it.

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
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()  # as a loaded one is
        _grow(model, len(processor.tokenizer))
    disable_bf16_repacking(model)
    return model


def disable_bf16_repacking(model: torch.nn.Module) -> None:
    """Keep layers in 4 bits from acting in bfloat16 on what was trained in float32, as bitsandbytes would on some CPUs."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _grow(model: PreTrainedModel, n_tokens: int) -> None:
    """Make room for new tokens; what stands in the table stays."""
    table: Any = model.get_input_embeddings()
    n_apart = getattr(table, "num_additional_embeddings", 0)  # Idefics keeps its own new tokens in a second table
    missing = n_tokens - table.num_embeddings - n_apart
    if missing > 0 and not n_apart:
        n_beyond = max(0, table.num_embeddings - model.config.get_text_config().vocab_size)  # Mllama's, of images
        table = model.resize_token_embeddings(n_tokens)
        table.weight = torch.nn.Parameter(torch.cat([table.weight, table.weight.mean(0, keepdim=True).expand(n_beyond, -1)]))
        table.num_embeddings += n_beyond
        model.tie_weights()
    elif missing > 0:
        answers: Any = model.get_output_embeddings()
        for part in (table.additional_embedding, answers.additional_fc):
            part.weight = torch.nn.Parameter(torch.cat([part.weight, part.weight.mean(0, keepdim=True).expand(missing, -1)]))
        table.num_additional_embeddings = table.additional_embedding.num_embeddings = n_apart + missing
        answers.out_additional_features = answers.additional_fc.out_features = n_apart + missing
        model.config.additional_vocab_size = n_apart + missing
        model.tie_weights()


def check_loaded_weights(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Raise if the library's loading report names any weight.

    Raises:
        ValueError: Which weights are missing, unexpected or mismatched.
    """
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"{folder}: expected exactly the weights of its configuration; got {wrong}; retrain or restore it")


def state_dict_diff(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """In which weights a checkpoint differs from what a model has: missing, unexpected, mismatched."""
    shapes = {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}
    return {"missing": own.keys() - saved.keys(), "unexpected": saved.keys() - own.keys(), "mismatched": shapes}


def language_model(model: PreTrainedModel) -> torch.nn.Module:
    """What of a vision-language model reads the prompt: its decoder or, of an encoder and a decoder, the encoder."""
    base: Any = model.base_model
    part = base.get_decoder()
    for inner in ("model", "encoder"):
        part = getattr(part, inner, part)
    return part


def vision_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Vision tower and connector of a vision-language model: all of its base model but the language model.

    Of a language model that holds the tower itself (Idefics), the tower alone.
    """
    base: Any = model.base_model
    language = language_model(model)
    if language is base:
        return [base.get_encoder("image")]
    return [part for part in base.children() if language not in set(part.modules()) and part is not model.get_output_embeddings()]


def freeze_unused(model: PreTrainedModel) -> None:
    """Freeze what no action is read through: a language-model head of its own weights, the decoder behind an encoder."""
    base: Any = model.base_model
    read = [language_model(model), model.get_input_embeddings(), *vision_modules(model)]
    learns = {id(p) for part in read for p in part.parameters()} | {id(p) for p in base.parameters(recurse=False)}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in learns)


def freeze_vision(model: PreTrainedModel) -> None:
    """Leave vision tower and connector as they are; their features can then be computed once."""
    for part in vision_modules(model):
        part.requires_grad_(False)


@torch.inference_mode()
def vision_features(model: PreTrainedModel, pixel_values: torch.Tensor, n_prompts: int | None = None) -> torch.Tensor:
    """Image features (n, images * tokens, d) of n prompts, as the language model receives them.

    Args:
        model: Vision-language model.
        pixel_values: As `PromptBuilder.pixels` makes them.
        n_prompts: n, where it is not the first axis of `pixel_values`.
    """
    base: Any = model.base_model
    features = base.get_image_features(pixel_values, return_dict=True).pooler_output
    rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    return rows.reshape(n_prompts or len(pixel_values), -1, rows.shape[-1])


def as_encoder_outputs(image_features: torch.Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """Features from `vision_features` in the form in which transformers' models take them instead of pixels."""
    rows: Any = _PerImageFeatures(image_features)
    return {"image": BaseModelOutputWithPooling(pooler_output=rows)}


class _PerImageFeatures(list):
    """Features of each image, which some families join as a list and others move as one tensor."""

    def to(self, *where: Any) -> torch.Tensor:
        """All rows as one tensor, there."""
        return torch.stack(list(self)).to(*where)


def _position_ids_after_cache(model: PreTrainedModel, attention_mask: torch.Tensor, n_tokens: int) -> dict[str, torch.Tensor]:
    """Positions of the last tokens of a sequence that is continued, for families that would count them wrongly."""
    base: Any = model.base_model
    place = attention_mask.cumsum(-1)[:, -n_tokens:]
    if getattr(base, "rope_deltas", None) is not None:  # Qwen counts images in rows and columns; behind them, on
        return {"position_ids": (place - 1 + base.rope_deltas).expand(3, -1, -1)}
    if base is model:  # KosMos-2 would count what fills a prompt up
        return {"position_ids": place + model.config.get_text_config().pad_token_id}
    return {}


def action_query_states(
    model: PreTrainedModel,
    act_id: int,
    input_ids: torch.Tensor,
    offsets: torch.Tensor | None = None,
    image_features: torch.Tensor | None = None,
    **inputs: Any,
) -> tuple[torch.Tensor, Any]:
    """One pass of the base model; the language-model head is not computed.

    Args:
        model: Vision-language model.
        act_id: Id of `<act>`.
        input_ids: (b, l).
        offsets: (m, d), added to the embeddings of all `<act>` in the batch, row by row.
        image_features: (n, images * tokens, d) from `vision_features`, instead of `pixel_values`.
        inputs: What else the backbone takes: `attention_mask` (b, l), `pixel_values`, ...

    Returns:
        Hidden states (m, d) at the `<act>`, row by row (of an encoder and a decoder: the encoder's), and the key-value cache if
        `use_cache` was asked for.

    Raises:
        ValueError: The family's hidden states are not those of its tokens.
    """
    base: Any = model.base_model
    if base is model:  # KosMos-2 has its language-model head among its parts
        inputs |= {"output_hidden_states": True, "logits_to_keep": 1}
    if image_features is not None:
        inputs["mm_encoder_outputs"] = as_encoder_outputs(image_features)
    if inputs.get("past_key_values") is not None:
        inputs |= _position_ids_after_cache(model, inputs["attention_mask"], input_ids.shape[1])
    is_act = input_ids == act_id

    def add(module: torch.nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        return embedded if offsets is None else embedded.index_put((is_act,), offsets.to(embedded.dtype), accumulate=True)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        out = base(input_ids=input_ids, **{"use_cache": False, **inputs})
    finally:
        handle.remove()
    hidden = out.get("encoder_last_hidden_state", out.get("last_hidden_state"))
    hidden = out.hidden_states[-1] if hidden is None else hidden
    if hidden.shape[:2] != input_ids.shape:
        raise ValueError(
            f"expected hidden states at each of {tuple(input_ids.shape)} tokens, got {tuple(hidden.shape)} of "
            f"{model.config.model_type!r}, which reads its prompt elsewhere; take a family that reads images and text as "
            "one, such as SmolVLM or Qwen-VL"
        )
    return hidden[is_act], out.get("past_key_values")
