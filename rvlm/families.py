"""Tiny vision-language models of many families, built offline with random weights: one entry makes a folder.

They show what a family's code does, in seconds and without a download; what they say means nothing. A new family is one more
entry of `FAMILIES`, with its builder in `rvlm.family_models` and the form of its prompts in `rvlm.family_templates`; the tests go
through them all.
"""

from pathlib import Path

import torch

from rvlm import family_models as models
from rvlm import family_templates as templates
from rvlm.family_models import SIDE, TEXTS
from rvlm.files import artifacts_dir, digest

__all__ = ["FAMILIES", "REFUSED", "SIDE", "TEXTS", "tiny_vlm"]

REFUSED = {models.blip: "reads its prompt elsewhere"}
FAMILIES = {
    build.__name__: build
    for build in (
        models.smolvlm,
        models.idefics3,
        models.paligemma,
        models.qwen2_vl,
        models.qwen2_5_vl,
        models.qwen3_vl,
        models.qwen3_5,
        models.llava,
        models.llava_next,
        models.llava_onevision,
        models.internvl,
        models.gemma3,
        models.kosmos2,
        models.idefics,
        models.idefics2,
        models.mllama,
        models.florence2,
    )
}


def tiny_vlm(name: str) -> str:
    """Folder of a tiny model of a family, made once; any other name (a folder, one on the Hub) is given back.

    Args:
        name: A key of `FAMILIES` or the name of a function in `REFUSED`, such as "qwen2_5_vl".
    """
    build = (FAMILIES | {refused.__name__: refused for refused in REFUSED}).get(name)
    if build is None:
        return name
    code = "-".join(digest(Path(str(module.__file__)))[:8] for module in (models, templates))
    final = artifacts_dir() / "stages" / f"tiny-{name}-{code}"
    if not final.exists():
        partial = final.with_name(final.name + ".partial")
        torch.manual_seed(0)
        partial.mkdir(parents=True, exist_ok=True)
        build(partial)
        partial.replace(final)
    return str(final)
