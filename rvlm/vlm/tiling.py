"""Tiles: families that read an image in parts, each as large as the vision tower's input, besides the whole image.

A tile costs as many tokens as an image that is not split, and one pass of the vision tower. SmolVLM enlarges each image to four
by four tiles first, so that an image of one tile's size costs 17.
"""

import copy
from typing import Any

from transformers import PreTrainedConfig

ONE_TILE: dict[str, dict[str, Any]] = {  # setting by which image processors tile -> the values with which they do not
    "do_image_splitting": {"do_image_splitting": False},  # SmolVLM, Idefics3, Idefics2
    "crop_to_patches": {"crop_to_patches": False, "min_patches": 1, "max_patches": 1},  # InternVL, whose processor asks for it
    "do_pan_and_scan": {"do_pan_and_scan": False},  # Gemma 3
    "vision_input_type": {"vision_input_type": "vanilla", "max_num_tiles": 1},  # PerceptionLM
    "resize_to_max_canvas": {"max_patches": 1},  # Llama 4; in Kosmos-2.5, max_patches is the length of an image's sequence
    "dynamic_hd": {"dynamic_hd": 1},  # Phi-4-multimodal
    "split_image": {"split_image": False},  # Aria
}


def use_one_tile(image_processor: Any) -> None:
    """Set a family's image processor to one tile an image.

    LLaVA-NeXT, LLaVA-OneVision and Phi-4-multimodal give the image twice, as the whole and as its only tile. Mllama's
    architecture pads images to a fixed number of tiles; one of a tile's size is one tile there, and a larger or oblong one
    several. A family that tiles by settings not in `ONE_TILE` still does.
    """
    for setting, values in ONE_TILE.items():
        if hasattr(image_processor, setting):
            for name, value in values.items():
                setattr(image_processor, name, value)
    if hasattr(image_processor, "max_image_size"):  # an image would be enlarged to the size of all tiles, then reduced to one
        image_processor.size = image_processor.max_image_size
    if hasattr(image_processor, "image_grid_pinpoints"):
        side = _tile_side(image_processor)
        image_processor.image_grid_pinpoints = [[side, side]]


def splits_images(image_processor: Any) -> bool:
    """Whether an image processor splits images otherwise than `use_one_tile` lets it."""
    one_tile = copy.deepcopy(image_processor)
    use_one_tile(one_tile)
    return one_tile.to_dict() != image_processor.to_dict()


def _tile_side(image_processor: Any) -> int:
    """Side of a tile of LLaVA-NeXT's and LLaVA-OneVision's image processors [px]."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size.get("height") or size["shortest_edge"]


def use_grid_of(config: PreTrainedConfig, processor: Any) -> None:
    """Give a model's configuration the grid of tiles that its processor cuts: LLaVA-NeXT and LLaVA-OneVision have it in both."""
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
