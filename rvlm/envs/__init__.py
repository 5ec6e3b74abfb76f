"""Environments: each a `gymnasium.Env` that declares its actions by an `ActionSpec`. Importing this registers them.

Modules:
    gl: which OpenGL renders without a screen.
    tabletop: a MuJoCo tabletop: scenes, arms, task families, scripted experts.
    real_robot: a real robot (LeRobot's `Robot`) behind safety limits.
"""

import gymnasium

FIRST_HELD_OUT_SEED = 900_000  # scenes with seeds from here on are never in a demonstration

gymnasium.register("rvlm/Tabletop-v0", entry_point="rvlm.envs.tabletop.env:Tabletop")
