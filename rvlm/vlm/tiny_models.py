"""Builders of tiny vision-language models with random weights, one a family: each saves model and processor to a folder."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from rvlm.vlm.processors import ACT
from rvlm.vlm.small import train_tokenizer
from rvlm.vlm.tiny_templates import CHAT_FORMATS

SIDE, PATCH = 48, 12
TOKENIZER_TEXTS = ["lift the red cube", "push the blue ball left", "open the drawer"]
LAYER_CONFIG: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION_CONFIG: dict[str, Any] = {**LAYER_CONFIG, "image_size": SIDE, "patch_size": PATCH}


def tiny_tokenizer(family: str, extra: Sequence[str] = (), **named: str) -> Any:
    """A family's tokenizer with its chat template; `named` are special tokens that its processor looks up by name."""
    chat = CHAT_FORMATS.get(family, {})
    tokenizer = train_tokenizer(TOKENIZER_TEXTS, [*extra, *chat.get("special_tokens", ()), *named.values()])
    if named:
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special, extra_special_tokens=named)
    if chat.get("adds_bos"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = chat.get("template")
    return tokenizer


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Configuration of a one-layer language model, with 8 spare embedding rows."""
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    size: dict[str, Any] = {"num_key_value_heads": 4, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 512}
    return {**LAYER_CONFIG, **size, **ids, **more}


def image_processor(family: str, kind: str, **settings: Any) -> Any:
    """An image processor that needs no torchvision."""
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{kind}ImageProcessorPil")(**settings)


def save_checkpoint(folder: Path, config: Any, *parts: Any, **processor: Any) -> None:
    """Save model and processor parts, and the processor's settings if its class needs torchvision."""
    model = AutoModelForImageTextToText.from_config(config)
    for name, weight in model.named_parameters():  # a projector initialised to zeros would ignore images
        if not weight.any() and "bias" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    for part in (model, *parts):
        part.save_pretrained(folder)
    if processor:
        (folder / "processor_config.json").write_text(json.dumps(processor))


def qwen(folder: Path, family: str, config: str, vision: dict[str, Any], **language: Any) -> None:
    """Qwen2-VL and its successors: images of any size, multimodal rotary positions by row and column."""
    tokenizer = tiny_tokenizer(family, ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    id_of = tokenizer.convert_tokens_to_ids
    names: dict[str, Any] = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 8, **vision}
    vlm_config = getattr(transformers, config)(
        vision_config=vision,
        text_config=text_config(tokenizer, rope_parameters=rope, **language),
        **{key: id_of(f"<|{name}|>") for key, name in names.items()},
    )
    part = image_processor("qwen2_vl", "Qwen2VL", patch_size=8, merge_size=2, min_pixels=16**2, max_pixels=SIDE**2)
    save_checkpoint(folder, vlm_config, part, tokenizer)


def qwen2_vl(folder: Path) -> None:
    """Every image at its native resolution."""
    qwen(folder, "qwen2_vl", "Qwen2VLConfig", {"embed_dim": 32, "mlp_ratio": 2})


def qwen2_5_vl(folder: Path) -> None:
    """Window attention in the vision tower."""
    vision: dict[str, Any] = {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 32, "fullatt_block_indexes": [0]}
    qwen(folder, "qwen2_5_vl", "Qwen2_5_VLConfig", vision)


def qwen3_vl(folder: Path) -> None:
    """DeepStack: features of several vision layers enter the language model."""
    vision: dict[str, Any] = {"out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}
    qwen(folder, "qwen3_vl", "Qwen3VLConfig", {**vision, "deepstack_visual_indexes": [0]}, head_dim=8)


def qwen3_5(folder: Path) -> None:
    """Layers of linear and of full attention alternate."""
    vision: dict[str, Any] = {"out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}
    linear: dict[str, Any] = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    linear |= {f"linear_num_{part}_heads": 4 for part in ("key", "value")}
    kinds = ["linear_attention", "full_attention"]
    qwen(folder, "qwen3_5", "Qwen3_5Config", vision, head_dim=32, num_hidden_layers=2, layer_types=kinds, **linear)


def paligemma(folder: Path) -> None:
    """Prefix-LM (bidirectional) attention over the prompt."""
    part = image_processor("siglip", "Siglip", size={"height": SIDE, "width": SIDE})
    part.image_seq_length = (SIDE // PATCH) ** 2
    processor = transformers.PaliGemmaProcessor(part, tiny_tokenizer("paligemma"))
    vision: dict[str, Any] = {**VISION_CONFIG, "projection_dim": 32, "model_type": "siglip_vision_model"}
    language = text_config(processor.tokenizer, head_dim=8, model_type="gemma")
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=language, projection_dim=32, image_token_index=processor.image_token_id
    )
    save_checkpoint(folder, config, processor)


def gemma3(folder: Path) -> None:
    """Begin and end tokens around each image."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tiny_tokenizer("gemma3", **named)
    part = image_processor("gemma3", "Gemma3", size={"height": SIDE, "width": SIDE})
    ids: dict[str, Any] = {"image_token_index": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"}
    config = transformers.Gemma3Config(
        vision_config=VISION_CONFIG,
        text_config=text_config(tokenizer, head_dim=8),
        mm_tokens_per_image=4,
        **{key: tokenizer.convert_tokens_to_ids(named[name]) for key, name in ids.items()},
    )
    save_checkpoint(folder, config, transformers.Gemma3Processor(part, tokenizer, image_seq_length=4))


def internvl(folder: Path) -> None:
    """Pixel shuffle: each four patches make one token."""
    named: dict[str, Any] = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = tiny_tokenizer("internvl", **named, context_image_token="<IMG_CONTEXT>", video_token="<video>")
    part = image_processor("got_ocr2", "GotOcr2", size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
    config = transformers.InternVLConfig(
        vision_config={**VISION_CONFIG, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=text_config(tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    save_checkpoint(folder, config, part, tokenizer, image_seq_length=4, processor_class="InternVLProcessor")


def llava_onevision(folder: Path) -> None:
    """Images in tiles (here one), with a newline token after each row."""
    tokenizer = tiny_tokenizer("llava_onevision", ["<video>"])
    part = image_processor(
        "llava_onevision", "LlavaOnevision", size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=[[SIDE, SIDE]]
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config={**VISION_CONFIG, "model_type": "siglip_vision_model"},
        text_config=text_config(tokenizer, model_type="qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    settings: dict[str, Any] = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
    save_checkpoint(folder, config, part, tokenizer, **settings, processor_class="LlavaOnevisionProcessor")


def llava(folder: Path, family: str = "llava", name: str = "Llava", cut: dict[str, Any] | None = None) -> None:
    """A CLIP vision tower, a two-layer projector, a language model."""
    tokenizer, kind = tiny_tokenizer(family), ("clip", "CLIP") if cut is None else (family, name)
    part = image_processor(*kind, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **cut or {})
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION_CONFIG, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
        text_config=text_config(tokenizer, model_type="llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        **cut or {},
    )
    settings: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
    settings["num_additional_image_tokens"] = 1
    save_checkpoint(folder, config, getattr(transformers, f"{name}Processor")(part, tokenizer, **settings))


def llava_next(folder: Path) -> None:
    """AnyRes: the whole image, and tiles that depend on its aspect ratio."""
    shapes = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [SIDE, SIDE]]
    llava(folder, "llava_next", "LlavaNext", {"image_grid_pinpoints": shapes})


def idefics3(folder: Path, name: str = "Idefics3") -> None:
    """Pixel shuffle; images anywhere in the text."""
    tokenizer, side = tiny_tokenizer(name.lower()), {"longest_edge": SIDE}
    part = image_processor(name.lower(), name, size=side, max_image_size=side, do_image_splitting=False)
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION_CONFIG,
        text_config=text_config(tokenizer, model_type="llama"),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_checkpoint(folder, config, part, tokenizer, image_seq_len=4, processor_class=f"{name}Processor")


def smolvlm(folder: Path) -> None:
    """Idefics3's successor."""
    idefics3(folder, "SmolVLM")


def idefics2(folder: Path) -> None:
    """Native aspect ratios, padded to the largest image; a perceiver resampler makes a few tokens of each."""
    tokenizer, edges = tiny_tokenizer("idefics2"), {"shortest_edge": SIDE // 2, "longest_edge": SIDE}
    part = image_processor("idefics2", "Idefics2", size=edges, do_image_splitting=False)
    resampler: dict[str, Any] = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = transformers.Idefics2Config(
        vision_config=VISION_CONFIG,
        perceiver_config={**resampler, "num_key_value_heads": 4, "hidden_size": 32},
        text_config=text_config(tokenizer, model_type="mistral"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_checkpoint(folder, config, transformers.Idefics2Processor(part, tokenizer, image_seq_len=4))


def mllama(folder: Path) -> None:
    """Cross-attention to images, in tiles that depend on their aspect ratio."""
    tokenizer = tiny_tokenizer("mllama", ["<|image|>", "<|python_tag|>"])
    part = image_processor("mllama", "Mllama", size={"height": SIDE, "width": SIDE}, max_image_tiles=2)
    heads: dict[str, Any] = {"attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64}
    tiles: dict[str, Any] = {"max_num_tiles": 2, "intermediate_layers_indices": [0]}
    vision = {key: value for key, value in VISION_CONFIG.items() if key != "num_attention_heads"}
    config = transformers.MllamaConfig(
        vision_config={**vision, **heads, **tiles, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        text_config=text_config(tokenizer, num_hidden_layers=2, cross_attention_layers=[1]),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    save_checkpoint(folder, config, transformers.MllamaProcessor(part, tokenizer))


def kosmos2(folder: Path) -> None:
    """One image per text, which its processor puts first."""
    n_image_tokens = 64  # the processor numbers their ids from <unk> on
    tags = ["<image>", "</image>", "<phrase>", "</phrase>", "<object>", "</object>", "<grounding>"]
    tokenizer = tiny_tokenizer("kosmos2", ["<unk>", *(f"<image{i}>" for i in range(n_image_tokens)), *tags])
    tokenizer.unk_token = "<unk>"
    part = image_processor("clip", "CLIP", size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = transformers.Kosmos2Processor(part, tokenizer, num_patch_index_tokens=4)
    size: dict[str, Any] = {"embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4, "max_position_embeddings": 512}
    language: dict[str, Any] = {**size, "vocab_size": len(tokenizer), "pad_token_id": 0, "dropout": 0.0}
    config = transformers.Kosmos2Config(vision_config=VISION_CONFIG, text_config=language, latent_query_num=n_image_tokens)
    save_checkpoint(folder, config, processor)


def idefics(folder: Path) -> None:
    """Open Flamingo: cross-attention to images; a second embedding table for added tokens."""
    tokenizer = tiny_tokenizer("idefics")
    vocab_size = tokenizer.convert_tokens_to_ids(ACT)
    vision: dict[str, Any] = {"embed_dim": 32, "image_size": SIDE, "patch_size": PATCH, "intermediate_size": 64}
    config = transformers.IdeficsConfig(
        **LAYER_CONFIG,
        vision_config={**vision, "num_attention_heads": 4, "num_hidden_layers": 1},
        vocab_size=vocab_size,
        additional_vocab_size=len(tokenizer) - vocab_size,
        cross_layer_interval=1,
    )
    save_checkpoint(
        folder,
        config,
        transformers.IdeficsProcessor(image_processor("idefics", "Idefics", image_size=SIDE), tokenizer, image_size=SIDE),
    )


def florence2(folder: Path) -> None:
    """An encoder-decoder: the encoder reads images and prompt."""
    tokenizer = tiny_tokenizer("florence2", image_token="<image>")
    part = image_processor("clip", "CLIP", size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    part.image_seq_length = 37
    stages: dict[str, Any] = {"embed_dim": [8, 8], **{name: [1, 1] for name in ("num_heads", "num_groups", "depths")}}
    patches: dict[str, Any] = {
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
    }
    layers: dict[str, Any] = {f"{stack}_layers": 1 for stack in ("encoder", "decoder")}
    layers |= {f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")}
    config = transformers.Florence2Config(
        vision_config={**stages, **patches, "patch_prenorm": [False, True], "window_size": 3, "projection_dim": 32},
        text_config={**layers, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": len(tokenizer) + 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_checkpoint(folder, config, transformers.Florence2Processor(part, tokenizer))


def blip(folder: Path) -> None:
    """A cross-attention decoder reads the text; its hidden states are not exposed."""
    part = image_processor("blip", "Blip", size={"height": SIDE, "width": SIDE})
    processor = transformers.BlipProcessor(part, tiny_tokenizer("blip"))
    language = text_config(processor.tokenizer, encoder_hidden_size=32)
    save_checkpoint(
        folder, transformers.BlipConfig(vision_config=VISION_CONFIG, text_config=language, projection_dim=32), processor
    )
