"""Which features of a dataset are colour cameras, and which of them a name means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rvlm.video import EpisodeError


def is_image(feature: dict[str, Any]) -> bool:
    """Whether a feature holds images: as a video, or embedded in the tables."""
    return feature["dtype"] in ("video", "image")


def is_depth(key: str, feature: dict[str, Any]) -> bool:
    """Whether images are distances rather than colours: marked so, or named so."""
    return is_marked_depth(feature) or re.search(r"(^|[._-])depth([._-]|$)", key) is not None


def is_marked_depth(feature: dict[str, Any]) -> bool:
    """Whether info.json marks a feature as a depth map."""
    about = [b for b in (feature, feature.get("info"), feature.get("video_info")) if isinstance(b, dict)]
    return any(block.get(name) for block in about for name in ("is_depth_map", "video.is_depth_map"))


def camera_names(features: dict[str, Any]) -> dict[str, str]:
    """Feature key of each colour camera by its name: the last part of the key, or as much of it as tells two cameras apart."""
    keys = [key for key, feature in features.items() if is_image(feature) and not is_depth(key, feature)]
    shorts = [key.rsplit(".", 1)[-1] for key in keys]
    return {short if shorts.count(short) == 1 else _long(key): key for key, short in zip(keys, shorts, strict=True)}


def _long(key: str) -> str:
    return key.removeprefix("observation.").removeprefix("images.")


def find_camera(root: Path, features: dict[str, Any], camera: str) -> str:
    """Feature key of a camera by its name; what is unknown, doubtful or no colour image is an error that says what exists."""
    images, names = [key for key, feature in features.items() if is_image(feature)], camera_names(features)
    exact = [key for key in (f"observation.images.{camera}", camera, names.get(camera)) if key in images]
    alike = [key for key in images if key.rsplit(".", 1)[-1] == camera and not is_depth(key, features[key])]
    found = exact[:1] or [key for key in images if _long(key) == camera] or alike
    have = ", ".join(names) or "none"
    if not found:
        others = ", ".join(key for key in features if key not in names.values())
        raise EpisodeError(
            f"{root}: unknown camera {camera!r}; cameras that exist: {have}; name one of these (features beside: {others})"
        )
    if len(found) > 1:
        longer = " or ".join(repr(_long(key)) for key in found)
        raise EpisodeError(f"{root}: camera {camera!r} may be any of {found}; call it {longer} in the card")
    if is_marked_depth(features[found[0]]):
        raise EpisodeError(
            f"{root}: camera {camera!r} is read from {found[0]}, a depth map (is_depth_map); colour cameras: {have}"
        )
    return found[0]
