"""Tiny vision-language models of many families, built offline with random weights.

They exercise a family's code in seconds, without a download; their outputs are meaningless. A new family is one more entry of
`FAMILIES`, with its builder in `rvlm.vlm.tiny_models` and its chat template in `rvlm.vlm.tiny_templates`; the tests cover all.
"""

from pathlib import Path

import torch

from rvlm.files import artifacts_dir, file_hash
from rvlm.vlm import tiny_models, tiny_templates
from rvlm.vlm.tiny_models import SIDE, TOKENIZER_TEXTS

__all__ = ["FAMILIES", "SIDE", "TOKENIZER_TEXTS", "UNSUPPORTED", "tiny_vlm"]

UNSUPPORTED = {tiny_models.blip: "exposes no hidden states of its text"}
FAMILIES = {
    build.__name__: build
    for build in (
        tiny_models.smolvlm,
        tiny_models.idefics3,
        tiny_models.paligemma,
        tiny_models.qwen2_vl,
        tiny_models.qwen2_5_vl,
        tiny_models.qwen3_vl,
        tiny_models.qwen3_5,
        tiny_models.llava,
        tiny_models.llava_next,
        tiny_models.llava_onevision,
        tiny_models.internvl,
        tiny_models.gemma3,
        tiny_models.kosmos2,
        tiny_models.idefics,
        tiny_models.idefics2,
        tiny_models.mllama,
        tiny_models.florence2,
    )
}


def tiny_vlm(name: str) -> str:
    """Folder of a family's tiny model, built once; any other name (a folder, a model on the Hub) is returned unchanged.

    Args:
        name: A key of `FAMILIES`, such as "qwen2_5_vl", or the name of a builder in `UNSUPPORTED`.
    """
    build = (FAMILIES | {builder.__name__: builder for builder in UNSUPPORTED}).get(name)
    if build is None:
        return name
    code = "-".join(file_hash(Path(str(module.__file__)))[:8] for module in (tiny_models, tiny_templates))
    final = artifacts_dir() / "stages" / f"tiny-{name}-{code}"
    if not final.exists():
        partial = final.with_name(final.name + ".partial")
        torch.manual_seed(0)
        partial.mkdir(parents=True, exist_ok=True)
        build(partial)
        partial.replace(final)
    return str(final)
