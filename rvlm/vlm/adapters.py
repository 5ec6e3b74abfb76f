"""Adapters on a backbone by peft: LoRA, DoRA, and QLoRA over a language model in 4 bits (`rvlm.vlm.quantization`).

Every linear layer of the language model has an adapter; vision tower and connector are frozen. The embedding of `<act>` is
trained by peft's trainable tokens. Importing peft takes seconds, so only code that needs adapters imports this module.
Source: LoRA (Hu et al. 2021, arXiv 2106.09685), QLoRA (Dettmers et al. 2023, arXiv 2305.14314), DoRA (Liu et al. 2024, arXiv
2402.09353).
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from rvlm.vlm.backbones import ADAPTERS, check_loaded_weights, language_model, state_dict_diff, vision_modules
from rvlm.vlm.quantization import is_quantized


def lora_target_pattern(model: PreTrainedModel) -> str:
    """A pattern that matches the names of all linear layers of the language model, and no others."""
    language, vision = language_model(model), vision_modules(model)
    prefix = next(name for name, module in model.named_modules() if module is language)
    inside = [name for name, module in language.named_modules() if any(module is part for part in vision)]
    linear = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    leaves = {name.split(".")[-1] for name in linear if not name.startswith(tuple(f"{part}." for part in inside))}
    no_vision = f"(?!({'|'.join(inside)})[.])" if inside else ""
    return rf"{prefix.replace('.', '[.]')}[.]{no_vision}.*[.]({'|'.join(sorted(leaves))})"


def add_lora(model: PreTrainedModel, kind: str, rank: int, act_id: int) -> PeftModel:
    """Add adapters to a backbone in place and freeze the rest of it.

    Args:
        model: Vision-language model.
        kind: "lora", "dora" or "qlora".
        rank: Of each layer's update.
        act_id: Id of `<act>`, whose embedding is trained too.

    Raises:
        ValueError: "qlora" on a model that is not in 4 bits, or another kind on one that is.
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
        **_act_embedding(model, act_id),
        use_dora=kind == "dora",
    )
    return _wrap(model, config)


def _act_embedding(model: PreTrainedModel, act_id: int) -> dict[str, Any]:
    """The peft option that trains only the embedding of `<act>`; Idefics has a second table for added tokens."""
    is_additional = act_id >= cast(Any, model.get_input_embeddings()).num_embeddings
    return {"modules_to_save": ["additional_embedding"]} if is_additional else {"trainable_token_indices": [act_id]}


def _wrap(model: PreTrainedModel, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses the deprecated name
        wrapped, table = get_peft_model(model, config), cast(Any, model.get_input_embeddings())
    if "additional_embedding" in (config.modules_to_save or ()):  # peft copies it in the precision of frozen weights
        added = table.additional_embedding.float()
        added.register_forward_hook(lambda module, args, rows: rows.to(table.weight.dtype))
    return wrapped


def save_lora_weights(adapters: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Save adapters in peft's format.

    Args:
        adapters: From `add_lora`.
        folder: The policy's.
        state_dict: The backbone's.
    """
    prefixed = {f"base_model.model.{name}": value for name, value in state_dict.items()}
    adapters.save_pretrained(str(folder / ADAPTERS), save_embedding_layers=False, state_dict=prefixed)
    path = folder / ADAPTERS / "adapter_config.json"  # the policy's configuration names the base model, without a local path
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}, indent=2, sort_keys=True))
    (folder / ADAPTERS / "README.md").unlink(missing_ok=True)  # the policy has a model card


def add_saved_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add new adapters of the configuration in a policy's folder; `load_lora_weights` fills them."""
    return _wrap(model, PeftConfig.from_pretrained(str(folder / ADAPTERS)))


def load_lora_weights(adapters: PeftModel, folder: Path) -> None:
    """Load the weights of adapters from a policy's folder, strictly.

    Raises:
        ValueError: A weight is missing, unexpected or mismatched.
    """
    saved = load_file(folder / ADAPTERS / "adapter_model.safetensors")
    own = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    check_loaded_weights(folder, state_dict_diff(own, saved))
    set_peft_model_state_dict(adapters, saved)
