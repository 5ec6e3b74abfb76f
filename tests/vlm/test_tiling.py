"""One tile an image by default, in families that split images; the tiles if asked for."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from toy_policies import SPEC
from transformers import AutoConfig
from transformers.utils import is_torchvision_available

from rvlm.envs.tabletop.rendered_scenes import make_scenes
from rvlm.policy.factory import load_vla, make_policy, modify_policy
from rvlm.policy.inspection import inspect_vlm
from rvlm.training.memory_plan import hub_configs, hub_n_tiles, plan_memory
from rvlm.training.stages import DETECTION, VISION_LANGUAGE, Stage
from rvlm.training.trainer import train_stage_in_process
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.tiling import use_one_tile
from rvlm.vlm.tiny import FAMILIES, SIDE

SPLITS = {"do_image_splitting": True, "size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
GRID = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
TILING = {  # family -> settings of the library's default, and tokens of an image of a tile's size with one tile and with tiles
    "smolvlm": (SPLITS, 4, 17 * 4),
    "idefics3": (SPLITS, 4, 17 * 4),
    "idefics2": ({"do_image_splitting": True}, 4, 5 * 4),
    "internvl": ({"crop_to_patches": True, "min_patches": 2}, 4, 5 * 4),
    "llava_next": (GRID, 2 * 16 + 4, 16 + 2 * 16 // 2 + 4),
}


def tiling_vlm(folder, family, settings=None, **own):
    """A tiny model whose processor splits images, as its family's does on the Hub."""
    torch.manual_seed(0)
    FAMILIES[family](folder)
    names = [name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).exists()]
    values = json.loads((folder / names[0]).read_text())
    values.get("image_processor", values).update(TILING[family][0] if settings is None else settings)
    (folder / names[0]).write_text(json.dumps(values))
    if own:
        path = folder / "processor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **(GRID if family == "llava_next" else {})}))
    return folder


def n_image_tokens(processor, side):
    prompt_builder = PromptBuilder(processor, 1)
    batch = prompt_builder(np.zeros((1, 1, side, side, 3), np.uint8), ["lift it"])
    ids = prompt_builder.token_ids("lift it")
    assert batch["input_ids"][0].tolist() == ids
    return sum(i in prompt_builder.image_token_ids for i in ids), prompt_builder.image_size


@pytest.fixture(scope="module")
def scenes(toy_home):
    return str(make_scenes(toy_home / "tiling", "franka7", 1000, 4, SIDE))


@pytest.mark.parametrize("family", TILING)
def test_an_image_is_one_tile_unless_tiles_are_asked_for(family, tmp_path, toy_stats):
    """Also in the saved policy, and in the policy made of that."""
    vlm, (_, one, several) = tiling_vlm(tmp_path, family), TILING[family]
    for is_tiled, expected in ((False, one), (True, several)):
        assert n_image_tokens(load_processor(vlm, is_tiled), SIDE) == (expected, SIDE), is_tiled
        assert inspect_vlm(vlm, is_tiled)[["image size [px]", "tokens per image"]].tolist() == [SIDE, expected]
        model, processor = make_policy(vlm, SPEC, toy_stats, cameras=["static"], chunk_size=2, image_tiling=is_tiled)
        model.save_pretrained(tmp_path / "policy", processor)
        _, loaded = load_vla(tmp_path / "policy")
        assert n_image_tokens(loaded, SIDE) == (expected, SIDE), is_tiled
        with pytest.raises(ValueError, match=f"expected image_tiling={is_tiled}, as it was trained; got {not is_tiled}; leave"):
            modify_policy(tmp_path / "policy", image_tiling=not is_tiled)
        path = tmp_path / "policy" / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "image_tiling"}))
        assert load_vla(path.parent)[0].config.image_tiling == is_tiled, "of a policy that was saved before there was this field"


@pytest.mark.parametrize(
    ("family", "kind"), [("smolvlm", DETECTION), ("smolvlm", VISION_LANGUAGE), ("internvl", VISION_LANGUAGE)]
)
def test_a_trained_vision_language_model_has_the_tiles_of_the_one_it_was_trained_of(family, kind, scenes, tmp_path, toy_stats):
    vlm, (_, one, several) = tiling_vlm(tmp_path / "vlm", family), TILING[family]
    train_stage_in_process(Stage("young", kind, (scenes,), str(vlm), 4, batch_size=4, n_processes=1), tmp_path)
    for is_tiled, expected in ((False, one), (True, several)):
        settings = {"cameras": ["static"], "chunk_size": 2, "image_tiling": is_tiled}
        _, processor = make_policy(tmp_path / "model", SPEC, toy_stats, **settings)
        assert n_image_tokens(processor, SIDE) == (expected, SIDE), is_tiled


@pytest.mark.skipif(not is_torchvision_available(), reason="their image processors need torchvision")
@pytest.mark.parametrize(
    ("name", "settings", "n_tiles"),
    [
        ("PerceptionLMImageProcessor", {}, 1),
        ("Llama4ImageProcessor", {}, 1),
        ("Phi4MultimodalImageProcessor", {}, 2),  # the whole, and its only tile
        ("Lfm2VlImageProcessor", {}, 1),
        ("AriaImageProcessor", {"split_image": True}, 1),
    ],
)
def test_families_without_a_tiny_model_make_one_tile_of_a_wide_image(name, settings, n_tiles):
    image_processor, wide = getattr(transformers, name)(**settings), [Image.new("RGB", (2000, 1400))]

    def n_made():
        output = image_processor(wide, return_tensors="pt")
        pixels = output["pixel_values" if "pixel_values" in output else "image_pixel_values"]
        return pixels.shape[:-3].numel() if pixels.ndim > 3 else len(pixels)  # LFM2-VL's are lists of patches

    assert n_made() > n_tiles
    use_one_tile(image_processor)
    assert n_made() == n_tiles


def test_a_policy_with_a_referenced_backbone_keeps_one_tile(tmp_path, toy_stats):
    """The grid of LLaVA-NeXT stands in the model too, which is loaded anew."""
    vlm = tiling_vlm(tmp_path / "vlm", "llava_next")
    model, processor = make_policy(vlm, SPEC, toy_stats, finetuning="head", cameras=["static"], chunk_size=2)
    model.save_pretrained(tmp_path / "policy", processor)
    loaded, processor = load_vla(tmp_path / "policy", base_model=str(vlm))
    wide = np.zeros((1, 1, 24, 40, 3), np.uint8)
    assert torch.isfinite(loaded.predict(torch.zeros(1, 1, 7), **loaded.prompt_builder(processor)(wide, ["lift"]))).all()


@pytest.mark.parametrize("name", hub_configs())
def test_the_plan_counts_the_tokens_that_the_processor_writes(name, tmp_path):
    """Processors with the sizes of the published models."""
    config, n_tokens = hub_configs()[name]
    family, side = config.model_type, getattr(config.vision_config, "image_size", 224)
    settings, own = {"size": {"height": side, "width": side}}, {}
    if family == "smolvlm":
        settings = {**SPLITS, "size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
        own = {"image_seq_len": (side // config.vision_config.patch_size // config.scale_factor) ** 2}
    elif family == "qwen2_5_vl":
        settings = {"patch_size": config.vision_config.patch_size, "size": {"shortest_edge": 56**2, "longest_edge": 28**2 * 1280}}
    else:
        settings["image_seq_length"] = (side // config.vision_config.patch_size) ** 2
    vlm = tiling_vlm(tmp_path, family, settings, **own)
    assert n_image_tokens(load_processor(vlm), side) == (n_tokens, side)
    assert n_image_tokens(load_processor(vlm, is_tiled=True), side) == (hub_n_tiles()[name] * n_tokens, side)


def test_tiles_multiply_the_tokens_and_the_passes_of_the_tower_in_the_plan(tmp_path):
    FAMILIES["smolvlm"](tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected n_tiles, .* with a policy of image_tiling=True, got none; give it, as of "):
        plan_memory(config, 4, {"image_tiling": True})
    one, tiled = (plan_memory(config, 4, {"cameras": ["static"]}, n_tiles=n, batch_size=2, n_text_tokens=0) for n in (1, 17))
    assert tiled.parameters == one.parameters and tiled.flops > 15 * one.flops
