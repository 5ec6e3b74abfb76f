"""Processors of any image-text-to-text family, also where a part that is never used here cannot be made.

A family's own processor turns images and text into what its model reads. Several families' processors hold a part for videos
that needs torchvision; where it is missing the rest is put together without it.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available

ACT = "<act>"


class NoVideos:
    """Stands where a processor keeps its part for videos."""

    merge_size = temporal_patch_size = 2


class WithoutVideos:
    """What a processor's class is mixed with so that it does without its part for videos."""

    _kept: dict[str, Any]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Any part will do."""
        return type(argument)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the parts for images and text, and the settings, as `load_processor` reads them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps(self._kept, indent=1))


def load_processor(name_or_path: str | Path) -> ProcessorMixin:
    """The processor of a vision-language model, with `<act>` in its tokenizer.

    Raises:
        ImportError: The family's processor needs a package that is not here, and cannot do without it.
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path)
    except (ImportError, ValueError):
        if is_torchvision_available():
            raise
        processor = _assembled(str(name_or_path))
    if ACT not in processor.tokenizer.get_vocab():
        processor.tokenizer.add_special_tokens({"extra_special_tokens": [ACT]}, replace_extra_special_tokens=False)
    return processor


def _assembled(name_or_path: str) -> Any:
    """The family's processor from its parts for images and text."""
    path = cached_file(name_or_path, "processor_config.json", _raise_exceptions_for_missing_entries=False)
    kept = json.loads(Path(path).read_text()) if path else {}
    named = getattr(transformers, kept.get("processor_class", ""), None)
    family: Any = named or PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name_or_path))]
    settings = {k: v for k, v in kept.items() if not isinstance(v, dict) and k not in ("processor_class", "auto_map")}
    images, tokenizer = AutoImageProcessor.from_pretrained(name_or_path), AutoTokenizer.from_pretrained(name_or_path)
    made = type(family.__name__, (WithoutVideos, family), {"_kept": {**settings, "processor_class": family.__name__}})
    return made(images, tokenizer, video_processor=NoVideos(), chat_template=tokenizer.chat_template, **settings)
