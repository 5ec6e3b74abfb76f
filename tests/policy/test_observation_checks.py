"""Acting: an observation of another kind than in training is an error that names both, and never becomes an action."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from toy_policies import ONE_STEP, POLICY_HEAD, build, observe

from rvlm.policy.config import VLAConfig
from rvlm.policy.observation_checks import ObservationError
from rvlm.policy.policy import Policy, load_policy
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, Stage
from rvlm.vlm.backbones import SMALL_VLM

POLICY = SMALL_VLM.parent / "policy"

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def policy(toy_vlm, toy_stats):
    """A policy that was trained on images of 48 x 48."""
    model, processor = build(toy_vlm, toy_stats, POLICY_HEAD)
    model.config.image_size = [48, 48]
    return Policy(model, processor)


def given(static=None, wrist=None, **changes):
    seen = observe(np.random.default_rng(1))
    images = {name: image for name, image in (("static", static), ("wrist", wrist)) if image is not None}
    return {**seen, "images": seen["images"] | images, **changes}


def test_training_sets_the_policys_image_size(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    stage = Stage("sizes", ROBOT, (str(toy_demos),), str(toy_vlm), 8, policy=ONE_STEP, batch_size=8, n_processes=1)
    model, *_ = STAGE_BUILDERS[ROBOT](stage)
    assert list(model.config.image_size) == [48, 48]
    model.save_pretrained(tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.image_size == (48, 48)
    with pytest.raises(ObservationError, match=r"as in training; got \(96, 96, 3\)"):
        policy.select_action([given(static=np.zeros((96, 96, 3), np.uint8))])


def test_the_shipped_policy_knows_the_size_of_its_images():
    assert tuple(VLAConfig.from_pretrained(POLICY).image_size) == (96, 96)


IMAGES = {
    "float, 0 to 1": ((IMAGE / 255).astype(np.float32), r"\(48, 48, 3\) float32; images in \[0, 1\]"),
    "float, 0 to 255": (IMAGE.astype(np.float64), r"float64; convert it where it is read"),
    "float, not a number": (np.full((48, 48, 3), np.nan), r"float64"),
    "16 bits": (IMAGE.astype(np.uint16) * 257, r"uint16; give 8 bits a colour"),
    "signed": (IMAGE.astype(np.int64), r"int64; give 8 bits"),
    "black and white": (IMAGE > 127, r"bool; give 8 bits"),
    "channels first": (IMAGE.transpose(2, 0, 1), r"\(3, 48, 48\) uint8; put channels last"),
    "with alpha": (np.concatenate([IMAGE, IMAGE[..., :1]], axis=-1), r"\(48, 48, 4\) uint8; keep the three colours"),
    "gray": (IMAGE[..., 0], r"\(48, 48\) uint8; give a colour image"),
    "gray with an axis": (IMAGE[..., :1], r"\(48, 48, 1\) uint8; give a colour image"),
    "a batch": (IMAGE[None], r"\(1, 48, 48, 3\) uint8; give one image a camera"),
    "larger": (
        np.zeros((96, 96, 3), np.uint8),
        r"\(48, 48, 3\) uint8 RGB.*got \(96, 96, 3\) uint8; resize or crop to \(48, 48\)",
    ),
    "wider": (np.zeros((48, 64, 3), np.uint8), r"got \(48, 64, 3\) uint8; resize or crop"),
    "empty": (np.zeros((0, 48, 3), np.uint8), r"\(0, 48, 3\) uint8; check the camera"),
    "nothing": (None, r"got \(\) object"),
    "rows of different lengths": ([[1, 2], [3]], r"as a numpy array, got list"),
}


@pytest.mark.parametrize(("image", "named"), IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("camera", ["static", "wrist"])
def test_an_image_of_another_kind_is_refused(policy, camera, image, named):
    policy.reset()
    with pytest.raises(ObservationError, match=rf"robot 0: expected '{camera}' .*{named}"):
        seen = given()
        policy.select_action([{**seen, "images": seen["images"] | {camera: image}}])
    assert not policy.history._features, "what was refused is not remembered"


STATES = {
    "shorter": (np.zeros(6, np.float32), r"a state of 7 numbers \['x', .*got shape \(6,\) of float32"),
    "longer": (np.zeros(14), r"got shape \(14,\) of float64"),
    "of a batch": (np.zeros((1, 7)), r"got shape \(1, 7\)"),
    "text": (["0"] * 7, r"got shape \(7,\) of <U1"),
    "truth": (np.zeros(7, bool), r"of bool"),
    "complex": (np.zeros(7, complex), r"of complex128"),
    "nothing": (None, r"got shape \(\) of object"),
    "not a number": (np.array([0, 0, np.nan, 0, 0, 0, 0]), r"finite numbers, got .*nan.*check the sensors of z"),
    "infinite": (np.array([0, np.inf, 0, 0, 0, 0, -np.inf]), r"check the sensors of y, gripper_opening"),
}


@pytest.mark.parametrize(("state", "named"), STATES.values(), ids=STATES)
def test_a_state_of_another_kind_is_refused(policy, state, named):
    policy.reset()
    with pytest.raises(ObservationError, match=rf"robot 0: expected .*{named}"):
        policy.predict_action_chunk([given(state=state)])


INSTRUCTIONS = {
    "a list": ["lift it"],
    "bytes": b"lift it",
    "nothing": None,
    "a number": 3,
}


@pytest.mark.parametrize("instruction", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_an_instruction_is_one_text(policy, instruction):
    policy.reset()
    with pytest.raises(ObservationError, match="robot 0: expected an instruction as one text, got"):
        policy.select_action([given(instruction=instruction)])


@pytest.mark.parametrize("word", ["<act>", "<image>"])
def test_an_instruction_that_means_something_else_to_the_prompt_is_refused(policy, word):
    policy.reset()
    with pytest.raises(ObservationError, match=rf"\['{word}'\] are special tokens of the prompt"):
        policy.select_action([given(instruction=f"lift the {word}")])


def test_what_is_of_the_right_kind_acts(policy):
    """A state as a list or of whole numbers, an instruction that says nothing, more than is asked for."""
    for changes in ({"state": [0.0] * 7}, {"state": np.zeros(7, int)}, {"instruction": ""}, {"depth": None}):
        policy.reset()
        assert np.isfinite(policy.select_action([given(**changes)])).all()


def test_a_batch_is_a_list_of_dicts_one_a_robot(policy):
    policy.reset(2)
    for batch, named in (
        (given(), "got dict; put it in a list"),
        (np.zeros(2), "got ndarray"),
        ([given()], r"each of 2 robots, got 1; begin with reset\(n_robots=1\)"),
        ([given(), "lift it"], "robot 1: expected an observation as a dict, got str"),
        ([given(), {"static": IMAGE, "state": np.zeros(7)}], r"robot 1: .*add \['images', 'instruction'\]"),
        ([given(), given(images=IMAGE)], "robot 1: expected images as a dict, camera -> image; got ndarray"),
        (
            [given(), given(images={"front": IMAGE, "wrist": IMAGE})],
            r"cameras \['static', 'wrist'\].*got \['front', .*add \['static'\]",
        ),
    ):
        with pytest.raises(ObservationError, match=named):
            policy.select_action(batch)
    with pytest.raises(ValueError, match="n_robots of at least 1, got 0"):
        policy.reset(0)


def test_a_policy_that_does_not_know_its_images_size_takes_one_size_an_episode(toy_vlm, toy_stats):
    policy = Policy(*build(toy_vlm, toy_stats, ONE_STEP))
    assert policy.image_size == (48, 48), "of its backbone"
    small = np.zeros((24, 24, 3), np.uint8)
    with pytest.raises(ObservationError, match=r"images of one size.*'wrist of robot 0': \(48, 48\)"):
        policy.select_action([given(static=small)])
    policy.reset(2)
    with pytest.raises(ObservationError, match=r"images of one size.*'static of robot 1': \(24, 24\)"):
        policy.select_action([given(), given(static=small, wrist=small)])
    policy.reset()
    policy.select_action([given(static=small, wrist=small)])
    with pytest.raises(
        ObservationError, match=r"images of .*\(24, 24\).* as in this episode's first observation, got .*\(48, 48\)"
    ):
        policy.select_action([given()])


def test_a_state_far_from_training_warns_once_per_episode(policy):
    def warned():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            policy.select_action([given(state=np.array([512.0, 0, 0, 0, 0, 0, 0]))])
        return [str(w.message) for w in caught if "in the card's unit" in str(w.message)]

    policy.reset()
    (doubt,) = warned()
    assert doubt.startswith("robot 0: state 'x' is 512 [m], in training it was between") and not warned()
    policy.reset()
    assert warned()
    policy.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy.select_action([given()])


def test_an_angle_warns_in_degrees_and_not_for_being_new(policy):
    """Also where the angle hardly varied in training: half a turn is still valid."""
    robot = policy.expected.robot
    for low, high, fits, odd in ((-0.05, 0.05, np.pi, 90.0), (-3.13, -3.03, 3.13, 90.0), (-3.0, 3.0, -3.14, 60.0)):
        seen = dataclasses.replace(robot.stats["observation.state"], min=np.full(7, low), max=np.full(7, high))
        known = dataclasses.replace(robot, stats={**robot.stats, "observation.state": seen})
        checks = dataclasses.replace(policy.expected, robot=known)
        assert checks.range_warning([{"state": np.array([low] * 5 + [fits, low])}]) == ""
        assert f"state 'yaw' is {odd:g} [rad]" in checks.range_warning([{"state": np.array([low] * 5 + [odd, low])}])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_action_that_is_no_number_is_never_given(policy, bad):
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        model.head.layers[-1].bias[1] = bad
    for act in ("select_action", "predict_action_chunk"):
        broken = Policy(model, policy.prompt_builder.processor)
        with pytest.raises(ValueError, match=r"expected finite actions of the model, got others for dy of robot 0"):
            getattr(broken, act)([given()])
