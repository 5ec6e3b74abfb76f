"""Train little of a backbone, or hold it in 4 bits: adapters by peft, quantisation by bitsandbytes.

Adapters stand on every linear layer of the language model; vision tower and connector stay as they are. The embedding of
`<act>` learns through peft's own trainable tokens. Source: LoRA (Hu et al. 2021, arXiv 2106.09685), QLoRA (Dettmers et al.
2023, arXiv 2305.14314: 4-bit NormalFloat, double quantisation), DoRA (Liu et al. 2024, arXiv 2402.09353).
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from rvlm.vlm.backbones import check_loaded_weights, language_model, vision_modules

FOLDER = "adapter"  # where a policy's folder keeps its adapters, in peft's own form


def precision() -> torch.dtype:
    """The type that this machine computes in fastest: bfloat16 where the GPU has it, float16 on others, float32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def dtype_of(precision_name: str) -> torch.dtype:
    """The type of "fp32", "bf16" or "fp16"; of "auto" the one that this machine computes in fastest.

    Raises:
        ValueError: An unknown precision, with those that exist.
    """
    known = {"auto": precision(), "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision_name not in known:
        raise ValueError(f"no precision {precision_name!r}; there are {', '.join(known)}")
    return known[precision_name]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision-language model's modules without their weights: they take no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def lora_target_pattern(model: PreTrainedModel) -> str:
    """A pattern that matches the names of all linear layers of the language model, and no others."""
    language, seeing = language_model(model), vision_modules(model)
    prefix = next(name for name, module in model.named_modules() if module is language)
    inside = [name for name, module in language.named_modules() if any(module is part for part in seeing)]
    linear = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    leaves = {name.split(".")[-1] for name in linear if not name.startswith(tuple(f"{part}." for part in inside))}
    others = f"(?!({'|'.join(inside)})[.])" if inside else ""
    return rf"{prefix.replace('.', '[.]')}[.]{others}.*[.]({'|'.join(sorted(leaves))})"


def nf4_config(name_or_path: str | Path, prefix: str = "", dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Hold the language model's linear layers in 4 bits; vision tower, connector and heads stay as they are.

    Args:
        name_or_path: Vision-language model, or policy around one.
        prefix: Of the backbone's modules, where it is part of a policy.
        dtype: What is computed in; what this machine is fastest in, if left out.

    Raises:
        ImportError: bitsandbytes cannot be used here.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"4 bits are bitsandbytes' doing, which cannot be used here ({error}); install it, or take finetuning='lora'"
        ) from error
    config: Any = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if prefix:
        config = AutoConfig.for_model(**config.backbone)
    model = meta_model(config)
    still = {id(part) for part in vision_modules(model)} | {id(model.get_output_embeddings())}
    names = [prefix + name for name, module in model.named_modules() if id(module) in still]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or precision(),
        llm_int8_skip_modules=[*names, "head", "history", "state_projector"],
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether some of its layers are held in 4 bits."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


def add_lora(model: PreTrainedModel, kind: str, rank: int, act_id: int) -> PeftModel:
    """Adapters around a backbone, in place; nothing else of it learns.

    Args:
        model: Vision-language model.
        kind: "lora", "dora" or "qlora".
        rank: Of the update of each layer.
        act_id: Id of `<act>`, whose embedding learns too.

    Raises:
        ValueError: "qlora" on a model that is not held in 4 bits, or the others on one that is.
    """
    if (kind == "qlora") != is_quantized(model):
        raise ValueError(
            f"expected a backbone {'in' if kind == 'qlora' else 'that is not in'} 4 bits for finetuning={kind!r}; "
            f"load it with is_quantized={kind == 'qlora'}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=lora_target_pattern(model),
        **_own_token(model, act_id),
        use_dora=kind == "dora",
    )
    return _wrap(model, config)


def _own_token(model: PreTrainedModel, act_id: int) -> dict[str, Any]:
    """How peft is told that the embedding of `<act>` learns; Idefics keeps new tokens in a table of their own."""
    is_apart = act_id >= cast(Any, model.get_input_embeddings()).num_embeddings
    return {"modules_to_save": ["additional_embedding"]} if is_apart else {"trainable_token_indices": [act_id]}


def _wrap(model: PreTrainedModel, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks transformers by the old name
        return get_peft_model(model, config)


def save(adapters: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Save adapters in peft's own form, small.

    Args:
        adapters: As `add_lora` gives them.
        folder: The policy's.
        state_dict: The backbone's.
    """
    named = {f"base_model.model.{name}": value for name, value in state_dict.items()}
    adapters.save_pretrained(str(folder / FOLDER), save_embedding_layers=False, state_dict=named)
    path = folder / FOLDER / "adapter_config.json"  # what they stand on is told by the policy, without a path of this machine
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}, indent=2, sort_keys=True))
    (folder / FOLDER / "README.md").unlink(missing_ok=True)  # the policy's own card says it


def add_saved_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """New adapters of the kind that `save` has put into a policy's folder, around their backbone, for `load_lora_weights`."""
    return _wrap(model, PeftConfig.from_pretrained(str(folder / FOLDER)))


def load_lora_weights(adapters: PeftModel, folder: Path) -> None:
    """Weights of adapters from a policy's folder, strictly.

    Raises:
        ValueError: A weight is missing, unexpected or misshapen.
    """
    saved = load_file(folder / FOLDER / "adapter_model.safetensors")
    own = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    check_loaded_weights(folder, state_dict_diff(own, saved))
    set_peft_model_state_dict(adapters, saved)


def state_dict_diff(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """In which weights a checkpoint differs from what a model has: missing, unexpected, misshapen."""
    shapes = {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}
    return {"missing": own.keys() - saved.keys(), "unexpected": saved.keys() - own.keys(), "misshapen": shapes}
