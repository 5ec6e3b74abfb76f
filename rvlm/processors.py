"""Processors of any image-text-to-text family, also where a part that is never used here cannot be made.

A family's own processor turns images and text into what its model reads. Several families' processors hold a part for videos
that needs torchvision; where it is missing the rest is put together without it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available

ACT = "<act>"
LAYOUTS = ("marked", "listed", "first")


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
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
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
    family: Any = named or PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name_or_path, trust_remote_code=False))]
    settings = {k: v for k, v in kept.items() if not isinstance(v, dict) and k not in ("processor_class", "auto_map")}
    images, tokenizer = (of.from_pretrained(name_or_path, trust_remote_code=False) for of in (AutoImageProcessor, AutoTokenizer))
    made = type(family.__name__, (WithoutVideos, family), {"_kept": {**settings, "processor_class": family.__name__}})
    return made(images, tokenizer, video_processor=NoVideos(), chat_template=tokenizer.chat_template, **settings)


def image_mark(processor: Any) -> str:
    """The word that stands for an image in a family's prompts."""
    return getattr(processor, "image_token", None) or "<image>"


def layout(processor: Any, image_size: int) -> str:
    """How a family's processor takes images and text, found by trying with one blank image.

    "marked": each image by a token in the text; "listed": images and texts as one list, in their order; "first": one image for
    each text, which the processor sets before it.

    Raises:
        ValueError: It takes them in none of these ways; with what it said.
    """
    blank, said = np.zeros((image_size, image_size, 3), np.uint8), []
    ways: dict[str, Any] = {"listed": (None, [[blank, ACT]]), "first": ([blank], [ACT])}
    if isinstance(getattr(processor, "image_token", None), str):
        ways = {"marked": ([[blank]], [processor.image_token + ACT]), **ways}
    for name, (images, text) in ways.items():
        try:
            if "pixel_values" in processor(images=images, text=text, return_tensors="pt"):
                return name
        except (TypeError, ValueError, AttributeError) as error:
            said.append(f"{name}: {error}")
    raise ValueError(
        f"expected a processor that takes images with text, {', '.join(LAYOUTS)}; got {type(processor).__name__}, which says "
        f"{'; '.join(said)}; take a family that reads images as tokens of its text, such as SmolVLM or Qwen-VL"
    )


def markup(processor: Any) -> tuple[str, str, str]:
    """How a family writes a prompt: what stands before all, an image, and what follows the text, up to the answer.

    Read from its chat template, rendered with one image and with two; without a template it is the bare image token.
    """
    word = "TEXT"

    def rendered(n: int) -> str:
        content = [{"type": "image"}] * n + [{"type": "text", "text": word}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    if not getattr(processor, "chat_template", None):
        return "", image_mark(processor), ""
    one, two = rendered(1), rendered(2)
    start, length = one.index(word), len(two) - len(one)
    return one[: start - length], one[start - length : start], one[start + len(word) :]
