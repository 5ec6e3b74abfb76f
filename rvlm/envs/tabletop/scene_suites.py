"""Suites of the tabletop's other scenes: "tabletop/two_arms", "tabletop/planar", also in held-out wordings."""

import functools

from rvlm.data.actions import ActionSpec
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.suites import Suite
from rvlm.envs.tabletop.planar import Planar
from rvlm.envs.tabletop.scene_env import SceneEnv
from rvlm.envs.tabletop.two_arms import TwoArms

SCENES: dict[str, type[SceneEnv]] = {"two_arms": TwoArms, "planar": Planar}
SCENE_SETTINGS = ("simple", "novel_description")


def scene_suite(scene: str, setting: str) -> Suite:
    """The suite of a scene in `SCENES` in one of `SCENE_SETTINGS`."""
    env, names = SCENES[scene], [f"tabletop/{scene}" + f"/{name}" * (name != "simple") for name in SCENE_SETTINGS]
    return Suite(
        name=names[SCENE_SETTINGS.index(setting)],
        spec=ActionSpec.from_card(env.card),
        tasks=tuple(env.wordings),
        make_env=functools.partial(env, paraphrase=setting == "novel_description"),
        max_steps=env.time_limit,
        setting=setting,
        settings=dict(zip(SCENE_SETTINGS, names, strict=True)),
        held_out={
            "first_seed": FIRST_HELD_OUT_SEED,
            "wordings": [text for wordings in env.wordings.values() for text in wordings.held_out],
            "words": [],
        },
        noise_scale=env.noise_scale,
    )
