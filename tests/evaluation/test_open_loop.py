"""Open loop: errors in SI units at the right frames, none past the end, input ablations, and one message for another robot."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pretended_card import CARD, PretendedCard
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec, Group
from rvlm.data.errors import SpecMismatch
from rvlm.data.rotations import from_rotation
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, Windows
from rvlm.diagnosis import policy_checks
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.evaluation import open_loop
from rvlm.policy.embodiments import Embodiment
from rvlm.policy.factory import make_policy
from rvlm.policy.observation_checks import ObservationError
from rvlm.policy.policy import Policy
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.small import small_vlm, train_tokenizer

SPEC = ActionSpec.from_card("tabletop_franka7")
LENGTHS = (5, 7)


def an_episode(n, seed):
    rng = np.random.default_rng(seed)
    action = SPEC.set_grippers(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random((n, 1)) > 0.5)
    images = {f"observation.images.{c}": rng.integers(0, 255, (n, 96, 96, 3), dtype=np.uint8) for c in SPEC.cameras}
    return {**images, "observation.state": rng.normal(size=(n, 7)).astype(np.float32), "action": action}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(tmp_path_factory.mktemp("home")))
        writer = EpisodeWriter(tmp_path_factory.mktemp("data") / "demos", SPEC)
        for seed, n in enumerate(LENGTHS):
            writer.add_episode(an_episode(n, seed), "lift the red cube")
        yield EpisodeDataset(writer.finalize())


KINDS = [  # structure, history, n_obs_steps, embodiment
    ("one_step", None, 1, None),
    ("policy_head", "lstm", 3, None),
    ("one_step", None, 1, "name"),
    ("one_step", None, 1, "token"),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[3]}")
def policy(request, dataset, tmp_path_factory):
    structure, history, n_obs_steps, embodiment = request.param
    torch.manual_seed(0)
    vlm = SMALL_VLM
    if not vlm.exists():
        vlm = tmp_path_factory.mktemp("vlm")
        for part in small_vlm(train_tokenizer(["lift the red cube"], [])):
            part.save_pretrained(vlm)
    settings = {"structure": structure, "history": history, "n_obs_steps": n_obs_steps, "chunk_size": 3}
    model, processor = make_policy(vlm, SPEC, dataset.stats(), embodiment_conditioning=embodiment, **settings)
    if model.embodiment_embedding is not None:
        torch.nn.init.normal_(model.embodiment_embedding)
    return Policy(model, processor)


def test_errors_are_those_of_the_policy_stepped_through_the_recording(policy, dataset):
    errors = open_loop.open_loop_errors(policy, dataset, [1], batch_size=4)
    assert errors.shape[0] == LENGTHS[1] * SPEC.n_dims and list(errors["dimension"].unique()) == list(SPEC.names)
    recorded, frames = dataset.column("action")[LENGTHS[0] :], dataset.frames_cache()
    state = dataset.column("observation.state")
    policy.reset(1)
    for i in range(LENGTHS[1]):
        row = LENGTHS[0] + i
        images = {"images": {camera: images[row] for camera, images in frames.items()}}
        (chunk,) = policy.predict_action_chunk([{**images, "state": state[row], "instruction": "lift the red cube"}])
        real = recorded[i : i + 3]
        error = np.abs(SPEC.to_si(chunk[: len(real)] - real))
        error[:, 6:] = SPEC.is_open(chunk[: len(real)]) != SPEC.is_open(real)
        measured = errors[errors["frame_index"] == i]
        np.testing.assert_allclose(measured["first"], error[0], atol=2e-5)
        np.testing.assert_allclose(measured["chunk"], error.mean(0), atol=2e-5)


def test_chunks_are_predicted_on_another_device_as_on_the_cpu(policy, dataset):
    windows = open_loop.policy_windows(policy, dataset)
    expected = open_loop.predict_chunks(policy, windows, batch_size=8)["predicted"]
    with PretendedCard():
        policy.model.to(CARD)
        predicted = open_loop.predict_chunks(policy, windows, batch_size=8)["predicted"]
        policy.model.to("cpu")
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def test_an_input_ablation_changes_the_observation(policy, dataset):
    plain, blind = (open_loop.open_loop_errors(policy, dataset, ablation=ablation) for ablation in ("none", "blank_image"))
    assert not np.allclose(plain["first"], blind["first"])


@pytest.fixture
def instructed(dataset, tmp_path):
    """Demonstrations of three instructions, of which two are paraphrases."""
    texts = {"lift the red cube": "lift", "pick up the red cube": "lift", "open the drawer": "open_drawer"}
    writer = EpisodeWriter(tmp_path / "instructed", SPEC)
    for seed, (text, family) in enumerate(texts.items()):
        writer.add_episode(an_episode(4, seed), text, {"task": family})
    return EpisodeDataset(writer.finalize()), dict(enumerate(texts))


@pytest.mark.parametrize("batch_size", [1, 3, 12])
@pytest.mark.parametrize("episodes", [None, [0, 2], [1]])
def test_shuffled_language_changes_every_frame_to_another_family(instructed, batch_size, episodes):
    data, texts = instructed
    windows = Windows(data, episodes=episodes)
    change = open_loop._input_ablation("shuffled_language", windows)
    for start in range(0, len(windows), batch_size):
        samples = windows.__getitems__(range(start, min(start + batch_size, len(windows))))
        for sample, changed in zip(samples, change(samples), strict=True):
            assert sample["instruction"] == texts[int(sample["episode_index"])] != changed["instruction"]
            is_lift = sample["episode_index"] < 2
            assert (changed["instruction"] == texts[2]) == is_lift, "another family, not the same one in other words"


def test_shuffled_language_of_one_instruction_is_refused(policy, dataset):
    with pytest.raises(ValueError, match="all of 2 have 'lift the red cube'; add episodes"):
        open_loop.open_loop_errors(policy, dataset, ablation="shuffled_language")


def test_another_robots_demonstrations_are_refused(policy, dataset, monkeypatch):
    monkeypatch.setattr(dataset, "spec", SPEC.replace_group("action", 1, open=-1.0, close=1.0))
    with pytest.raises(SpecMismatch, match="policy vs demonstrations: 2 convention"):
        open_loop.open_loop_errors(policy, dataset)


def recorded(folder, spec, action):
    writer = EpisodeWriter(folder, spec)
    episode = {**an_episode(len(action), 7), "action": action.astype(np.float32)}
    writer.add_episode(episode, "lift the red cube")
    return EpisodeDataset(writer.finalize())


def test_a_policy_is_evaluated_on_the_robot_that_it_acts_for(dataset, tmp_path, monkeypatch):
    """The second robot of a mixture: in its own conventions and statistics, and so are the diagnostic checks."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    second = ActionSpec.from_card("tabletop_ur6")
    rng = np.random.default_rng(3)
    action = second.set_grippers(rng.uniform(-0.3, 0.3, (5, 7)), rng.random((5, 1)) > 0.5)
    other = recorded(tmp_path / "ur6", second, action)
    model, processor = make_policy(SMALL_VLM, SPEC, dataset.stats(), chunk_size=3)
    model.register_embodiments([Embodiment(SPEC, dataset.stats()), Embodiment(second, other.stats(episodes=[0]))])
    model.save_pretrained(tmp_path / "policy", processor)
    policy = Policy(model, processor, spec=second)
    errors = open_loop.open_loop_errors(policy, other)
    image, wrist = (other.frames_cache()[c][0] for c in ("static", "wrist"))
    seen = {"images": {"static": image, "wrist": wrist}, "state": other.column("observation.state")[0]}
    (chunk,) = policy.predict_action_chunk([{**seen, "instruction": "lift the red cube"}])
    by_hand = np.abs(second.to_si(chunk[0] - other.column("action")[0]))
    by_hand[6:] = second.is_open(chunk[0]) != second.is_open(other.column("action")[0])
    np.testing.assert_allclose(errors[errors["frame_index"] == 0]["first"], by_hand, atol=2e-5)
    of_folder = open_loop.open_loop_errors(tmp_path / "policy", other)
    np.testing.assert_allclose(of_folder["first"], errors["first"], atol=1e-6)
    with pytest.raises(SpecMismatch, match="policy vs demonstrations"):
        open_loop.open_loop_errors(policy, dataset)
    env = SimpleNamespace(unwrapped=SimpleNamespace(action_spec=second))
    inputs = DiagnosisInputs(policy, other, env)
    assert policy_checks.check_interface(inputs).fault is None
    monkeypatch.setattr(DiagnosisInputs, "training_episodes", lambda self: np.array([0]))
    assert policy_checks.check_statistics(inputs).fault is None
    assert policy_checks.check_statistics(dataclasses.replace(inputs, policy=Policy(model, processor))).fault is not None


def test_a_dimension_that_a_robot_does_not_have_is_left_out(tmp_path, monkeypatch):
    """The first one too: no mean over zero errors."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    spec = SPEC.replace_group("action", 0, absent=("dx", "droll"))
    action = an_episode(5, 2)["action"]
    action[:, [0, 3]] = 0
    dataset = recorded(tmp_path / "lame", spec, action)
    policy = Policy(*make_policy(SMALL_VLM, spec, dataset.stats(episodes=[0]), chunk_size=3))
    errors, constant = open_loop.open_loop_errors(policy, dataset), open_loop.constant_baseline(dataset, [0], [0])
    for table in (errors, constant):
        assert table["dimension"].unique().tolist() == ["dy", "dz", "dpitch", "dyaw", "gripper"] and len(table) == 5 * 5
        assert np.isfinite(table[["first", "chunk"]]).all(axis=None)
    assert errors[errors["dimension"] == "dpitch"]["unit"].unique().tolist() == ["rad"]


def test_rotations_are_compared_as_rotations():
    """Euler angles by the unit of a turn; q and -q are one rotation."""
    pose = dataclasses.replace(SPEC.action[0], kind="pose", frame="base")
    names, units = ("x", "y", "z", "qx", "qy", "qz", "qw"), ("m",) * 3 + ("1",) * 4
    bounds = {"low": (-180.0,) * 7, "high": (180.0,) * 7, "scale": (1.0,) * 7}
    quaternion = dataclasses.replace(
        SPEC, action=(dataclasses.replace(pose, names=names, units=units, rotation="quat_xyzw", **bounds),)
    )
    q = np.array([[0, 0, 0, 0.6, 0, 0, 0.8]])
    assert open_loop.action_errors(quaternion, q, q * [1, 1, 1, -1, -1, -1, -1]).max() == 0
    bounds = {key: values[:6] for key, values in bounds.items()}
    angles = dataclasses.replace(pose, units=("m",) * 3 + ("deg",) * 3, rotation="euler_xyz", **bounds)
    spec = dataclasses.replace(SPEC, action=(angles,))
    yaw = np.array([[0, 0, 0, 0, 0, 1.0]])
    assert open_loop.action_errors(spec, 45 * yaw, 0 * yaw)[0, 5] == 45
    assert open_loop.action_errors(spec, 179 * yaw, -179 * yaw)[0, 5] == pytest.approx(2)


def test_recordings_of_another_size_are_refused(policy, dataset):
    expected = dataclasses.replace(policy.expected, sizes=dict.fromkeys(policy.expected.sizes, (48, 48)))
    other = Policy(policy.model, policy.prompt_builder.processor)
    other.expected = expected
    with pytest.raises(ObservationError, match=r"expected \(48, 48\) \(h, w\), as in training, got \(96, 96\)"):
        open_loop.open_loop_errors(other, dataset)


def test_position_error_is_a_distance_and_tables_have_intervals_over_episodes():
    frame = {"episode_index": 0, "frame_index": 0, "dimension": list(SPEC.names), "unit": list(SPEC.units), "chunk": 0.0}
    errors = pd.concat(
        [pd.DataFrame({**frame, "first": [3.0, 0, 4, 9, 9, 9, 1]}), pd.DataFrame({**frame, "first": 0.0, "episode_index": 1})]
    )
    assert open_loop.position_error(errors).tolist() == [5.0, 0.0]
    table = open_loop.error_table({"a": errors}).set_index("dimension")
    assert table.loc["dx", ["value", "n"]].tolist() == [1.5, 2]
    assert table.loc["dx", ["low", "high"]].tolist() == pytest.approx([1.5 - 12.706 * 1.5, 1.5 + 12.706 * 1.5], abs=1e-3)
    assert table.loc["droll", "unit"] == "rad"


def test_constant_baseline_predicts_the_training_mean(dataset):
    errors = open_loop.constant_baseline(dataset, [0], [1])
    action = dataset.column("action")
    expected = np.abs(SPEC.to_si(action[5:] - action[:5].mean(0)))
    dx = errors[errors["dimension"] == "dx"]
    np.testing.assert_allclose(dx["first"], expected[:, 0], rtol=1e-5)
    assert dx["frame_index"].tolist() == list(range(7)) and set(errors.loc[errors["dimension"] == "gripper", "first"]) <= {
        0.0,
        1.0,
    }


class Known:
    """A policy of known actions, by the row that the state tells."""

    def __init__(self, actions):
        self.actions = actions

    def reset(self, n_robots=None):
        pass

    def select_action(self, observations):
        return np.stack([self.actions[round(float(observation["state"][0]))] for observation in observations])


@pytest.mark.parametrize("layout", ["quat_xyzw", "quat_wxyz"])
def test_the_mean_of_quaternions_is_that_of_rotations(layout, tmp_path):
    """Of a tool that points down, recorded with w from 0 to 1: x jumps, and plain mean and spread are those of no rotation."""
    names = ("x", "y", "z", "q0", "q1", "q2", "q3")
    pose = Group("pose", names, ("m",) * 3 + ("1",) * 4, low=(-1.0,) * 7, high=(1.0,) * 7, frame="base", rotation=layout)
    spec = ActionSpec("down", "arm", 10.0, ("top",), (pose,), (Group("joint", ("a",), ("rad",)),))
    rng = np.random.default_rng(0)
    down = Rotation.from_euler("x", np.pi) * Rotation.from_rotvec(rng.normal(0, 0.15, (80, 3)))
    action = np.concatenate([rng.uniform(-0.5, 0.5, (80, 3)), from_rotation(down, layout)], 1)
    writer = EpisodeWriter(tmp_path / "down", spec)
    for rows in np.arange(80).reshape(4, 20):
        columns = {"action": action[rows].astype(np.float32), "observation.state": rows[:, None].astype(np.float32)}
        writer.add_episode({"observation.images.top": np.zeros((20, 16, 16, 3), np.uint8), **columns}, "lift the red cube")
    data = EpisodeDataset(writer.finalize())
    constant = open_loop.constant_baseline(data, [0, 1, 2], [3])
    x = names[3 + (layout == "quat_wxyz")]
    assert constant.loc[constant["dimension"] == x, "first"].mean() < 0.05

    smooth = action * np.where(np.arange(7) > 2, np.sign(action[:, [names.index(x)]]), 1)
    opposite = smooth * np.where(np.arange(7) < 3, -1, 1)
    for acted, fault in ((np.tile(smooth.mean(0), (80, 1)), "not learned"), (opposite, "sign of a dimension"), (smooth, None)):
        assert policy_checks.check_open_loop(DiagnosisInputs(Known(acted), data)).fault == fault
