"""Data sets of the exact shape of public ones: columns, names, cameras, rate; the motion is made up and obeys the card."""

import dataclasses
import json
import shutil

import pandas as pd

from rvlm.data.actions import ActionSpec
from rvlm.envs.stand_in import TASKS, StandIn, record_stand_in
from rvlm.envs.suites import Suite

HAND = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
SO_MOTORS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
VIPERX = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
ALOHA = [f"{side}_{motor}" for side in ("left", "right") for motor in VIPERX]
PANDA = [*(f"joint_{i}" for i in range(7)), "gripper"]


@dataclasses.dataclass(frozen=True)
class Public:
    """What info.json of a public data set says.

    Attributes:
        source: The data set.
        robot_type, fps: As there.
        action, state: `names` of the two columns.
        cameras: Feature key -> height and width [px] there.
        shown: Feature key -> height and width of the stand-in, an eighth of the real one where that is large.
    """

    source: str
    robot_type: str
    fps: int
    action: object
    state: object
    cameras: dict
    shown: dict | None = None


def _cameras(height, width, *names):
    return {f"observation.images.{name}": (height, width) for name in names}


PUBLIC = {
    "so101": Public("lerobot/svla_so101_pickplace", "so100_follower", 30, [f"{m}.pos" for m in SO_MOTORS],
                    [f"{m}.pos" for m in SO_MOTORS], _cameras(480, 640, "up", "side"), _cameras(60, 80, "up", "side")),
    "so100": Public("lerobot/svla_so100_sorting", "so100", 30, [f"main_{m}" for m in SO_MOTORS],
                    [f"main_{m}" for m in SO_MOTORS], _cameras(480, 640, "top", "wrist"), _cameras(60, 80, "top", "wrist")),
    "koch": Public("aliberts/koch_tutorial", "koch", 30, {"motors": SO_MOTORS}, {"motors": SO_MOTORS},
                   _cameras(480, 640, "laptop", "phone"), _cameras(60, 80, "laptop", "phone")),
    "droid": Public("lerobot/droid_1.0.1", "Franka", 15, {"axes": PANDA}, {"axes": PANDA},
                    _cameras(180, 320, "wrist_left", "exterior_1_left", "exterior_2_left"),
                    _cameras(46, 80, "wrist_left", "exterior_1_left", "exterior_2_left")),
    "aloha": Public("lerobot/aloha_static_coffee", "aloha", 50, {"motors": ALOHA}, {"motors": ALOHA},
                    _cameras(480, 640, "cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist"),
                    _cameras(60, 80, "cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist")),
    "pusht": Public("lerobot/pusht", "unknown", 10, {"motors": ["motor_0", "motor_1"]}, {"motors": ["motor_0", "motor_1"]},
                    {"observation.image": (96, 96)}),
    "libero": Public("lerobot/libero_10_image", "panda", 20, {"motors": HAND}, {"motors": [*HAND, "gripper"]},
                     _cameras(256, 256, "image", "wrist_image"), _cameras(64, 64, "image", "wrist_image")),
    "calvin": Public("CALVIN's npz files: rel_actions as action", "franka", 30, None, None,
                     {"observation.images.rgb_static": (200, 200), "observation.images.rgb_gripper": (84, 84)}),
    "bridge": Public("IPEC-COMMUNITY/bridge_orig_lerobot", "widowx", 5, {"motors": HAND},
                     {"motors": [*HAND[:6], "pad", "gripper"]}, _cameras(256, 256, "image_0"), _cameras(64, 64, "image_0")),
    "fractal": Public("IPEC-COMMUNITY/fractal20220817_data_lerobot", "google_robot", 3, {"motors": HAND},
                      {"motors": ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"]},
                      _cameras(256, 320, "image"), _cameras(64, 80, "image")),
}  # fmt: skip


def stand_in(name, **options):
    """The stand-in of a public card's robot, with its cameras at the sizes that are shown."""
    public, spec = PUBLIC[name], ActionSpec.from_card(name)
    sizes = {key.rsplit(".", 1)[-1]: size for key, size in (public.shown or public.cameras).items()}
    return StandIn(spec, sizes=sizes, **options)


def record_public(name, folder, seeds=range(4)):
    """A data set as the public one: its info.json says no word of the card."""
    root, public = record_stand_in(stand_in(name), folder, seeds), PUBLIC[name]
    info = json.loads((root / "meta/info.json").read_text())
    del info["rvlm"]
    info |= {"robot_type": public.robot_type, "fps": public.fps}
    for key, names in (("action", public.action), ("observation.state", public.state)):
        info["features"][key]["names"] = names
    if "observation.image" in public.cameras:
        _rename_camera(root, info, "observation.images.image", "observation.image")
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def _rename_camera(root, info, old, new):
    info["features"][new] = info["features"].pop(old)
    shutil.move(root / "videos" / old, root / "videos" / new)
    for path in (root / "meta/episodes").rglob("*.parquet"):
        table = pd.read_parquet(path)
        table.rename(columns=lambda column: column.replace(f"/{old}/", f"/{new}/")).to_parquet(path)


def pusht_env(image_size=None):
    """The stand-in of PushT's robot; of its own image sizes."""
    return stand_in("pusht")


def pusht_suite():
    """The same as a suite."""
    return Suite("pusht", ActionSpec.from_card("pusht"), tuple(TASKS), pusht_env, max_steps=40)
