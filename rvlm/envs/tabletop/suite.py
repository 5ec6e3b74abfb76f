"""The tabletop as a `Suite` for each robot and setting: "tabletop/ROBOT", "tabletop/ROBOT/SETTING"."""

import functools

from rvlm.data.actions import ActionSpec
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.suite_checks import SuiteError
from rvlm.envs.suites import Suite
from rvlm.envs.tabletop.chain_sampling import sample_chains
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.joint_control import is_joint_space, joint_noise
from rvlm.envs.tabletop.robosuite_arms import ROBOTS
from rvlm.envs.tabletop.scene import SETTINGS, UNSEEN_COLORS
from rvlm.envs.tabletop.scene_suites import SCENE_SETTINGS, SCENES, scene_suite
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS

MAX_STEPS, DEMONSTRATION_STEPS = 50, 60  # time limits of every task [control steps]
NOISE_SCALE = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.0)  # rotations are noisy less
HELD_OUT = {  # reserved for evaluation: seeds from the first on, instruction templates, and colours
    "first_seed": FIRST_HELD_OUT_SEED,
    "wordings": [wording for family in ALL_FAMILIES.values() for wording in family.held_out],
    "words": list(UNSEEN_COLORS),
}


def tabletop_suite(robot: str = "franka7", setting: str = "simple") -> Suite:
    """The suite of one robot, or of a scene with robots of its own, in one setting.

    Unseen targets leave tasks whose instruction names an object.

    Raises:
        SuiteError: No such robot or setting, with those that exist.
    """
    settings = SCENE_SETTINGS if robot in SCENES else tuple(SETTINGS)
    for name, table, kind in ((robot, (*ROBOTS, *SCENES), "robot"), (setting, settings, "setting")):
        if name not in table:
            raise SuiteError(f"suite tabletop/{robot}/{setting}: no {kind} {name!r}; there are {', '.join(table)}")
    if robot in SCENES:
        return scene_suite(robot, setting)
    spec, in_reach = ActionSpec.from_card(f"tabletop_{robot}"), ROBOTS[robot].workspace.families or tuple(ALL_FAMILIES)
    tasks = [name for name in in_reach if ALL_FAMILIES[name].n_objects or not SETTINGS[setting].target]
    return Suite(
        name=f"tabletop/{robot}" + f"/{setting}" * (setting != "simple"),
        spec=spec,
        tasks=tuple(tasks),
        make_env=functools.partial(Tabletop, robot, setting=setting, max_steps=None),
        max_steps=MAX_STEPS,
        default_tasks=tuple(task for task in DEFAULT_TASKS if task in tasks),
        setting=setting,
        settings={name: f"tabletop/{robot}" + f"/{name}" * (name != "simple") for name in SETTINGS},
        held_out=HELD_OUT,
        noise_scale=joint_noise(spec) if is_joint_space(spec) else NOISE_SCALE,
        demonstration_steps=DEMONSTRATION_STEPS,
        sample_chains=functools.partial(sample_chains, robot=robot, setting=SETTINGS[setting]),
    )
