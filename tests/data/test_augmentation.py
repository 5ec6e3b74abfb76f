"""Augmentation: deterministic, the same for all steps of a camera, hues kept."""

import numpy as np
import pytest

from rvlm.data.augmentation import augment

VARIED = {"shift": {"shift": 3}, "crop": {"crop": 0.3}, "color": {"color": 0.2}, "all": {"shift": 3, "crop": 0.3, "color": 0.2}}


@pytest.mark.parametrize("how", VARIED.values(), ids=VARIED)
def test_augmentation_is_deterministic_and_moves_all_steps_of_a_camera_alike(how):
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8), 3, axis=0)
    out = augment(images, np.random.default_rng(5), **how)
    assert out.shape == images.shape and out.dtype == np.uint8
    assert np.array_equal(out, augment(images, np.random.default_rng(5), **how))
    assert not np.array_equal(out, augment(images, np.random.default_rng(6), **how))
    assert np.array_equal(out[0], out[2]) and not np.array_equal(out, images)
    assert augment(images, np.random.default_rng(5)) is images


def test_augmentation_shifts_each_camera_by_its_own():
    images = np.zeros((1, 2, 33, 33, 3), np.uint8)
    images[:, :, 16, 16] = 255
    shifts = []
    for seed in range(20):
        out = augment(images, np.random.default_rng(seed), shift=4)
        assert sorted(np.unique(out)) == [0, 255] and (out == 255).sum() == (images == 255).sum(), "pixels are moved whole"
        spots = [np.argwhere(view == 255)[0, :2] - 16 for view in out[0, ..., :1]]
        assert np.abs(spots).max() <= 4
        shifts.append(spots)
    assert np.ptp(shifts, axis=0).min() >= 4 and any(not np.array_equal(a, b) for a, b in shifts)


def test_a_crop_shows_a_part_enlarged_and_color_keeps_hues():
    rows, columns = np.indices((64, 64), np.uint8)
    ramps = np.stack([rows, columns, rows], axis=-1)[None, None]
    parts = []
    for seed in range(20):
        seen = augment(ramps, np.random.default_rng(seed), crop=0.5)[0, 0].astype(float)
        shown = np.ptp(seen[0, :, 1]), np.ptp(seen[:, 0, 0])
        assert min(shown) >= 31 and max(shown) <= 63 and abs(shown[0] - shown[1]) <= 1, "as much of each side"
        parts.append(shown[0])
        assert np.diff(seen[0, :, 1]).min() >= 0 and np.ptp(seen[..., 0], axis=1).max() == 0
        image = np.broadcast_to(np.array([180, 90, 90], np.uint8), (1, 1, 4, 4, 3))
        red, green, blue = augment(image, np.random.default_rng(seed), color=0.2)[0, 0, 0, 0].astype(int)
        assert green == blue and 0.8 * 90 - 1 <= red - green <= 1.2 * 90 + 1
    assert np.ptp(parts) > 20
