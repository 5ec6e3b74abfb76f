"""Models of `benchmarks/gpu.py`: real configurations with random weights, our tokenizer, and noise as images.

"true" is a model of `rvlm/assets/shapes.json`; "tiny" the smallest one of its family (`rvlm/vlm/tiny_models.py`).
"""

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any


class StandIn(types.ModuleType):
    """In place of a package whose import alone is needed: every name is a type that takes any shape."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, shape: Any)})


# Shapes in annotations, which are then not checked; and what SmolVLM's processor reads the lengths of videos with.
for missing in ("jaxtyping", "num2words"):
    if importlib.util.find_spec(missing) is None:
        sys.modules[missing] = StandIn(missing)

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from rvlm.data.actions import ActionSpec
from rvlm.data.normalization import StatsAccumulator
from rvlm.policy.collation import RobotCollator
from rvlm.policy.config import VLAConfig
from rvlm.policy.factory import set_trainable
from rvlm.policy.model import VLA
from rvlm.training.memory_plan import hub_configs
from rvlm.vlm.backbones import SMALL_VLM, language_model
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.quantization import nf4_config
from rvlm.vlm.tiny import tiny_vlm
from rvlm.vlm.tiny_models import image_processor
from rvlm.vlm.tiny_templates import CHAT_FORMATS

SPEC = ActionSpec.from_card("tabletop_franka7")
TEXT = "push the red cube towards the camera"
LORA_RANK = 16


def random_stats(width):
    return StatsAccumulator().update(np.random.default_rng(0).uniform(-1, 1, (100, width))).finish()


STATS = {"action": random_stats(7), "observation.state": random_stats(7)}


# -- configuration and processor ----------------------------------------------------------------------------------------
def vlm_folder(name, size, home):
    """Folder with configuration and processor of a model, without weights that are read."""
    family = hub_configs()[name][0].model_type
    if size == "tiny":
        return Path(tiny_vlm(family))
    folder = Path(home) / name
    if not (folder / "config.json").exists():
        WRITERS[family](folder, *hub_configs()[name])
    return folder


def our_tokenizer(family, extra=()):
    """The shipped tokenizer with the special tokens and the chat template of a family."""
    ours, chat = AutoTokenizer.from_pretrained(SMALL_VLM), CHAT_FORMATS.get(family, {})
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, **named)
    special = [*ours.all_special_tokens, *extra, *chat.get("special_tokens", ())]
    tokenizer.add_special_tokens({"extra_special_tokens": [token for token in special if token not in named.values()]})
    tokenizer.chat_template = chat.get("template")
    return tokenizer


def _smolvlm(folder, config, n_image_tokens):
    tokenizer, side = our_tokenizer("smolvlm"), {"longest_edge": config.vision_config.image_size}
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    images = image_processor("smolvlm", "SmolVLM", size=side, max_image_size=side, do_image_splitting=False)
    _save(folder, config, images, tokenizer, image_seq_len=n_image_tokens, processor_class="SmolVLMProcessor")


def _paligemma(folder, config, n_image_tokens):
    side = config.vision_config.image_size
    images = image_processor("siglip", "Siglip", size={"height": side, "width": side})
    images.image_seq_length = n_image_tokens
    processor = transformers.PaliGemmaProcessor(images, our_tokenizer("paligemma"))
    config.image_token_id = processor.image_token_id
    _save(folder, config, processor)


def _qwen2_5_vl(folder, config, n_image_tokens):
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokenizer, vision = our_tokenizer("qwen2_5_vl", names.values()), config.vision_config
    for key, token in names.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    n_pixels = n_image_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    images = image_processor("qwen2_vl", "Qwen2VL", **sizes, min_pixels=n_pixels, max_pixels=n_pixels)
    _save(folder, config, images, tokenizer)


WRITERS = {"smolvlm": _smolvlm, "paligemma": _paligemma, "qwen2_5_vl": _qwen2_5_vl}


def _save(folder, config, *parts, **processor):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)
    if processor:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    config.save_pretrained(folder)


# -- policy -------------------------------------------------------------------------------------------------------------
def random_policy(folder, settings, finetuning, dtype, device):
    """A policy around random weights that are made on the device, and its processor.

    Args:
        folder: Of `vlm_folder`.
        settings: Fields of `VLAConfig`.
        finetuning: As of `set_trainable`.
        dtype: Of the backbone.
        device: Of all of it.
    """
    processor, config = load_processor(folder), AutoConfig.from_pretrained(folder)
    with torch.device(device):
        backbone = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if finetuning == "qlora":
            quantize(backbone, folder, dtype)
        act_id = processor.tokenizer.convert_tokens_to_ids(ACT)
        stats = {name: s.to_dict() for name, s in STATS.items()}
        derived = {"act_id": act_id, "backbone": config.to_dict(), "spec": SPEC.to_dict(), "stats": stats}
        model = VLA(VLAConfig(**derived, **settings), backbone)
        set_trainable(model, finetuning, LORA_RANK, {"name": "random"})
    model.processor = processor
    return model, processor


def quantize(backbone, folder, dtype):
    """Replace the language model's linear layers, one by one, by 4-bit ones of their weights.

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    settings = nf4_config(folder, dtype=dtype)
    import bitsandbytes as bnb

    options = {"compute_dtype": dtype, "quant_type": settings.bnb_4bit_quant_type}
    options["compress_statistics"] = settings.bnb_4bit_use_double_quant
    for parent in language_model(backbone).modules():
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                with torch.device("meta"):
                    small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
                statistics = {"quant_type": small.weight.quant_type, "compress_statistics": small.weight.compress_statistics}
                small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=small, **statistics)
                small.bias, small._is_hf_initialized = layer.bias, True  # else the library draws its weights
                setattr(parent, name, small.to(layer.weight.device))
    backbone.is_loaded_in_4bit = True  # peft then wraps 4-bit layers
    backbone.requires_grad_(False)


# -- inputs -------------------------------------------------------------------------------------------------------------
def noise_images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def random_samples(model, prompt_builder, n):
    """n samples in the format of `Windows`, with images of the model's own size."""
    rng, config, side = np.random.default_rng(0), model.config, prompt_builder.image_size
    t, k, a = config.n_obs_steps, config.chunk_size, len(SPEC.names)
    images = noise_images(n, t, len(config.cameras), side, side)
    masks = {"action_mask": np.ones((t, k, a), bool), "obs_mask": np.ones(t, bool), "dataset_index": 0}
    return [
        {
            "images": images[i],
            "state": rng.normal(size=(t, len(SPEC.state_names))).astype(np.float32),
            "action": rng.uniform(0, 1, (t, k, a)).astype(np.float32),
            "instruction": TEXT,
            **masks,
        }
        for i in range(n)
    ]


def random_batch(model, processor, n, device):
    """A batch of n samples on the device."""
    prompt_builder = model.prompt_builder(processor)
    batch = RobotCollator(prompt_builder)(random_samples(model, prompt_builder, n))
    return {name: value.to(device) for name, value in batch.items()}


def token_counts(folder):
    """Tokens of an image, and of the prompt without images and `<act>`."""
    prompt_builder = PromptBuilder(load_processor(folder), 1)
    ids = prompt_builder.token_ids(TEXT)
    n_image_tokens = sum(i in prompt_builder.image_token_ids for i in ids)
    return n_image_tokens, len(ids) - n_image_tokens - 1


def observations(model, prompt_builder, n):
    """n observations of one robot."""
    side = prompt_builder.image_size
    return [
        [
            {
                "images": {"static": first, "wrist": second},
                "state": np.zeros(len(SPEC.state_names), np.float32),
                "instruction": TEXT,
            }
        ]
        for first, second in noise_images(n, 2, side, side)
    ]
