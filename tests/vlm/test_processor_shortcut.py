"""Prompts without the processor: bit for bit its output, in every family where that is possible."""

import pickle

import numpy as np
import pytest
import torch

from rvlm.vlm.pixel_lookup import N_PROBES, find_pixel_lookup
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.tiny import FAMILIES, SIDE
from rvlm.vlm.tiny import TOKENIZER_TEXTS as TEXTS

WITHOUT = ("idefics", "mllama")  # Idefics shows images to padding too, Mllama pads with tiles
ONE_IMAGE = ("kosmos2", "florence2")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_the_processor_equal_its_own(family, tmp_path):
    """Ids, masks, types, grids and pixels; one or two observations a prompt, padding on either side, token types set or not."""
    FAMILIES[family](tmp_path)
    processor, rng = load_processor(tmp_path), np.random.default_rng(0)
    for is_interleaved in (False, True)[: 1 if family in ONE_IMAGE else 2]:
        n_images = 1 if family in ONE_IMAGE else 2
        builder = PromptBuilder(processor, n_images, 1, "left" if is_interleaved else "right", is_interleaved)
        builder = pickle.loads(pickle.dumps(builder))  # as workers that load data get it
        sides = (SIDE, 32) if family.startswith("qwen") else (SIDE,)
        for side in sides:
            images = rng.integers(0, 256, (3 * (1 + is_interleaved), n_images, side, side, 3), np.uint8)
            has_shortcut = family not in WITHOUT and (family, is_interleaved) != ("llava_onevision", True)
            assert (builder.shortcut(images) is not None) == has_shortcut, side
            n_steps = [1 + is_interleaved] * 3
            theirs = builder._run_processor(images, TEXTS, n_steps)
            ours = builder(images, TEXTS, n_steps)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name].dtype == value.dtype and torch.equal(ours[name].reshape(value.shape), value), name


def test_known_prompts_need_neither_the_image_processor_nor_the_tokenizer(tmp_path, monkeypatch):
    FAMILIES["qwen2_5_vl"](tmp_path)
    builder = PromptBuilder(load_processor(tmp_path), 2)
    images = np.random.default_rng(0).integers(0, 256, (3, 2, SIDE, SIDE, 3), np.uint8)
    before = builder(images, TEXTS)
    monkeypatch.setattr(type(builder.processor), "__call__", lambda *_, **__: pytest.fail("the processor ran again"))
    again = builder(images[::-1], TEXTS[::-1])
    assert torch.equal(again["pixel_values"].unflatten(0, (3, -1)).flip(0).flatten(0, 1), before["pixel_values"])


def channels_first(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize(
    ("process", "is_found"),
    [
        (channels_first, True),
        (lambda images: -channels_first(images).flip(-1), True),
        (lambda images: channels_first(images).repeat(1, 1, 2, 1), True),
        (lambda images: channels_first(images) ** 3, False),
        (lambda images: channels_first(images).mean(1), False),
        (lambda images: torch.nn.functional.avg_pool2d(channels_first(images), 2), False),
        (lambda images: torch.nn.functional.pad(channels_first(images), (0, 1)), False),
        (lambda images: channels_first(images).double(), False),
    ],
    ids=["normalised", "mirrored", "repeated", "another scale", "mixed", "resized", "padded", "float64"],
)
def test_a_lookup_is_found_only_where_it_is_exact(process, is_found):
    lookup = find_pixel_lookup(process, 20, 24)
    assert (lookup is not None) == is_found
    if lookup:
        images = np.random.default_rng(1).integers(0, 256, (N_PROBES, 20, 24, 3), np.uint8)
        assert torch.equal(lookup(images), process(images).flatten(1))
