"""Vision-language data from rendered scenes: captions, grounding, spatial and state questions, paraphrases.

A scene is remembered as two images and a small record of the true state, from which any number of questions can be
drawn later. Places in an image are answered in location tokens, as PaliGemma does (Beyer et al. 2024, section 3.2.5).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from tqdm.auto import tqdm

from rvlm.caches import Code, keep
from rvlm.data.actions import ActionSpec
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.scene import SETTINGS
from rvlm.envs.tabletop.tasks import DRAWER_OPEN, FAMILIES, is_held
from rvlm.envs.tabletop.world import World
from rvlm.files import artifacts_dir, config_hash, make_folder
from rvlm.processes import in_parallel

N_LOCATIONS, N_OFFSETS = 16, 32  # bins per axis: of an image, of an offset from the gripper
OFFSET_RANGE = 0.32  # offsets are binned over plus and minus this [m]
SIDE_MARGIN = 0.04  # two things are compared along an axis of the image where they are at least this far apart, in [0, 1]
FIXTURES = {
    "drawer handle": lambda world: world.pos_handle,
    "button": lambda world: world.pos_fixture("button"),
    "slider": lambda world: world.pos_fixture("slider"),
    "white square": lambda world: world.pos_fixture("zone"),
    "gripper": lambda world: world.pos_tcp_world,
}
Question = tuple[str, str]
_OWN = ("make_scenes", "generate_scenes", "scene_state", "FIXTURES", "_Unseen")  # what renders; questions are drawn later
CODE = Code(("rvlm.envs.tabletop.env", *(f"rvlm.envs.tabletop.questions:{name}" for name in _OWN)))


def location_token(value: float, n_bins: int = N_LOCATIONS) -> str:
    """The token of a coordinate in [0, 1]; values outside fall into the outermost bins."""
    return f"<loc{int(np.clip(value * n_bins, 0, n_bins - 1)):02d}>"


def location_tokens() -> list[str]:
    """All of them: what a tokenizer must hold."""
    return [f"<loc{i:02d}>" for i in range(max(N_LOCATIONS, N_OFFSETS))]


def scene_state(world: World) -> dict:
    """The true state that questions are drawn from, as JSON-able lists.

    Keys: `names`, and for each name `static` and `wrist` (column, row in [0, 1]) and `pos` [m, world frame];
    objects come first. `held` is a name or None; `drawer` and `light` are booleans; `opening` in [m].
    """
    places = {" ".join(o): world.pos_object(i) for i, o in enumerate(world.objects)}
    held = [n for i, n in enumerate(places) if is_held(world, i)]
    places |= {name: find(world) for name, find in FIXTURES.items()}
    cameras = {c: [world.project(p, c).round(4).tolist() for p in places.values()] for c in ("static", "wrist")}
    return {
        "names": list(places),
        "n_objects": len(world.objects),
        **cameras,
        "pos": [p.round(4).tolist() for p in places.values()],
        "held": held[0] if held else None,
        "drawer": world.joint_position("drawer") > DRAWER_OPEN / 2,
        "light": world.is_light_on,
        "opening": world.opening,
    }


class _Unseen(Tabletop):
    """A tabletop that draws only when it is asked to: most steps of `generate_scenes` are not looked at."""

    def _observe(self) -> dict[str, Any]:
        return {}


def generate_scenes(
    robot: str, seed: int, n_scenes: int, image_size: int = 96, every: int = 3
) -> Iterator[tuple[np.ndarray, dict]]:
    """Scenes as a robot meets them: experts with strong noise at random tasks, looked at every few steps.

    Args:
        robot: Embodiment.
        seed: Of everything that is drawn.
        n_scenes: How many to yield.
        image_size: Side of both images [px].
        every: A scene is kept every so many control steps.

    Yields:
        Images (2, h, w, 3) uint8, static then wrist, and the `scene_state` of the scene.
    """
    env = _Unseen(robot, image_size=image_size, families=tuple(FAMILIES))
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


# -- questions ---------------------------------------------------------------------------------------------------------
def _pick(scene: dict, rng: np.random.Generator, objects_only: bool = False) -> int:
    return int(rng.integers(scene["n_objects"] if objects_only else len(scene["names"])))


def _is_visible(place: list[float]) -> bool:
    return 0 < place[0] < 1 and 0 < place[1] < 1


def where(scene: dict, rng: np.random.Generator) -> Question:
    """Grounding in the static image."""
    i = _pick(scene, rng)
    return f"where is the {scene['names'][i]} ?", "".join(map(location_token, scene["static"][i]))


def where_wrist(scene: dict, rng: np.random.Generator) -> Question:
    """Grounding in the wrist image, which need not show the thing asked for."""
    i = _pick(scene, rng)
    place = scene["wrist"][i]
    answer = "".join(map(location_token, place)) if _is_visible(place) else "out of view"
    return f"where is the {scene['names'][i]} in the wrist image ?", answer


def point(scene: dict, rng: np.random.Generator) -> Question:
    """Grounding in the fewest tokens: a name, and its place in the static image."""
    i = _pick(scene, rng)
    return scene["names"][i], "".join(map(location_token, scene["static"][i]))


def point_wrist(scene: dict, rng: np.random.Generator) -> Question:
    """The same in the wrist image, of things that it shows."""
    visible = [i for i, place in enumerate(scene["wrist"]) if _is_visible(place)]
    if not visible:
        return point(scene, rng)
    i = int(rng.choice(visible))
    return f"wrist {scene['names'][i]}", "".join(map(location_token, scene["wrist"][i]))


def offset(scene: dict, rng: np.random.Generator) -> Question:
    """Grounding in space: how far something is from the gripper, in three binned world axes."""
    names = scene["names"]
    i = int(rng.integers(len(names) - 1))
    delta = np.subtract(scene["pos"][i], scene["pos"][names.index("gripper")]) / (2 * OFFSET_RANGE) + 0.5
    return f"how far is the {names[i]} from the gripper ?", "".join(location_token(d, N_OFFSETS) for d in delta)


def side(scene: dict, rng: np.random.Generator) -> Question:
    """Spatial relation of two things in the static image that are clearly apart."""
    places = np.array(scene["static"])[:-1]
    delta = places[:, None] - places  # (things, things, 2)
    i, j, axis = rng.choice(np.argwhere(abs(delta) > SIDE_MARGIN))
    word = (("left of", "right of"), ("behind", "in front of"))[axis][int(delta[i, j, axis] > 0)]
    asked = str(rng.choice(("left of", "right of") if axis == 0 else ("behind", "in front of")))
    return f"is the {scene['names'][i]} {asked} the {scene['names'][j]} ?", "yes" if word == asked else "no"


def color(scene: dict, rng: np.random.Generator) -> Question:
    """Colour of the one object of its shape; where every shape is there twice, a `count` instead."""
    words = [n.split() for n in scene["names"][: scene["n_objects"]]]
    shapes = [s for _, s in words]
    unique = [w for w in words if shapes.count(w[1]) == 1]
    if not unique:
        return count(scene, rng)
    chosen = unique[int(rng.integers(len(unique)))]
    return f"what color is the {chosen[1]} ?", chosen[0]


def shape(scene: dict, rng: np.random.Generator) -> Question:
    """Shape of the one object of its colour."""
    words = scene["names"][_pick(scene, rng, objects_only=True)].split()
    return f"what shape is the {words[0]} object ?", words[1]


def count(scene: dict, rng: np.random.Generator) -> Question:
    """How many objects have a shape, in words."""
    asked = str(rng.choice(("cube", "cylinder", "ball")))
    n = sum(name.endswith(asked) for name in scene["names"][: scene["n_objects"]])
    return f"how many objects are a {asked} ?", ("zero", "one", "two", "three")[n]


def held(scene: dict, rng: np.random.Generator) -> Question:
    """What is between the closed fingers."""
    return "what does the robot hold ?", scene["held"] or "nothing"


def drawer(scene: dict, rng: np.random.Generator) -> Question:
    """State of the drawer."""
    return "is the drawer open ?", "yes" if scene["drawer"] else "no"


def light(scene: dict, rng: np.random.Generator) -> Question:
    """State of the light."""
    return "is the light on ?", "yes" if scene["light"] else "no"


def gripper(scene: dict, rng: np.random.Generator) -> Question:
    """State of the gripper: open if its fingers are more than 0.06 m apart."""
    return "is the gripper open ?", "yes" if scene["opening"] > 0.06 else "no"


def caption(scene: dict, rng: np.random.Generator) -> Question:
    """Objects from left to right, then the states of drawer and light."""
    n = scene["n_objects"]
    order = np.argsort([p[0] for p in scene["static"][:n]])
    things = " , ".join(f"a {scene['names'][i]}" for i in order)
    states = f"the drawer is {'open' if scene['drawer'] else 'shut'} . the light is {'on' if scene['light'] else 'off'} ."
    return "describe the scene .", f"{things} . {states}"


_SYNONYMS = (
    (("lift the {a}", "pick up the {a}", "raise the {a}", "take the {a}", "raise the {a} up into the air"), "lift {a}"),
    (("push the {a} left", "slide the {a} to the left side", "move the {a} towards the left"), "push left {a}"),
    (("push the {a} right", "slide the {a} to the right side", "move the {a} towards the right"), "push right {a}"),
    (("push the {a} closer", "slide the {a} nearer", "move the {a} towards the camera"), "push near {a}"),
    (("push the {a} away", "slide the {a} farther", "move the {a} away from the camera"), "push far {a}"),
    (("open the drawer", "slide out the drawer", "pull the handle"), "open drawer"),
    (("close the drawer", "shut the drawer", "slide in the drawer"), "close drawer"),
    (("turn on the light", "switch on the lamp", "press the button so that the lamp goes on"), "light on"),
    (("turn off the light", "switch off the lamp", "press the button so that the lamp goes off"), "light off"),
    (("move the slider left", "shift the teal slider to the left side", "push the handle of the slider left"), "slider left"),
    (("move the slider right", "shift the teal slider to the right side", "push the handle of the slider right"), "slider right"),
)


def paraphrase(scene: dict, rng: np.random.Generator) -> Question:
    """What an instruction means, said in the fewest words; the families' held-out wordings are not among those asked."""
    wordings, meaning = _SYNONYMS[int(rng.integers(len(_SYNONYMS)))]
    name = scene["names"][_pick(scene, rng, objects_only=True)]
    return f"{rng.choice(wordings).format(a=name)} means", meaning.format(a=name)


KINDS: dict[str, tuple[Callable[[dict, np.random.Generator], Question], float]] = {  # kind -> (maker, weight)
    "point": (point, 1.0),
    "point_wrist": (point_wrist, 1.0),
    "where": (where, 3.0),
    "where_wrist": (where_wrist, 2.0),
    "offset": (offset, 4.0),
    "side": (side, 2.0),
    "color": (color, 1.5),
    "shape": (shape, 1.5),
    "count": (count, 1.5),
    "held": (held, 1.0),
    "drawer": (drawer, 0.5),
    "light": (light, 0.5),
    "gripper": (gripper, 0.5),
    "caption": (caption, 0.6),
    "paraphrase": (paraphrase, 0.8),
}


def sample_questions(scene: dict, rng: np.random.Generator, n: int, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Question]:
    """Draw `n` questions with their answers about a scene, by the weights of their kinds."""
    weights = np.array([KINDS[k][1] for k in kinds])
    chosen = rng.choice(len(kinds), size=n, p=weights / weights.sum())
    return [KINDS[kinds[c]][0](scene, rng) for c in chosen]


def vocabulary() -> list[str]:
    """Every text of the tabletop's language, for training a tokenizer: questions, answers, instructions, paraphrases."""
    world = World("franka7", SETTINGS["simple"])
    rng, texts = np.random.default_rng(0), []
    for _ in range(60):
        world.scatter(rng)
        mujoco.mj_forward(world.model, world.data)
        texts += [part for pair in sample_questions(scene_state(world), rng, 30) for part in pair]
    for family in FAMILIES.values():
        texts += [t.format(a="red cube", b="blue ball") for t in family.templates + family.held_out]
    return texts


def make_scenes(folder: Path, robot: str, seed: int, n_scenes: int, image_size: int) -> Path:
    """Render one part of a scene collection into `folder`, which exists only when whole."""

    def fill(part: Path) -> None:
        images, records = zip(*generate_scenes(robot, seed, n_scenes, image_size), strict=True)
        np.save(part / "images.npy", np.stack(images))
        (part / "scenes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    return make_folder(folder, fill)


def collect_scenes(n_scenes: int, first_seed: int, image_size: int = 96, n_workers: int = 2, per_part: int = 500) -> list[Path]:
    """Render scenes of all robots in parallel, half of them with the default robot; finished parts are kept.

    Args:
        n_scenes: Scenes of all parts together.
        first_seed: Seed of the first part; parts count up.
        image_size: Side of both images [px].
        n_workers: Processes; 1 or less renders in this one.
        per_part: Scenes per folder.

    Returns:
        Folders for `Scenes`.
    """
    root, robots, jobs = artifacts_dir() / "scenes", ("franka7", "ur6", "franka7", "small5"), []
    keys = {r: config_hash({"spec": asdict(ActionSpec.from_card(f"tabletop_{r}")), "code": CODE.hash}) for r in set(robots)}
    for i in range(-(-n_scenes // per_part)):
        n, seed, robot = min(per_part, n_scenes - i * per_part), first_seed + i, robots[i % len(robots)]
        jobs.append((root / f"{robot}-{seed}-{n}x{image_size}-{keys[robot]}", robot, seed, n, image_size))
    todo = [job for job in jobs if not job[0].exists()]
    if todo:
        CODE.refuse_changed()
        for _ in tqdm(in_parallel(make_scenes, todo, n_workers), f"render {n_scenes} scenes", len(todo), unit="part"):
            pass
    names = ("robot", "seed", "n_scenes", "image_size")
    return [keep(folder, CODE, dict(zip(names, settings, strict=True))) for folder, *settings in jobs]


class Scenes:
    """Stored scenes: item i is its images (2, h, w, 3) uint8 and its record.

    Args:
        folders: Folders that `collect_scenes` made.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        folders = [Path(f) for f in folders]
        self.images = [np.load(f / "images.npy", mmap_mode="r") for f in folders]
        self.records = [json.loads(line) for f in folders for line in (f / "scenes.jsonl").read_text().splitlines()]
        self._ends = np.cumsum([len(i) for i in self.images])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return np.array(self.images[part][i - self._ends[part]]), self.records[i]
