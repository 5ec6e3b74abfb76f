"""Colour cameras among the features of a dataset, and lookup by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rvlm.data.errors import EpisodeError

DEPTH_MARKS = ("is_depth_map", "video.is_depth_map")
NO_COLOUR = re.compile(r"([a-z]*depth(s|map|image)?|disparity|seg|segmentation|masks?|infrared|infra|ir)\d*")


def is_image(feature: dict[str, Any]) -> bool:
    """Whether a feature holds images: as a video, or embedded in the tables."""
    return feature["dtype"] in ("video", "image")


def is_depth(key: str, feature: dict[str, Any]) -> bool:
    """Whether images are depth, masks or infrared rather than colours, by mark or by name."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    return is_marked_depth(feature) or any(NO_COLOUR.fullmatch(word) for word in re.split(r"[^a-z0-9]+", words))


def is_marked_depth(feature: dict[str, Any]) -> bool:
    """Whether info.json marks a feature as a depth map."""
    return True in depth_marks(feature)


def depth_marks(feature: dict[str, Any]) -> list[Any]:
    """All values of `DEPTH_MARKS` in a feature of info.json."""
    blocks = [b for b in (feature, feature.get("info"), feature.get("video_info")) if isinstance(b, dict)]
    return [block[name] for block in blocks for name in DEPTH_MARKS if name in block]


def camera_names(features: dict[str, Any]) -> dict[str, str]:
    """Camera name -> feature key of each colour camera; the name is the last part of the key, or more of it if that repeats."""
    keys = [key for key, feature in features.items() if is_image(feature) and not is_depth(key, feature)]
    shorts = [key.rsplit(".", 1)[-1] for key in keys]
    return {short if shorts.count(short) == 1 else _long(key): key for key, short in zip(keys, shorts, strict=True)}


def _long(key: str) -> str:
    return key.removeprefix("observation.").removeprefix("images.")


def find_camera(root: Path, features: dict[str, Any], camera: str) -> str:
    """Feature key of a camera by its name.

    Raises:
        EpisodeError: The name is unknown or ambiguous, or the feature holds no colour images.
    """
    images, names = [key for key, feature in features.items() if is_image(feature)], camera_names(features)
    exact = [key for key in (f"observation.images.{camera}", camera, names.get(camera)) if key in images]
    alike = [key for key in images if key.rsplit(".", 1)[-1] == camera and not is_depth(key, features[key])]
    found = exact[:1] or [key for key in images if _long(key) == camera] or alike
    have = ", ".join(names) or "none"
    if not found:
        others = ", ".join(key for key in features if key not in names.values())
        raise EpisodeError(
            f"{root}: unknown camera {camera!r}; cameras that exist: {have}; name one of these (other features: {others})"
        )
    if len(found) > 1:
        longer = " or ".join(repr(_long(key)) for key in found)
        raise EpisodeError(f"{root}: camera {camera!r} may be any of {found}; call it {longer} in the card")
    if is_depth(found[0], features[found[0]]):
        how = "marked is_depth_map" if is_marked_depth(features[found[0]]) else "no colours by its name; rename it if it is"
        raise EpisodeError(
            f"{root}: camera {camera!r} is read from {found[0]}, a depth map or mask ({how}); colour cameras: {have}"
        )
    return found[0]
