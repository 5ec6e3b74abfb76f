"""Checks of a checkpoint's folder: configuration, weights and processor, each present, complete and readable.

Weights are identified by a hash of the tensors' values, however they are split into files.
"""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from rvlm.files import config_hash, temporary_folder
from rvlm.policy.config import VLAConfig, check_structure
from rvlm.policy.embodiments import embodiments_of
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.tiling import splits_images

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A folder, or a name on the Hub, from which a model cannot be loaded completely."""


def read_json_object(path: Path) -> dict[str, Any]:
    """A file of a checkpoint that holds a JSON object.

    Raises:
        CheckpointError: It is not there or holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        there = ", ".join(sorted(p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else "no such folder"
        raise CheckpointError(
            f"{path.parent}: expected {path.name} as JSON, got {error}; the folder holds {there or 'nothing'}; was it cut short? "
            "save or fetch it again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}; save or fetch it again")
    return values


@contextlib.contextmanager
def written_aside(folder: Path, inner: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to write a checkpoint to, which is then moved into place.

    Of an existing folder the configuration is removed first and replaced last, so an interrupted move cannot be loaded.

    Args:
        folder: Of the checkpoint.
        inner: Its subfolders, which are replaced as a whole.
    """
    with temporary_folder(folder) as part:
        yield part
        if not folder.exists():
            part.rename(folder)
            return
        for old in [folder / CONFIG, *folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
        for name in inner:
            shutil.rmtree(folder / name, ignore_errors=True)
        for new in sorted(part.iterdir(), key=lambda path: path.name == CONFIG):
            new.replace(folder / new.name)


def is_policy(folder: Path) -> bool:
    """Whether a model's folder holds a policy, not a vision-language model."""
    return read_json_object(folder / CONFIG).get("model_type") == VLAConfig.model_type


def weights_in(folder: Path) -> list[Path]:
    """The files of a model's weights, each present and complete.

    Raises:
        CheckpointError: Which file is missing or cut short.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    names = (
        ["model.safetensors"]
        if single.is_file() or not index.is_file()
        else read_json_object(index).get("weight_map", {}).values()
    )
    paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        header_of(path)
    return paths


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and the offset of its data [byte].

    Raises:
        CheckpointError: It is missing or truncated.
    """
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*"))) or "nothing"
        raise CheckpointError(
            f"{path.parent}: expected weights in {path.name}, got none; the folder holds {there}; only safetensors are "
            "read: save or fetch it again"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < size else None
            ends = [v["data_offsets"][1] for name, v in header.items() if name != "__metadata__"] if header is not None else []
        except (ValueError, KeyError, TypeError, AttributeError):
            header, ends = None, []
    if header is None or size != 8 + length + max(ends, default=0):
        raise CheckpointError(
            f"{path}: expected a whole file of safetensors, got {size} bytes of another length than it says; it was cut "
            "short: save or fetch it again"
        )
    return header, 8 + length


def tensors_hash(folder: Path) -> str:
    """Hash (twelve characters) of the weights in a model's folder, however they are split into files.

    Covers names, types, shapes and values, adapters included; a separate base model is named in the configuration.

    Raises:
        CheckpointError: A file is missing or cut short.
    """
    paths = [*weights_in(folder), *sorted(folder.glob("adapter/*.safetensors"))]
    stamps = ((path, path.stat()) for path in paths)
    parts = [_tensors(str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ino, s.st_ctime_ns) for p, s in stamps]
    return config_hash({name: entry for part in parts for name, entry in part.items()})


@functools.lru_cache(maxsize=256)
def _tensors(path: str, *_: int) -> dict[str, Any]:
    """Type, shape and hash of the values of each tensor in a file; read once while the file does not change."""
    header, start = header_of(Path(path))
    entries = {}
    with Path(path).open("rb") as file:
        for name, tensor in header.items():
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                file.seek(start + first)
                entries[name] = [tensor["dtype"], tensor["shape"], _hash_of(file, end - first)]
    return entries


def _hash_of(file: Any, length: int) -> str:
    value = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 22))):
        value.update(block)
        length -= len(block)
    return value.hexdigest()


def read_config(folder: Path) -> Any:
    """The configuration in a policy's folder.

    Raises:
        CheckpointError: It is not a policy's, has unknown fields, or an unsupported combination.
    """
    values = read_json_object(folder / CONFIG)
    if values.get("model_type") != VLAConfig.model_type:
        raise CheckpointError(
            f"{folder / CONFIG}: expected a policy (model_type {VLAConfig.model_type!r}), got {values.get('model_type')!r}; "
            "make one of a vision-language model by make_policy"
        )
    with naming(folder / CONFIG):
        return checked(folder, VLAConfig.from_dict(values))


def checked(folder: Path, config: Any) -> Any:
    """The configuration, if this version supports it.

    Raises:
        CheckpointError: It has unknown fields, or an unsupported combination.
    """
    unknown = set(config.to_diff_dict()) - set(VLAConfig.__annotations__) - set(PreTrainedConfig().to_dict()) - {"architectures"}
    if unknown:
        raise CheckpointError(
            f"{folder}: unknown fields {sorted(unknown)} in {CONFIG}; was it saved by another version? load it with that one"
        )
    with naming(folder / CONFIG):
        check_structure(config)
        embodiments_of(config)
        if not config.stats:
            raise ValueError("expected statistics of 'action' and 'observation.state', got none; save a policy that was trained")
    return config


@contextlib.contextmanager
def naming(where: Path) -> Iterator[None]:
    """Turn errors of libraries into a `CheckpointError` that names the folder or file."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if str(where) in str(error) or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where}: expected what this version saves, got {type(error).__name__}: {error}; was it "
            "saved by another version, or changed?"
        ) from error


def policy_processor(folder: Path, config: Any) -> Any:
    """The processor in a policy's folder; a configuration without `image_tiling` is given what it does.

    Raises:
        CheckpointError: There is none, or it is another model's.
    """
    try:
        processor: Any = load_processor(folder, is_tiled=True)  # it is saved as it was trained with
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        there = ", ".join(sorted(p.name for p in folder.glob("*")))
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: expected the policy's processor (processor_config.json, tokenizer.json, tokenizer_config.json), "
            f"got {reason}; the folder holds {there}; save it with the policy: save_pretrained(folder, processor)"
        ) from error
    if "image_tiling" not in read_json_object(folder / CONFIG):  # saved before there was this field
        config.image_tiling = splits_images(processor.image_processor)
    act_id = processor.tokenizer.convert_tokens_to_ids(ACT)
    if act_id != config.act_id:
        raise CheckpointError(
            f"{folder}: expected a tokenizer in which {ACT} has id {config.act_id}, as in training; got {act_id}; the processor "
            "is of another model: save the policy's own with it"
        )
    return processor


def check_finite(folder: Path, model: Any) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        CheckpointError: Which ones.
    """
    wrong = [name for name, value in model.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{folder}: expected weights of finite numbers, got others in {', '.join(wrong[:5])}{' ...' * (len(wrong) > 5)} "
            f"({len(wrong)} in all); its training has diverged, or the file was damaged: restore or train it again"
        )
