"""Questions and answers about a scene: captions, grounding, spatial and state questions, paraphrases of instructions.

They are sampled from the record of its true state (`rvlm.envs.tabletop.rendered_scenes.scene_state`). Locations in an image are
answered in location tokens, as in PaliGemma (Beyer et al. 2024, section 3.2.5).
"""

from collections.abc import Callable

import mujoco
import numpy as np

from rvlm.envs.tabletop.rendered_scenes import scene_state
from rvlm.envs.tabletop.scene import SETTINGS
from rvlm.envs.tabletop.tasks import TASK_FAMILIES
from rvlm.envs.tabletop.world import World

N_LOCATIONS, N_OFFSETS = 16, 32  # bins per axis: of an image, of an offset from the gripper
OFFSET_RANGE = 0.32  # offsets are binned over plus and minus this [m]
SIDE_MARGIN = 0.04  # least distance along an axis of the image at which two things are compared, in [0, 1]
Question = tuple[str, str]


def location_token(value: float, n_bins: int = N_LOCATIONS) -> str:
    """The token of a coordinate in [0, 1]; values outside fall into the outermost bins."""
    return f"<loc{int(np.clip(value * n_bins, 0, n_bins - 1)):02d}>"


def location_tokens() -> list[str]:
    """All location tokens, to be added to a tokenizer."""
    return [f"<loc{i:02d}>" for i in range(max(N_LOCATIONS, N_OFFSETS))]


def _pick(scene: dict, rng: np.random.Generator, objects_only: bool = False) -> int:
    return int(rng.integers(scene["n_objects"] if objects_only else len(scene["names"])))


def _is_visible(location: list[float]) -> bool:
    return 0 < location[0] < 1 and 0 < location[1] < 1


def where(scene: dict, rng: np.random.Generator) -> Question:
    """Location in the static image."""
    i = _pick(scene, rng)
    return f"where is the {scene['names'][i]} ?", "".join(map(location_token, scene["static"][i]))


def where_wrist(scene: dict, rng: np.random.Generator) -> Question:
    """Location in the wrist image, or "out of view"."""
    i = _pick(scene, rng)
    location = scene["wrist"][i]
    answer = "".join(map(location_token, location)) if _is_visible(location) else "out of view"
    return f"where is the {scene['names'][i]} in the wrist image ?", answer


def point(scene: dict, rng: np.random.Generator) -> Question:
    """Location in the static image, asked by the name alone."""
    i = _pick(scene, rng)
    return scene["names"][i], "".join(map(location_token, scene["static"][i]))


def point_wrist(scene: dict, rng: np.random.Generator) -> Question:
    """Location in the wrist image of a thing that is visible there, asked by its name."""
    visible = [i for i, location in enumerate(scene["wrist"]) if _is_visible(location)]
    if not visible:
        return point(scene, rng)
    i = int(rng.choice(visible))
    return f"wrist {scene['names'][i]}", "".join(map(location_token, scene["wrist"][i]))


def offset(scene: dict, rng: np.random.Generator) -> Question:
    """Offset of a thing from the gripper, binned along the three world axes."""
    names = scene["names"]
    i = int(rng.integers(len(names) - 1))
    delta = np.subtract(scene["pos"][i], scene["pos"][names.index("gripper")]) / (2 * OFFSET_RANGE) + 0.5
    return f"how far is the {names[i]} from the gripper ?", "".join(location_token(d, N_OFFSETS) for d in delta)


def side(scene: dict, rng: np.random.Generator) -> Question:
    """Spatial relation of two things that are at least `SIDE_MARGIN` apart in the static image."""
    locations = np.array(scene["static"])[:-1]
    delta = locations[:, None] - locations  # (things, things, 2)
    i, j, axis = rng.choice(np.argwhere(abs(delta) > SIDE_MARGIN))
    word = (("left of", "right of"), ("behind", "in front of"))[axis][int(delta[i, j, axis] > 0)]
    asked = str(rng.choice(("left of", "right of") if axis == 0 else ("behind", "in front of")))
    return f"is the {scene['names'][i]} {asked} the {scene['names'][j]} ?", "yes" if word == asked else "no"


def color(scene: dict, rng: np.random.Generator) -> Question:
    """Colour of the only object of its shape; a `count` question where no shape is unique."""
    words = [n.split() for n in scene["names"][: scene["n_objects"]]]
    shapes = [s for _, s in words]
    unique = [w for w in words if shapes.count(w[1]) == 1]
    if not unique:
        return count(scene, rng)
    chosen = unique[int(rng.integers(len(unique)))]
    return f"what color is the {chosen[1]} ?", chosen[0]


def shape(scene: dict, rng: np.random.Generator) -> Question:
    """Shape of the object of a colour."""
    words = scene["names"][_pick(scene, rng, objects_only=True)].split()
    return f"what shape is the {words[0]} object ?", words[1]


def count(scene: dict, rng: np.random.Generator) -> Question:
    """Number of objects of a shape, in words."""
    asked = str(rng.choice(("cube", "cylinder", "ball")))
    n = sum(name.endswith(asked) for name in scene["names"][: scene["n_objects"]])
    return f"how many objects are a {asked} ?", ("zero", "one", "two", "three")[n]


def held(scene: dict, rng: np.random.Generator) -> Question:
    """Object between the closed fingers."""
    return "what does the robot hold ?", scene["held"] or "nothing"


def drawer(scene: dict, rng: np.random.Generator) -> Question:
    """State of the drawer."""
    return "is the drawer open ?", "yes" if scene["drawer"] else "no"


def light(scene: dict, rng: np.random.Generator) -> Question:
    """State of the light."""
    return "is the light on ?", "yes" if scene["light"] else "no"


def gripper(scene: dict, rng: np.random.Generator) -> Question:
    """State of the gripper."""
    return "is the gripper open ?", "yes" if scene["is_gripper_open"] else "no"


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
    """Short form of an instruction; the held-out templates of the task families are never asked."""
    templates, meaning = _SYNONYMS[int(rng.integers(len(_SYNONYMS)))]
    name = scene["names"][_pick(scene, rng, objects_only=True)]
    return f"{rng.choice(templates).format(a=name)} means", meaning.format(a=name)


QUESTION_KINDS: dict[str, tuple[Callable[[dict, np.random.Generator], Question], float]] = {  # kind -> (maker, weight)
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


def sample_questions(
    scene: dict, rng: np.random.Generator, n: int, kinds: tuple[str, ...] = tuple(QUESTION_KINDS)
) -> list[Question]:
    """Sample `n` questions with their answers about a scene, by the weights of their kinds."""
    weights = np.array([QUESTION_KINDS[k][1] for k in kinds])
    chosen = rng.choice(len(kinds), size=n, p=weights / weights.sum())
    return [QUESTION_KINDS[kinds[c]][0](scene, rng) for c in chosen]


def vocabulary() -> list[str]:
    """Texts to train a tokenizer on: questions, answers, instructions, paraphrases."""
    world = World("franka7", SETTINGS["simple"])
    rng, texts = np.random.default_rng(0), []
    for _ in range(60):
        world.randomize(rng)
        mujoco.mj_forward(world.model, world.data)
        texts += [part for pair in sample_questions(scene_state(world), rng, 30) for part in pair]
    for family in TASK_FAMILIES.values():
        texts += [t.format(a="red cube", b="blue ball") for t in family.templates + family.held_out]
    return texts
