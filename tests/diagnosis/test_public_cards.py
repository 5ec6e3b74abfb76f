"""Each public card: a data set of its shape is read, trained on, driven and checked; what is swapped is refused or named."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from public_datasets import PUBLIC, record_public, stand_in

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import EpisodeError
from rvlm.data.windows import EpisodeDataset, Windows, split
from rvlm.diagnosis import policy_checks
from rvlm.diagnosis.checklist import diagnose, first_fault
from rvlm.diagnosis.env_checks import check_images, check_replay
from rvlm.diagnosis.faults import faults_of, with_data, with_env
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.policy_checks import check_open_loop
from rvlm.envs.stand_in import StandIn, record_stand_in
from rvlm.envs.stand_in_expert import StandInExpert
from rvlm.policy.collation import RobotCollator
from rvlm.policy.embodiments import Embodiment
from rvlm.policy.factory import make_policy
from rvlm.policy.policy import Policy

SETTINGS = {"structure": "one_step", "head": "mlp", "chunk_size": 3, "head_options": {"hidden": 32}}
UNNAMED = ("pusht", "calvin")  # info.json names no dimension as the card does


@pytest.fixture(scope="module", params=PUBLIC)
def public(request, home):
    """Name of a card, and a data set of the shape that it describes."""
    return request.param, record_public(request.param, home / request.param)


def renamed(public, tmp_path, change):
    """A copy with a change of info.json's features."""
    name, root = public
    copy = shutil.copytree(root, tmp_path / "copy")
    info = json.loads((copy / "meta/info.json").read_text())
    change(info["features"])
    (copy / "meta/info.json").write_text(json.dumps(info))
    return lambda: EpisodeDataset(copy, name)


def test_a_data_set_of_its_shape_is_read_under_the_card(public):
    name, root = public
    data, described = EpisodeDataset(root, name), PUBLIC[name]
    assert json.loads((root / "meta/info.json").read_text()).get("rvlm") is None and data.spec.dataset == name
    assert data.fps == described.fps == data.spec.rate_hz
    assert set(data.camera_keys.values()) >= set(described.cameras) and set(data.cameras) == {
        key.rsplit(".", 1)[-1] for key in described.cameras
    }  # fmt: skip
    frames = data.frames_cache()
    sizes = {key.rsplit(".", 1)[-1]: size for key, size in (described.shown or described.cameras).items()}
    assert {camera: images.shape[1:3] for camera, images in frames.items()} == sizes


def test_a_policy_trains_a_step_and_drives_its_stand_in(public, toy_vlm):
    name, root = public
    data, env = EpisodeDataset(root, name), stand_in(name)
    torch.manual_seed(0)
    sizes = [images.shape[1:3] for images in data.frames_cache().values()]
    cameras = data.cameras if len(set(sizes)) == 1 else data.cameras[:1]  # a policy's cameras are of one size
    model, processor = make_policy(toy_vlm, data.spec, data.stats(), cameras=cameras, **SETTINGS)
    windows = Windows(data, 1, SETTINGS["chunk_size"], stats=model.stats, cameras=cameras)
    batch = RobotCollator(model.prompt_builder(processor))(windows.__getitems__(range(4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and model(**batch).loss < loss
    policy = Policy(model, processor)
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        action = policy.select_action([observation])[0]
        data.spec.check(np.clip(action, data.spec.low, data.spec.high)[None])
        observation, *_ = env.step(np.clip(action, data.spec.low, data.spec.high))
    with pytest.raises(Exception, match=r"camera|image"):
        policy.select_action([observation | {"images": dict(list(observation["images"].items())[1:])}])


def test_its_conventions_hold_in_data_and_stand_in(public):
    name, root = public
    data = EpisodeDataset(root, name)
    inputs = DiagnosisInputs(StandInExpert(data.spec), data, stand_in(name), n_episodes=2, n_frames=12)
    results = diagnose(inputs)
    assert first_fault(results) is None, results[-1]
    alone = diagnose(dataclasses.replace(inputs, policy=None, env=None))
    assert first_fault(alone) is None and sum("skipped" in result.measured for result in alone) == 5


def test_swapped_names_are_refused(public, tmp_path):
    name, _ = public
    described = PUBLIC[name]
    for key in ("action", "observation.state"):

        def swap(features, key=key):
            names = features[key]["names"]
            for group in names.values() if isinstance(names, dict) else [names]:
                group[0], group[1] = group[1], group[0]

        if name in UNNAMED and described.action is None:
            continue
        opened = renamed(public, tmp_path / key, swap)
        if name in UNNAMED:
            opened()  # by the numbers alone: below
        else:
            with pytest.raises(EpisodeError, match="bring the column into the card's order"):
                opened()


def test_a_camera_that_the_data_lacks_is_refused(public):
    name, root = public
    spec = ActionSpec.from_card(name)
    with pytest.raises(EpisodeError, match="unknown camera 'front_2'"):
        EpisodeDataset(root, dataclasses.replace(spec, cameras=("front_2", *spec.cameras[1:])))


def test_faults_of_the_numbers_are_named(public):
    """Without policy and environment: dimensions, signs, grippers, layouts, units, steps."""
    name, root = public
    inputs = DiagnosisInputs(None, EpisodeDataset(root, name), n_episodes=2)
    seen = [fault for fault in faults_of(inputs) if "image" not in fault.expected and "channels" not in fault.expected]
    wrong = {f.description: first_fault(diagnose(f.inject(inputs))) for f in seen}
    assert wrong == {f.description: f.expected for f in seen}
    assert {"two dimensions swapped", "actions a step late"} < set(wrong)


def test_swapped_cameras_are_named_against_the_environment(public):
    """By sizes where they differ, else by what is seen; from the data alone, nobody can tell."""
    name, root = public
    data = EpisodeDataset(root, name)
    if len(data.cameras) < 2:
        pytest.skip("one camera")
    inputs = DiagnosisInputs(None, data, stand_in(name), n_episodes=2)
    keys = dict(zip(data.cameras, reversed([data.camera_keys[camera] for camera in data.cameras]), strict=True))
    swapped = with_data(inputs, camera_keys=keys)
    swapped.dataset.camera_key = lambda camera: keys[camera]
    assert check_images(inputs).fault is None
    assert check_images(swapped).fault == "cameras swapped"
    assert check_images(dataclasses.replace(swapped, env=None)).fault is None


def test_a_public_cards_policy_is_refused_by_another_robot():
    names = list(PUBLIC)
    for one, other in itertools.pairwise(names):
        with pytest.raises(Exception, match="convention"):
            ActionSpec.from_card(one).require_same(ActionSpec.from_card(other))


TARGETS = ["so101", "aloha"]


@pytest.fixture(scope="module", params=TARGETS)
def targets(request, home):
    """Demonstrations whose actions are targets."""
    folder = home / f"targets_{request.param}"
    return EpisodeDataset(record_stand_in(StandIn(ActionSpec.from_card(request.param)), folder, range(8)))


@pytest.mark.parametrize("representation", ["recorded", "relative"])
def test_an_untrained_policy_of_targets_has_not_learned(targets, toy_vlm, representation):
    """It must be nearer than the state itself; a correlation by chance explains nothing."""
    torch.manual_seed(0)
    stats = targets.stats(episodes=split(targets)[0], relative_chunk=3 if representation == "relative" else None)
    made = make_policy(toy_vlm, targets.spec, stats, action_representation=representation, **SETTINGS)
    assert check_open_loop(DiagnosisInputs(Policy(*made), targets)).fault == "not learned"


def test_what_is_worse_than_to_stay_explains_nothing(toy_vlm, home):
    """Where a policy is far off, predictions by some other kind of statistics are always a little less so."""
    spec = ActionSpec.from_card("pusht")
    data = EpisodeDataset(record_stand_in(StandIn(spec), home / "pusht_targets", range(8)))
    model, processor = make_policy(toy_vlm, spec, data.stats(episodes=split(data)[0]), cameras=spec.cameras, **SETTINGS)
    [part for part in model.head.modules() if isinstance(part, torch.nn.Linear)][-1].bias.data += 1.0  # as far as q99
    result = check_open_loop(DiagnosisInputs(Policy(model, processor), data, n_frames=40))
    errors = result.evidence.set_index("candidate").iloc[:, 0]
    kinds = errors[errors.index.str.startswith("statistics kind")]
    assert errors[policy_checks.NO_IMAGES] < kinds.min() < 0.9 * errors["as it is"] and result.fault == "not learned"


@pytest.mark.parametrize("representation", ["recorded", "relative"])
def test_statistics_of_another_kind_are_named_in_any_representation(targets, toy_vlm, representation, monkeypatch):
    """A policy that predicts what was recorded, but un-normalises its predictions by another kind of statistics."""
    stats = targets.stats(episodes=split(targets)[0], relative_chunk=3 if representation == "relative" else None)
    policy = Policy(*make_policy(toy_vlm, targets.spec, stats, action_representation=representation, **SETTINGS))
    true, conditioning = policy.robot, policy.model.conditioning
    wrong = Embodiment(true.spec, {**stats, "action": dataclasses.replace(stats["action"], kind="mean_std")})

    def predicted(policy, windows, *_):
        samples = windows.__getitems__(range(len(windows)))
        numbers = {key: np.array([sample[key] for sample in samples]) for key in ("episode_index", "frame_index")}
        state = stats["observation.state"].unnormalize(np.stack([sample["state"][-1] for sample in samples]))
        chunks = np.stack([sample["action"][-1] for sample in samples])
        raw = {name: conditioning.raw_actions(by, chunks, state) for name, by in (("predicted", wrong), ("recorded", true))}
        return raw | numbers

    inputs = DiagnosisInputs(policy, targets, n_frames=40)
    monkeypatch.setattr(policy_checks, "predict_chunks", predicted)
    samples = policy_checks.policy_windows(policy, targets, inputs.sampled_episodes())
    monkeypatch.setattr(policy_checks, "policy_windows", lambda *_: samples)
    policy.robot = wrong
    result = check_open_loop(inputs)
    assert result.fault == "statistics kind" and result.measured.endswith("statistics kind: q01_q99: 0.00")


def test_a_state_that_is_not_finite_is_said_with_dimension_and_row(targets):
    for value in (np.nan, np.inf):

        def change(state, value=value):
            state = np.array(state)
            state[7, 1] = value
            return state

        result = diagnose(with_data(DiagnosisInputs(None, targets), columns={"observation.state": change}))[-1]
        assert result.fault == "numbers that are not finite"
        assert f"got {value} for {targets.spec.state_names[1]!r} in row 7" in result.measured


def test_any_two_cameras_that_are_swapped_are_named(home):
    spec = ActionSpec.from_card("aloha")
    data = EpisodeDataset(record_stand_in(StandIn(spec), home / "four_cameras", range(4)))
    inputs = DiagnosisInputs(None, data, StandIn(spec), n_episodes=2)
    for one, other in itertools.combinations(spec.cameras, 2):

        def observe(seen, one=one, other=other):
            images = seen["images"]
            return seen | {"images": images | {one: images[other], other: images[one]}}

        assert check_images(with_env(inputs, observe=observe)).fault == "cameras swapped", (one, other)


def test_a_camera_that_shows_something_else_is_named(public):
    name, root = public
    inputs = DiagnosisInputs(None, EpisodeDataset(root, name), stand_in(name), n_episodes=3)
    camera = inputs.cameras[-1]

    def observe(seen):
        noise = np.random.default_rng(0).integers(0, 255, seen["images"][camera].shape, dtype=np.uint8)
        return seen | {"images": seen["images"] | {camera: noise}}

    result = check_images(with_env(inputs, observe=observe))
    assert result.fault == "image unlike the recording" and f"; {camera}: " in result.measured
    assert check_images(inputs).fault is None


class EndsByItself(StandIn):
    """Ends after five steps, without success."""

    def step(self, action):
        """As of the stand-in, but for the end."""
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, self._n_steps >= 5, info


def test_an_environment_that_ends_before_the_recording_is_named(public):
    name, root = public
    env = EndsByItself(ActionSpec.from_card(name), sizes=stand_in(name).sizes)
    result = check_replay(DiagnosisInputs(None, EpisodeDataset(root, name), env, n_episodes=2))
    assert result.fault == "environment ends early" and "in 10 of 52 recorded steps, 2 episodes" in result.measured
    whole = check_replay(DiagnosisInputs(None, EpisodeDataset(root, name), stand_in(name), n_episodes=2))
    assert whole.fault is None and "in 52 of 52 recorded steps" in whole.measured
