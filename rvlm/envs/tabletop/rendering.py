"""Camera images of a MuJoCo scene."""

from collections.abc import Sequence

import mujoco
import numpy as np


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width [px] of images, given both or the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class CameraRenderer:
    """Renders the named cameras of a scene at any size [px], without shadows and reflections (they cost most of a frame).

    Args:
        model, data: The simulation.
        cameras: Names that may be asked for.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, cameras: tuple[str, ...]) -> None:
        self.model, self.data, self.cameras = model, data, cameras
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}

    def image(self, camera: str, size: int | Sequence[int]) -> np.ndarray:
        """RGB image (h, w, 3) uint8, of height and width `size`.

        Raises:
            KeyError: No such camera, with those that exist.
        """
        if camera not in self.cameras:
            raise KeyError(f"no camera {camera!r}; there are {', '.join(self.cameras)}")
        height, width = shape = height_and_width(size)
        if shape not in self._renderers:
            buffer = self.model.vis.global_  # a renderer's images must fit in it
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
            self._renderers[shape] = mujoco.Renderer(self.model, height, width)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderers[shape].scene.flags[flag] = 0
        self._renderers[shape].update_scene(self.data, camera=camera)
        return self._renderers[shape].render()

    def close(self) -> None:
        """Free the renderers; new ones are made when images are asked for again."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
