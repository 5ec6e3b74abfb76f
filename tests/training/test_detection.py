"""Stage 0, detection: targets per cell, and a loss that trains the vision tower alone."""

import numpy as np
import pytest
import torch

from rvlm.envs.tabletop.rendered_scenes import WORDS, generate_scenes
from rvlm.training.detection import DetectionCollator, Detector, classes, targets
from rvlm.vlm.small import small_vlm, train_tokenizer

SIDE = 4


@pytest.fixture(scope="module")
def scenes():
    return list(generate_scenes("franka7", seed=0, n_scenes=6, image_size=48))


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["where is the red cube ?"], ["<loc00>"])
    return small_vlm(tokenizer, image_size=48, patch_size=6, width=32, vision_width=32, vision_layers=1, text_layers=1)


def a_record(place):
    return {"names": ["red cube"], "static": [place], "wrist": [[-0.1, 0.5]]}


def test_targets_decode_to_the_location():
    place = np.array([0.3, 0.8])
    found = targets(a_record(place.tolist()), "static", SIDE, WORDS)
    cell, kind = np.argwhere(found["presence"])[0]
    row, column = divmod(cell, SIDE)
    assert classes(WORDS)[kind] == "red"
    np.testing.assert_allclose((np.array([column, row]) + 0.5 + found["offset"][cell, kind]) / SIDE, place, atol=1e-6)
    assert WORDS.shapes[found["shape"][cell, kind]] == "cube"


def test_an_object_out_of_view_has_no_target():
    found = targets(a_record([0.3, 0.8]), "wrist", SIDE, WORDS)
    assert found["presence"].sum() == 0
    assert (found["shape"] == -100).all()


def test_each_token_depends_on_the_pixels_of_its_cell(vlm):
    model, _ = vlm
    plain = torch.full((1, 1, 3, 48, 48), 0.1)

    def tokens(pixels):
        with torch.inference_mode():
            return torch.cat(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))

    for row, column in ((0, 1), (1, 0), (2, 3)):
        marked = plain.clone()
        marked[..., 12 * row : 12 * (row + 1), 12 * column : 12 * (column + 1)] = -1
        assert (tokens(marked) - tokens(plain)).norm(dim=1).argmax() == row * SIDE + column


def test_loss_falls_and_only_the_tower_learns(vlm, scenes):
    model, processor = vlm
    batch = DetectionCollator(processor, WORDS)(scenes)
    assert batch["scene_states"].shape == (len(scenes), len(WORDS.states))
    detector = Detector(model, WORDS)
    optimizer = torch.optim.Adam(detector.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = detector(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for p in model.model.text_model.parameters())
    assert all(p.grad is not None for p in model.model.connector.parameters())
