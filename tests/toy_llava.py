"""A tiny LLaVA: another class than SmolVLM's, a flat batch of images, a tokenizer without `<act>`."""

import torch
from tokenizers import Tokenizer
from toy_data import TEXTS
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rvlm.vlm.processors import ACT
from rvlm.vlm.small import train_tokenizer


def tokenizer_without_act():
    """The toys' tokenizer, without `<act>`."""
    words = train_tokenizer(TEXTS, [])
    inner = words.backend_tokenizer.to_str().replace(ACT, "<unused>")
    special = {name: getattr(words, name) for name in ("pad_token", "bos_token", "eos_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(inner), **special)


def save_llava(folder):
    tokenizer = tokenizer_without_act()
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, num_hidden_layers=2, image_size=48, patch_size=12),
        text_config=LlamaConfig(
            **layers, num_hidden_layers=1, num_key_value_heads=4, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    part = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        part, tokenizer, patch_size=12, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
