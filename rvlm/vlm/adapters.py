"""Adapters on a backbone by peft: LoRA, DoRA, and QLoRA over a language model in 4 bits (`rvlm.vlm.quantization`).

Adapters stand on every linear layer of the language model; vision tower and connector stay as they are. The embedding of
`<act>` learns through peft's own trainable tokens. Importing peft takes seconds, so only what has adapters imports this module.
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
    language, seeing = language_model(model), vision_modules(model)
    prefix = next(name for name, module in model.named_modules() if module is language)
    inside = [name for name, module in language.named_modules() if any(module is part for part in seeing)]
    linear = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    leaves = {name.split(".")[-1] for name in linear if not name.startswith(tuple(f"{part}." for part in inside))}
    others = f"(?!({'|'.join(inside)})[.])" if inside else ""
    return rf"{prefix.replace('.', '[.]')}[.]{others}.*[.]({'|'.join(sorted(leaves))})"


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
        **_act_embedding(model, act_id),
        use_dora=kind == "dora",
    )
    return _wrap(model, config)


def _act_embedding(model: PreTrainedModel, act_id: int) -> dict[str, Any]:
    """The peft option that trains the embedding of `<act>` alone; Idefics keeps added tokens in a table of their own."""
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
    adapters.save_pretrained(str(folder / ADAPTERS), save_embedding_layers=False, state_dict=named)
    path = folder / ADAPTERS / "adapter_config.json"  # what they stand on is told by the policy, without a path of this machine
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}, indent=2, sort_keys=True))
    (folder / ADAPTERS / "README.md").unlink(missing_ok=True)  # the policy's own card says it


def add_saved_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """New adapters of the kind that `save` has put into a policy's folder, around their backbone, for `load_lora_weights`."""
    return _wrap(model, PeftConfig.from_pretrained(str(folder / ADAPTERS)))


def load_lora_weights(adapters: PeftModel, folder: Path) -> None:
    """Weights of adapters from a policy's folder, strictly.

    Raises:
        ValueError: A weight is missing, unexpected or mismatched.
    """
    saved = load_file(folder / ADAPTERS / "adapter_model.safetensors")
    own = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    check_loaded_weights(folder, state_dict_diff(own, saved))
    set_peft_model_state_dict(adapters, saved)
