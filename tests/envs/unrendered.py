"""Scenes without images, for tests of states alone."""

from rvlm.envs.tabletop.planar import Planar
from rvlm.envs.tabletop.two_arms import TwoArms


class Unrendered:
    """An environment's observations with no image in them."""

    def _observe(self):
        return {"images": {}, "state": self.state(), "instruction": self.instruction}


class UnrenderedPlanar(Unrendered, Planar):
    """The planar scene."""


class UnrenderedTwoArms(Unrendered, TwoArms):
    """The scene of two arms."""
