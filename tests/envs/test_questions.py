"""Questions about scenes: answers are true by construction, scenes are stored completely and read back in order."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from rvlm.data.scenes import Scenes
from rvlm.envs.tabletop import rendered_scenes
from rvlm.envs.tabletop.questions import (
    N_LOCATIONS,
    N_OFFSETS,
    OFFSET_RANGE,
    QUESTION_KINDS,
    SIDE_MARGIN,
    location_token,
    paraphrase,
    sample_questions,
    vocabulary,
)
from rvlm.envs.tabletop.rendered_scenes import WORDS, collect_scenes, generate_scenes, make_scenes
from rvlm.envs.tabletop.tasks import TASK_FAMILIES

NAMES = ["red cube", "blue ball", "green cube", "drawer handle", "button", "slider", "white square", "gripper"]
SCENE = {
    "names": NAMES,
    "n_objects": 3,
    "static": [[0.1, 0.9], [0.5, 0.2], [0.8, 0.6], [0.3, 0.3], [0.4, 0.7], [0.6, 0.4], [0.7, 0.8], [0.45, 0.55]],
    "wrist": [[0.5, 0.5], [-0.2, 0.5], [0.9, 1.4], [0.2, 0.1], [3.0, 0.5], [0.7, 0.6], [0.1, 0.2], [0.5, 0.9]],
    "pos": [
        [0.1, -0.1, 0.02], [0, 0, 0.02], [0.1, 0.1, 0.02], [0, -0.2, 0.06],
        [0, 0.27, 0.03], [-0.2, 0, 0.04], [0.1, 0, 0], [0, 0, 0.2],
    ],
    "held": "blue ball",
    "drawer": True,
    "light": False,
    "is_gripper_open": False,
}  # fmt: skip


def asked(kind, n=60, scene=SCENE):
    rng = np.random.default_rng(0)
    return [QUESTION_KINDS[kind][0](scene, rng) for _ in range(n)]


def subject(question, names=NAMES):
    """Index of the one object that a question is about."""
    (name,) = [name for name in names if re.search(rf"the {name}\b", question)]
    return names.index(name)


def tokens(*values, n_bins=N_LOCATIONS):
    return "".join(f"<loc{int(np.clip(v * n_bins, 0, n_bins - 1)):02d}>" for v in values)


@pytest.mark.parametrize(
    ("value", "token"), [(0, "<loc00>"), (0.999, "<loc15>"), (1, "<loc15>"), (-3, "<loc00>"), (0.5, "<loc08>")]
)
def test_a_location_is_one_of_the_bins(value, token):
    assert location_token(value) == token


def test_locations_in_the_static_image_are_true():
    for question, answer in asked("where"):
        assert answer == tokens(*SCENE["static"][subject(question)])


def test_what_the_wrist_camera_does_not_see_is_out_of_view():
    answers = {}
    for question, answer in asked("where_wrist"):
        i = subject(question)
        assert answer == ("out of view" if i in (1, 2, 4) else tokens(*SCENE["wrist"][i]))
        answers[i] = answer
    assert len(answers) == len(NAMES)


def test_offsets_are_measured_from_the_gripper():
    for question, answer in asked("offset"):
        delta = np.subtract(SCENE["pos"][subject(question, NAMES[:-1])], SCENE["pos"][-1])
        assert answer == tokens(*(delta / (2 * OFFSET_RANGE) + 0.5), n_bins=N_OFFSETS)


def test_relations_are_those_of_the_image():
    answers = set()
    for question, answer in asked("side", 200):
        match = re.fullmatch(r"is the (.+) (left of|right of|behind|in front of) the (.+) \?", question)
        a, b = (SCENE["static"][NAMES.index(name)] for name in (match[1], match[3]))
        truth = {"left of": a[0] < b[0], "right of": a[0] > b[0], "behind": a[1] < b[1], "in front of": a[1] > b[1]}[match[2]]
        assert answer == ("yes" if truth else "no")
        axis = 0 if match[2] in ("left of", "right of") else 1
        assert abs(a[axis] - b[axis]) > SIDE_MARGIN, "too close to tell"
        answers.add((match[2], answer))
    assert len(answers) == 8


def test_colors_shapes_and_counts_are_true():
    assert set(asked("color")) == {("what color is the ball ?", "blue")}
    assert set(asked("shape")) == {(f"what shape is the {c} object ?", s) for c, s in (n.split() for n in NAMES[:3])}
    counts = (("cube", "two"), ("cylinder", "zero"), ("ball", "one"))
    assert set(asked("count")) == {(f"how many objects are a {shape} ?", n) for shape, n in counts}


def test_without_a_unique_shape_no_color_is_asked_for():
    twins = {**SCENE, "names": ["red cube", "blue cube", "green cube", *NAMES[3:]]}
    assert all(question.startswith("how many") for question, _ in asked("color", scene=twins))


@pytest.mark.parametrize(
    ("kind", "changes", "answer"),
    [
        ("held", {}, "blue ball"), ("held", {"held": None}, "nothing"),
        ("drawer", {}, "yes"), ("drawer", {"drawer": False}, "no"),
        ("light", {}, "no"), ("light", {"light": True}, "yes"),
        ("gripper", {}, "no"), ("gripper", {"is_gripper_open": True}, "yes"),
    ],
)  # fmt: skip
def test_states_are_true(kind, changes, answer):
    assert {a for _, a in asked(kind, 3, {**SCENE, **changes})} == {answer}


def test_a_caption_goes_from_left_to_right():
    assert {a for _, a in asked("caption", 3)} == {
        "a red cube , a blue ball , a green cube . the drawer is open . the light is off ."
    }


def test_no_paraphrase_is_a_held_out_template():
    held_out = {t.format(a=name, b=name) for f in TASK_FAMILIES.values() for t in f.held_out for name in NAMES[:3]}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(800):
        question, answer = paraphrase(SCENE, rng)
        text = question.removesuffix(" means")
        assert text not in held_out
        assert not any(n in question for n in NAMES[:3]) or any(n in answer for n in NAMES[:3] if n in question)
        seen.add(answer.split(" ")[0])
    assert {"lift", "push", "open", "close", "light", "slider"} <= seen


def test_questions_are_drawn_by_weight_and_kind():
    rng = np.random.default_rng(0)
    drawn = sample_questions(SCENE, rng, 400)
    n_where = sum(q.startswith("where is the") for q, _ in drawn)
    weights = {kind: weight for kind, (_, weight) in QUESTION_KINDS.items()}
    assert n_where / 400 == pytest.approx((weights["where"] + weights["where_wrist"]) / sum(weights.values()), abs=0.08)
    assert all(q == "is the light on ?" for q, _ in sample_questions(SCENE, rng, 10, ("light",)))


def test_the_vocabulary_is_the_same_every_time_and_holds_every_instruction():
    texts = vocabulary()
    assert texts == vocabulary()
    for family in TASK_FAMILIES.values():
        assert {t.format(a="red cube", b="blue ball") for t in family.templates} <= set(texts)


# -- stored scenes -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(home):
    return collect_scenes(5, first_seed=3, image_size=32, n_workers=1, per_part=2)


def test_scenes_are_read_back_in_order(folders):
    scenes = Scenes(folders)
    assert scenes.words == WORDS and all(scenes.records[0][state] in (True, False) for state in WORDS.states)
    assert len(scenes) == 5 and [len(np.load(f / "images.npy")) for f in folders] == [2, 2, 1]
    stored = [np.load(f / "images.npy")[i] for f, n in zip(folders, (2, 2, 1), strict=True) for i in range(n)]
    records = [json.loads(line) for f in folders for line in (f / "scenes.jsonl").read_text().splitlines()]
    for i in range(5):
        images, scene = scenes[i]
        assert images.shape == (2, 32, 32, 3) and np.array_equal(images, stored[i]) and scene == records[i]
        assert scene["names"][-1] == "gripper" and len(scene["pos"]) == len(scene["names"])


def test_scenes_of_other_words_are_not_mixed(folders, tmp_path):
    other = shutil.copytree(folders[0], tmp_path / "other")
    dataclasses.replace(WORDS, shapes=("cone",)).save(other)
    with pytest.raises(ValueError, match=r"expected scenes with the same words.json, got others in \['.*other'\] than in"):
        Scenes([folders[1], other])


def test_finished_parts_are_kept_and_missing_ones_are_made_again_alike(folders, monkeypatch):
    before = [(f / "images.npy").read_bytes() for f in folders]
    stamps = [(f / "images.npy").stat().st_mtime_ns for f in folders]
    for path in folders[1].iterdir():
        path.unlink()
    folders[1].rmdir()
    assert collect_scenes(5, first_seed=3, image_size=32, n_workers=1, per_part=2) == folders
    assert [(f / "images.npy").read_bytes() for f in folders] == before
    assert [(f / "images.npy").stat().st_mtime_ns == s for f, s in zip(folders, stamps, strict=True)] == [True, False, True]
    monkeypatch.setattr(rendered_scenes, "make_scenes", lambda *_: pytest.fail("nothing was left to do"))
    collect_scenes(5, first_seed=3, image_size=32, n_workers=1, per_part=2)


def test_a_part_exists_only_when_whole(home, monkeypatch):
    def break_off(*_):
        yield np.zeros((2, 8, 8, 3), np.uint8), SCENE
        raise KeyboardInterrupt

    monkeypatch.setattr(rendered_scenes, "generate_scenes", break_off)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(home / "part", "franka7", 0, 2, 8)
    assert not (home / "part").exists()


def test_images_of_a_scene_show_its_recorded_state():
    """The middle of an object in the static image has the object's colour, in most scenes that nothing hides it in."""
    from rvlm.envs.tabletop.scene import COLORS

    hits = []
    for images, scene in generate_scenes("franka7", 0, 6, image_size=96):
        for name, (column, row) in zip(scene["names"][:3], scene["static"], strict=False):
            if 0 < column < 1 and 0 < row < 1:
                seen = images[0][int(row * 96), int(column * 96)].astype(float)
                wanted = np.array(COLORS[name.split()[0]])
                hits.append(np.argmax(seen) == np.argmax(wanted))
    assert len(hits) > 8 and np.mean(hits) > 0.7
