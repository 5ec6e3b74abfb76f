"""Camera images of a MuJoCo scene."""

import mujoco
import numpy as np


class CameraRenderer:
    """Renders the named cameras of a scene at any size, without shadows and reflections (they cost most of a frame).

    Args:
        model, data: The simulation.
        cameras: Names that may be asked for.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, cameras: tuple[str, ...]) -> None:
        self.model, self.data, self.cameras = model, data, cameras
        self._renderers: dict[int, mujoco.Renderer] = {}

    def image(self, camera: str, size: int) -> np.ndarray:
        """RGB image (size, size, 3) uint8.

        Raises:
            KeyError: No such camera, with those that exist.
        """
        if camera not in self.cameras:
            raise KeyError(f"no camera {camera!r}; there are {', '.join(self.cameras)}")
        if size not in self._renderers:
            buffer = self.model.vis.global_  # a renderer's images must fit in it
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, size), max(buffer.offheight, size)
            self._renderers[size] = mujoco.Renderer(self.model, size, size)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderers[size].scene.flags[flag] = 0
        self._renderers[size].update_scene(self.data, camera=camera)
        return self._renderers[size].render()

    def close(self) -> None:
        """Free the renderers; new ones are made when images are asked for again."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
