"""Rendered scenes for vision-language data: two images and a record of the true state each, stored in folders.

Questions are sampled from the records later (`rvlm.envs.tabletop.questions`).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rvlm.caches import Code, register
from rvlm.data.actions import ActionSpec
from rvlm.data.scenes import SceneWords
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.scene import COLORS, SHAPES
from rvlm.envs.tabletop.success_conditions import DRAWER_OPEN, is_held
from rvlm.envs.tabletop.tasks import TASK_FAMILIES
from rvlm.envs.tabletop.world import World
from rvlm.files import artifacts_dir, config_hash, make_folder
from rvlm.processes import in_parallel

SCENES_CODE = Code(("rvlm.envs.tabletop.rendered_scenes",))
FIXTURES = {
    "drawer handle": lambda world: world.pos_handle,
    "button": lambda world: world.pos_fixture("button"),
    "slider": lambda world: world.pos_fixture("slider"),
    "white square": lambda world: world.pos_fixture("zone"),
    "gripper": lambda world: world.pos_tcp_world,
}
WIDE = 0.06  # fingers farther apart count as open [m]
WORDS = SceneWords(tuple(COLORS), SHAPES, tuple(FIXTURES), ("drawer", "light", "is_gripper_open"), ("static", "wrist"))


def scene_state(world: World) -> dict:
    """Record of the true state, as JSON holds it.

    Keys: `names`, and for each name `static` and `wrist` (column, row in [0, 1]) and `pos` [m, world frame];
    objects come first. `held` is a name or None; `drawer`, `light` and `is_gripper_open` are booleans.
    """
    positions = {" ".join(o): world.pos_object(i) for i, o in enumerate(world.objects)}
    held = [n for i, n in enumerate(positions) if is_held(world, i)]
    positions |= {name: position(world) for name, position in FIXTURES.items()}
    cameras = {c: [world.project(p, c).round(4).tolist() for p in positions.values()] for c in ("static", "wrist")}
    return {
        "names": list(positions),
        "n_objects": len(world.objects),
        **cameras,
        "pos": [p.round(4).tolist() for p in positions.values()],
        "held": held[0] if held else None,
        "drawer": world.joint_position("drawer") > DRAWER_OPEN / 2,
        "light": world.is_light_on,
        "is_gripper_open": bool(world.opening > WIDE),
    }


class _WithoutRendering(Tabletop):
    """A tabletop that renders only on request: `generate_scenes` keeps no image of most steps."""

    def _observe(self) -> dict[str, Any]:
        return {}


def generate_scenes(
    robot: str, seed: int, n_scenes: int, image_size: int = 96, every: int = 3
) -> Iterator[tuple[np.ndarray, dict]]:
    """Scenes from rollouts of the expert with strong noise on random tasks, every few steps.

    Args:
        robot: Embodiment.
        seed: Of all random choices.
        n_scenes: Number of scenes to yield.
        image_size: Side of both images [px].
        every: Control steps between two scenes.

    Yields:
        Images (2, h, w, 3) uint8, static then wrist, and the `scene_state` of the scene.
    """
    env = _WithoutRendering(robot, image_size=image_size, families=tuple(TASK_FAMILIES))
    rng, n_made = np.random.default_rng(seed), 0
    while n_made < n_scenes:
        env.reset(seed=int(rng.integers(2**31)))
        noise = rng.uniform(0, 1.5)
        for step in range(int(rng.integers(1, 28))):
            if step % every == 0 and n_made < n_scenes:
                yield np.stack([env.image("static"), env.image("wrist")]), scene_state(env.world)
                n_made += 1
            action = env.expert_action()
            action[:6] += rng.normal(0, noise, 6) * (1, 1, 1, 0.3, 0.3, 0.3)
            if env.step(action)[2]:
                break
    env.close()


def make_scenes(folder: Path, robot: str, seed: int, n_scenes: int, image_size: int) -> Path:
    """Render one part of a scene collection into `folder`, which exists only when it is complete."""

    def write(part: Path) -> None:
        images, records = zip(*generate_scenes(robot, seed, n_scenes, image_size), strict=True)
        np.save(part / "images.npy", np.stack(images))
        (part / "scenes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        WORDS.save(part)

    return make_folder(folder, write)


def collect_scenes(n_scenes: int, first_seed: int, image_size: int = 96, n_workers: int = 2, per_part: int = 500) -> list[Path]:
    """Render scenes of all robots in parallel, half of them with the default robot; existing parts are reused.

    Args:
        n_scenes: Scenes of all parts together.
        first_seed: Seed of the first part; parts count up.
        image_size: Side of both images [px].
        n_workers: Processes; 1 or less renders in this process.
        per_part: Scenes per folder.

    Returns:
        Folders for `rvlm.data.scenes.Scenes`.
    """
    root, robots, jobs = artifacts_dir() / "scenes", ("franka7", "ur6", "franka7", "small5"), []
    keys = {
        r: config_hash({"spec": asdict(ActionSpec.from_card(f"tabletop_{r}")), "code": SCENES_CODE.hash}) for r in set(robots)
    }
    for i in range(-(-n_scenes // per_part)):
        n, seed, robot = min(per_part, n_scenes - i * per_part), first_seed + i, robots[i % len(robots)]
        jobs.append((root / f"{robot}-{seed}-{n}x{image_size}-{keys[robot]}", robot, seed, n, image_size))
    todo = [job for job in jobs if not job[0].exists()]
    if todo:
        SCENES_CODE.require_unchanged()
        for _ in tqdm(in_parallel(make_scenes, todo, n_workers), f"render {n_scenes} scenes", len(todo), unit="part"):
            pass
    names = ("robot", "seed", "n_scenes", "image_size")
    return [register(folder, SCENES_CODE, dict(zip(names, settings, strict=True))) for folder, *settings in jobs]
