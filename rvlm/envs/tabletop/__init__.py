"""A MuJoCo tabletop with scripted experts, several arms and domain shifts; and scenes with two arms and a planar robot.

Importing this package chooses a headless OpenGL platform, before MuJoCo is imported.

Modules:
    scene: the scene as MJCF text, and the domain shifts.
    arms: arms of primitive geometry, with true kinematics.
    robosuite_arms: Panda, Sawyer, UR5e, IIWA and Kinova3 from robosuite's files.
    so101: the kinematics of the SO-101, with its jaw.
    arm_control: inverse kinematics, fingers and proprioception of one simulated arm.
    world: one MuJoCo model of scene and arm, and its true state.
    success_conditions: success conditions, from the true state.
    tasks: task families: instruction templates, success condition, initial state.
    task_sampling: feasible tasks of a scene, and sampling one of them.
    experts: scripted experts: the next action from the true state.
    joint_control: joint targets of the scripted experts, through inverse kinematics.
    failures: classification of failed episodes.
    rendering: camera images of a scene.
    env: the `gymnasium.Env`.
    scene_env: the same for other scenes; what their environments share.
    two_arms: two arms side by side, a block for each, and a bar for both.
    planar: a planar pusher with absolute targets, seen from above.
    scene_suites: the `Suite` of each of these scenes.
    suite: the `Suite` of each robot, scene and setting.
    chain_sampling: feasible sequences of tasks in one scene.
    rendered_scenes: rendered scenes with their true state, for vision-language data.
    questions: questions and answers about a scene.
"""

import os

from rvlm.envs.gl import choose_gl

choose_gl()
os.environ.setdefault("LP_NUM_THREADS", "0")  # the software renderer's threads would compete with ours
