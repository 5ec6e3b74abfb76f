"""Environments: each a `gymnasium.Env` with an `ActionSpec`. Importing this package registers them.

Modules:
    suites: an environment with its tasks and time limits, by name: the tabletop's or your own.
    spaces: observation and action space, from a spec.
    stored_images: images turned as a recording stores them, for environments that render upright.
    suite_checks: checks that an environment is as its suite says.
    demonstrations: demonstrations of a suite's expert, with injected noise and the expert's labels.
    gl: choice of a headless OpenGL platform.
    tabletop: a MuJoCo tabletop: scenes, arms, task families, scripted experts.
    stand_in: any card's robot without physics, to record, drive and diagnose before the robot is there.
    stand_in_expert: its expert, which acts from the images alone.
    deadline_clock: a fixed control rate in real time.
    group_commands: the target of one group of an action, within limits.
    robot_commands: actions as commands of a robot, and where it is held.
    hardware: a real robot (LeRobot's `Robot`) behind limits, a deadline clock and a stop.
"""

import gymnasium

FIRST_HELD_OUT_SEED = 900_000  # scenes from this seed on are never in demonstrations

gymnasium.register("rvlm/Tabletop-v0", entry_point="rvlm.envs.tabletop.env:Tabletop")
