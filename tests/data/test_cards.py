"""Data cards: every one parses and is complete, and its counts are those of the data if that is there."""

import re

import numpy as np
import pytest

from rvlm.data.actions import CARDS, ActionSpec, read_card
from rvlm.data.errors import CardError, SpecMismatch
from rvlm.data.windows import EpisodeDataset, EpisodeWriter
from rvlm.envs.demonstrations import Collection, collect_demonstrations

NAMES = sorted(p.stem for p in CARDS.glob("*.md"))
SECTIONS = ("What one action is", "How to get it", "Traps", "Splits", "Licence")


def counts_of(root):
    """Counts from the tables themselves, not from what info.json says of them."""
    dataset = EpisodeDataset(root)
    frames, used = dataset.column("frame_index"), np.unique(dataset.column("task_index"))
    return {"episodes": int((frames == 0).sum()), "frames": len(frames), "tasks": len(used)}


def check_counts(counts, root):
    found = counts_of(root)
    differing = {k: (counts[k], found[k]) for k in counts if counts[k] != found[k]}
    assert not differing, f"card and data in {root} differ (card, data): {differing}; write the data's counts into the card"


def test_the_documented_cards_exist():
    assert {"tabletop_franka7", "tabletop_ur6", "tabletop_small5", "calvin", "libero", "bridge", "fractal"} <= set(NAMES)
    assert {"so101", "so100", "koch", "droid", "aloha", "pusht"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_read_by_huggingface_hub(name):
    spec = ActionSpec.from_card(name)
    assert spec.dataset == name and len(set(spec.state_names)) == len(spec.state_names)
    assert ActionSpec.from_dict(spec.to_dict()) == spec
    ends = np.array([[True], [False]]).repeat(len(spec.gripper_indices), axis=1)
    neutral = spec.set_grippers(np.tile(np.add(spec.low, spec.high) / 2, (2, 1)), ends)
    spec.check(neutral)
    assert spec.is_open(neutral).tolist() == ends.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_card_has_every_section(name):
    card, text = read_card(name), (CARDS / f"{name}.md").read_text()
    assert {"pretty_name", "license", "language", "task_categories", "tags", "size_categories"} <= set(card)
    assert {"train", "held_out"} <= set(card["rvlm"]["splits"])
    assert [s for s in re.findall(r"^## (.*)$", text, re.M) if s in SECTIONS] == list(SECTIONS)
    assert "https://" in text or name.startswith("tabletop")


@pytest.mark.parametrize("name", NAMES)
def test_prose_agrees_with_the_machine_read_block(name):
    """Scale and rate in the text equal the front matter."""
    spec, text = ActionSpec.from_card(name), (CARDS / f"{name}.md").read_text().split("---\n", 2)[2]
    assert f"{spec.rate_hz:g} Hz" in text
    for scale, unit in zip(spec.scale, spec.units, strict=True):
        assert scale == 1 or f"{scale:g} {unit}" in text, f"{name}: the text does not say that one unit is {scale:g} {unit}"


@pytest.mark.parametrize("robot", ["franka7", "ur6", "small5", "franka7_joint", "so101", "two_arms", "planar"])
def test_counts_are_those_of_the_data(robot, tmp_path, monkeypatch):
    """The cards of robots that are simulated here count the demonstrations that every collection begins with.

    Rounding differs between processors, and contacts amplify it: some episodes end a step sooner or later.
    """
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    counts = read_card(f"tabletop_{robot}")["rvlm"]["counts"]
    root = collect_demonstrations(Collection(f"tabletop/{robot}", counts["episodes"]), progress=False)
    n_frames = counts_of(root)["frames"]
    assert n_frames == pytest.approx(counts["frames"], rel=0.01)
    check_counts({**counts, "frames": n_frames}, root)


def test_wrong_counts_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    spec = ActionSpec.from_card("tabletop_franka7")
    writer = EpisodeWriter(tmp_path / "datasets/demos", spec)
    for n in (3, 4):
        images = {f"observation.images.{c}": np.full((n, 16, 16, 3), n, np.uint8) for c in spec.cameras}
        action = spec.set_grippers(np.zeros((n, 7), np.float32), True)
        writer.add_episode({**images, "observation.state": np.full((n, 7), n, np.float32), "action": action}, "lift")
    root = writer.finalize()
    check_counts({"episodes": 2, "frames": 7, "tasks": 1}, root)
    with pytest.raises(AssertionError, match=r"differ \(card, data\): {'frames': \(8, 7\)}"):
        check_counts({"episodes": 2, "frames": 8, "tasks": 1}, root)


# The conventions that cost other projects their success rate, from the public sources that the cards name.
CONVENTIONS = {  # open, close, rotation, scale of position and rotation, rate [Hz]
    "calvin": (1, -1, "euler_xyz", (0.02, 0.05), 30),
    "libero": (-1, 1, "axis_angle", (0.05, 0.5), 20),
    "bridge": (1, 0, "euler_xyz", (1, 1), 5),
    "fractal": (1, 0, "euler_xyz", (1, 1), 3),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_known_conventions(name):
    spec = ActionSpec.from_card(name)
    arm, gripper = spec.action
    scale = (arm.scale[0], arm.scale[3])
    assert (gripper.open, gripper.close, arm.rotation, scale, spec.rate_hz) == CONVENTIONS[name] and arm.kind == "pose_delta"
    assert spec.image_rotation_deg == (180 if name == "libero" else 0)


GRIPPERS = {"so101": (100, 0, 30), "so100": (100, 0, 30), "koch": (100, 0, 30), "droid": (0, 1, 15), "aloha": (1, 0, 50)}


@pytest.mark.parametrize("name", GRIPPERS)
def test_known_conventions_of_joint_robots(name):
    """Absolute targets, continuous grippers; the state has the same names as the action."""
    spec, (opened, closed, rate_hz) = ActionSpec.from_card(name), GRIPPERS[name]
    assert {group.kind for group in spec.action} == {"joint", "gripper"} and not spec.is_binary.any()
    assert all((g.open, g.close) == (opened, closed) for _, g in (*spec.action_groups("gripper"), *spec.state_groups("gripper")))
    assert (spec.state_names, spec.rate_hz) == (spec.names, rate_hz)


def test_a_calvin_policy_does_not_step_libero():
    with pytest.raises(SpecMismatch) as error:
        ActionSpec.from_card("calvin").require_same(ActionSpec.from_card("libero"))
    for field in ("group 0 scale", "group 0 rotation", "group 1 open", "rate_hz", "cameras", "image_rotation_deg"):
        assert f"{field}: " in str(error.value)


def test_the_three_arms_differ_where_robots_differ():
    specs = [ActionSpec.from_card(f"tabletop_{arm}") for arm in ("franka7", "ur6", "small5")]
    for field in ("robot", "scale", "rate_hz"):
        assert len({getattr(s, field) for s in specs}) == 3, field
    assert len({(s.action[1].open, s.action[1].close) for s in specs}) == 3


def test_a_card_with_a_misspelt_field_is_refused(tmp_path):
    text = (CARDS / "tabletop_ur6.md").read_text().replace(" open:", " opened:")
    (tmp_path / "mine.md").write_text(text)
    with pytest.raises(CardError, match=r"action group 1: unknown fields \['opened'\]"):
        ActionSpec.from_card(tmp_path / "mine.md")
