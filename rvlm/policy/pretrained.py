"""Save and load a policy, both directions in one place: complete, or with its frozen backbone referenced.

A folder holds `config.json` (structure, action spec, statistics, origin), weights as safetensors, adapters in peft's format, the
processor and a model card. Loading gives the complete trained policy, or an error that names folder and file.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.policy import hub
from rvlm.policy.checkpoint_files import (
    CheckpointError,
    check_finite,
    checked,
    header_of,
    is_policy,
    naming,
    policy_processor,
    read_config,
    read_json_object,
    weights_in,
    written_aside,
)
from rvlm.policy.model_card import model_card
from rvlm.vlm.backbones import (
    ADAPTERS,
    LOAD_LOCK,
    check_loaded_weights,
    disable_bf16_repacking,
    load_backbone,
    state_dict_diff,
)
from rvlm.vlm.quantization import dtype_of, nf4_config

CARD = "README.md"
DOWNLOAD = {"cache_dir", "force_download", "local_files_only", "token"}  # options of fetching
AUTOMATIC = {"_from_auto", "adapter_kwargs", "trust_remote_code"}  # passed by AutoModel; remote code is never run


class SavedPolicy(PreTrainedModel):
    """Saving and loading of `VLA`, with the library's methods and parameters.

    Attributes:
        adapters: `peft.PeftModel` around its backbone, or None.
        processor: Made or loaded, and saved, with it.
    """

    adapters: Any
    processor: Any = None

    def register_adapters(self, adapters: Any) -> None:
        """Remember the adapters (`peft.PeftModel`, or None) that are in the backbone, to save and merge them."""
        object.__setattr__(self, "adapters", adapters)  # not a part of this module: their weights are the backbone's

    def save_pretrained(
        self,
        save_directory: str | Path,
        processor: ProcessorMixin | None = None,
        *,
        card: str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        save_original_format: bool = True,
        **push_options: Any,
    ) -> None:
        """Save weights, configuration, processor and model card; a folder that is incomplete cannot be loaded.

        A frozen backbone is referenced in the configuration, not stored; its adapters are stored in peft's format.
        Written to a temporary folder first; of an existing folder the configuration is removed first and replaced last.

        Args:
            save_directory: Created if it does not exist.
            processor: Default: the policy's own.
            card: Text of the model card; default `rvlm.policy.model_card.model_card`.
            is_main_process: False in processes that must not save.
            state_dict: Weights of a sharded model.
            save_function: Ignored; weights are always safetensors.
            push_to_hub: Also upload it.
            max_shard_size: Of the library.
            save_original_format: Of the library.
            push_options: `repo_id` (default: the folder's name) and options of `push_to_hub`.

        Raises:
            ValueError: There is no processor, or the path is a file.
            TypeError: Unknown options.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained does not take {sorted(push_options)} without push_to_hub=True; leave them out")
        if not is_main_process:
            return
        folder, processor = Path(save_directory), processor or self.processor
        if processor is None or folder.is_file():
            raise ValueError(
                f"{folder}: expected a folder and a processor to save with the policy, got "
                f"{'a file' if folder.is_file() else 'no processor'}; give save_pretrained(folder, processor), as of make_policy"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(folder, (ADAPTERS, hub.INSIDE)) as part:
            whole = dict(self.state_dict() if state_dict is None else state_dict)
            self._write(part, whole, max_shard_size=max_shard_size, save_original_format=save_original_format)
            processor.save_pretrained(part)
            (part / CARD).write_text(card or model_card(self), encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(push_options.pop("repo_id", folder.name), processor, card=card, **push_options)

    def _write(self, folder: Path, whole: dict[str, torch.Tensor], **options: Any) -> None:
        if self.config.base_model is not None and self.adapters is not None:
            inner = {name.removeprefix("backbone."): value for name, value in whole.items() if name.startswith("backbone.")}
            _adapters().save_lora_weights(self.adapters, folder, inner)
        kept = whole if self.config.base_model is None else non_backbone_weights(whole)
        super().save_pretrained(folder, state_dict=kept, **options)

    def push_to_hub(
        self, repo_id: str, processor: ProcessorMixin | None = None, *, card: str | None = None, **options: Any
    ) -> Any:
        """Upload the policy with its processor, its card and, if that is a local folder, its base model.

        Args:
            repo_id: Name on the Hub; created if it does not exist.
            processor: As of `save_pretrained`.
            card: As of `save_pretrained`.
            options: Of `rvlm.policy.hub.send`: `commit_message`, `private`, `token`, `revision` (a branch), `create_pr`, ...

        Returns:
            The library's `CommitInfo`; its `oid` is the `revision` for `from_pretrained`.
        """
        with tempfile.TemporaryDirectory() as temporary_folder:
            folder = Path(temporary_folder) / "policy"
            self.save_pretrained(folder, processor, card=card)
            hub.put_backbone_inside(folder)
            return hub.send(folder, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        base_model: str | Path | None = None,
        is_quantized: bool | None = None,
        device: str | torch.device | None = None,
        config: Any = None,
        **options: Any,
    ) -> Any:
        """The complete trained policy in evaluation mode, with its `processor`; or an error.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            revision: Commit, branch or tag on the Hub.
            base_model: Folder or Hub name of a referenced backbone, if it has moved.
            is_quantized: Whether to load the backbone in 4 bits; default: as trained.
            device: Of all of it; where its backbone is loaded if left out: the CPU, or the GPU of one in 4 bits.
            config: The folder's, if read already.
            options: `cache_dir`, `force_download`, `local_files_only`, `token`.

        Raises:
            CheckpointError: A file is missing, truncated or of another version, or weights are NaN or infinite.
            ValueError: A weight is missing, unexpected or mismatched.
            TypeError: An option that policies do not have.
        """
        folder = hub.fetch(pretrained_model_name_or_path, revision, **_download_options(options))
        config = read_config(folder) if config is None else checked(folder, config)
        weights_in(folder)
        processor = policy_processor(folder, config)
        with LOAD_LOCK, naming(folder):
            is_whole = config.base_model is None
            model: Any = (
                cls._whole(folder, config, is_quantized)
                if is_whole
                else cls._over(folder, config, base_model, is_quantized, processor)
            )
        check_finite(folder, model)
        model.processor = processor
        return (model if device is None else model.to(device)).eval()

    @classmethod
    def _whole(cls, folder: Path, config: Any, is_quantized: bool | None) -> Any:
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        if is_quantized:
            options["quantization_config"] = nf4_config(folder, "backbone.")
        loaded: Any = super().from_pretrained(folder, config=config, **options)
        model, report = loaded
        check_loaded_weights(folder, report)
        disable_bf16_repacking(model)
        return model

    @classmethod
    def _over(cls, folder: Path, config: Any, base_model: Any, is_quantized: bool | None, processor: Any) -> Any:
        model: Any = cls(config, cls._backbone(folder, config, base_model, is_quantized, processor))
        if config.base_model["finetuning"] != "head":
            read_json_object(folder / ADAPTERS / "adapter_config.json")
            model.register_adapters(_adapters().add_saved_lora(model.backbone, folder))
        model.load_own_weights(folder)
        return model

    @classmethod
    def _backbone(cls, folder: Path, config: Any, base_model: Any, is_quantized: bool | None, processor: Any) -> PreTrainedModel:
        """The base model under head and adapters: a vision-language model, or the backbone of another policy."""
        saved = config.base_model
        inside = folder / saved["name"]
        name = base_model or (inside if inside.is_dir() else saved["name"])
        where = hub.fetch(name, saved.get("revision") if str(name) == saved["name"] else None)
        found = hub.origin(name, where)
        if found["weights"] != saved["weights"]:
            at = f" at revision {saved['revision']}" if saved.get("revision") else ""
            raise CheckpointError(
                f"{folder}: it was trained on {saved['name']}{at} with weights {saved['weights']}; got {name} with "
                f"{found['weights']}; give their present place by base_model=, or train it again"
            )
        config.base_model = {**saved, **found}
        finetuning = saved["finetuning"] if is_quantized is None else "qlora" if is_quantized else "full"
        precision = saved.get("precision", "auto")
        if is_policy(where):
            return cls.from_pretrained(where, is_quantized=True).backbone if finetuning == "qlora" else cls.merged(where).backbone
        return load_backbone(where, processor, **load_kwargs(where, finetuning, precision))

    def load_own_weights(self, folder: str | Path) -> None:
        """Load the weights of a policy whose backbone is referenced from its folder; strictly.

        Raises:
            ValueError: A weight is missing, unexpected or mismatched.
        """
        folder = Path(folder)
        if self.adapters is not None:
            header_of(folder / ADAPTERS / "adapter_model.safetensors")
            _adapters().load_lora_weights(self.adapters, folder)
        saved = {name: value for path in weights_in(folder) for name, value in load_file(path).items()}
        check_loaded_weights(folder, state_dict_diff(non_backbone_weights(self.state_dict()), saved))
        self.load_state_dict(saved, strict=False)

    @classmethod
    def merged(cls, name: str | Path, **options: Any) -> Any:
        """A policy with adapters merged into its backbone; it is then saved with the backbone.

        Args:
            name: Folder, or name on the Hub.
            options: Of `from_pretrained`.
        """
        model = cls.from_pretrained(name, is_quantized=False, **options)
        if model.config.base_model is None:
            return model
        backbone = model.adapters.merge_and_unload() if model.adapters is not None else model.backbone
        merged: Any = cls(model.config.with_stored_backbone(), backbone)
        merged.load_state_dict(non_backbone_weights(model.state_dict()), strict=False)
        merged.processor = model.processor
        return merged.eval()


def _adapters() -> Any:
    """The module of adapters, with which peft comes, which takes seconds."""
    from rvlm.vlm import adapters

    return adapters


def _download_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`, without what AutoModel passes."""
    options = {name: value for name, value in options.items() if name not in AUTOMATIC}
    unknown = sorted(options.keys() - DOWNLOAD)
    if unknown:
        raise TypeError(
            f"a policy is loaded as it was trained, without {unknown}; there are revision, base_model, is_quantized, device, "
            f"config, {', '.join(sorted(DOWNLOAD))}"
        )
    return options


def non_backbone_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights but the backbone's: history, head, state projector, embodiment embedding."""
    return {name: value for name, value in weights.items() if not name.startswith("backbone.")}


def load_kwargs(vlm: Path, finetuning: str, precision: str = "auto") -> dict[str, Any]:
    """Options of `load_backbone`: full precision if it is trained, else `precision` or 4 bits."""
    if finetuning == "full":
        return {}
    dtype = dtype_of(precision)
    return {"quantization": nf4_config(vlm, dtype=dtype)} if finetuning == "qlora" else {"dtype": dtype}
