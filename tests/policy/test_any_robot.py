"""Robots of other dimensions and cameras: alone, in a mixture, relative to the state, with images of several sizes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rvlm.data.actions import ActionSpec, Group
from rvlm.data.resizing import resize
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, split
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.policy_checks import check_statistics
from rvlm.evaluation.open_loop import policy_windows, predict_chunks
from rvlm.policy.embodiments import Embodiment
from rvlm.policy.factory import load_vla, make_policy, modify_policy
from rvlm.policy.fast_tokenizer import FASTTokenizer
from rvlm.policy.observation_checks import ObservationError
from rvlm.policy.policy import Policy, load_policy
from rvlm.policy.real_time_chunking import continue_chunk
from rvlm.policy.token_heads import hold_masked
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import train_stage_in_process

POLICY = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}
SIZES = {"front": (40, 60), "hand": (24, 24)}


def joint_robot(names=("a", "b"), dataset="joints"):
    joints = Group("joint", names, ("rad",) * len(names), low=(-9.0,) * len(names), high=(9.0,) * len(names))
    jaw = Group("gripper", ("jaw",), ("1",), low=(0.0,), high=(100.0,), open=100.0, close=0.0)
    state = (Group("joint", names, ("rad",) * len(names)), Group("gripper", ("jaw",), ("1",)))
    return ActionSpec(dataset, "arm", 10.0, tuple(SIZES), (joints, jaw), state)


PLANAR = ActionSpec(
    "plane",
    "plane",
    10.0,
    tuple(SIZES),
    (Group("pose", ("x", "y"), ("px", "px"), low=(0.0, 0.0), high=(512.0, 512.0), frame="world"),),
    (Group("pose", ("x", "y"), ("px", "px"), frame="world"),),
)
JOINTS = joint_robot()
STATELESS = replace(PLANAR, dataset="blind", state=())
RELATIVE = {"action_representation": "relative", "has_state": False}


def record(folder, spec, n_episodes=6, n=8):
    """Targets that lead the state by a tenth of their range."""
    writer = EpisodeWriter(folder, spec)
    for episode in range(n_episodes):
        rng = np.random.default_rng(episode)
        images = {f"observation.images.{c}": rng.integers(0, 255, (n, *size, 3), dtype=np.uint8) for c, size in SIZES.items()}
        span = np.subtract(spec.high, spec.low)
        state = np.add(spec.low, span * rng.uniform(0.3, 0.6, (n, spec.n_dims)))
        action = state + 0.1 * span * rng.uniform(0.5, 1, (n, spec.n_dims))
        columns = {"action": action.astype(np.float32), "observation.state": state.astype(np.float32)}
        if not spec.state_names:
            del columns["observation.state"]
        writer.add_episode({**images, **columns}, "push the block")
    return str(writer.finalize())


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))


def trained(folders, vlm, out, **changes):
    policy = {**POLICY, **changes.pop("policy", {})}
    stage = Stage("any", ROBOT, tuple(folders), str(vlm), 24, policy=policy, batch_size=8, n_processes=1, **changes)
    train_stage_in_process(stage, out)
    return out / "model"


def observe(spec, seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 255, (*size, 3), dtype=np.uint8) for camera, size in sizes.items()}
    state = np.add(spec.low, spec.high)[: len(spec.state_names)] / 2
    return {"images": images, "state": state.astype(np.float32), "instruction": "push the block"}


@pytest.mark.filterwarnings("error:Initializing zero-element tensors")
@pytest.mark.parametrize("spec", [JOINTS, PLANAR, STATELESS], ids=["joints", "planar", "no state"])
def test_a_robot_of_any_dimensions_is_trained_and_acts(spec, toy_vlm, tmp_path):
    folder = trained([record(tmp_path / "d", spec)], toy_vlm, tmp_path / "out")
    policy = load_policy(folder)
    chunk = policy.predict_action_chunk([observe(spec)])
    assert chunk.shape == (1, 3, spec.n_dims) and np.isfinite(chunk).all()
    assert policy.model.config.camera_sizes == {spec.dataset: {camera: list(size) for camera, size in SIZES.items()}}
    data = EpisodeDataset(tmp_path / "d")
    found = predict_chunks(policy, policy_windows(policy, data))
    assert found["predicted"].shape == (48, 3, spec.n_dims) and np.allclose(
        found["recorded"][:, 0], data.column("action"), atol=1e-2
    )


def test_a_smaller_image_is_resized_as_in_training_and_another_size_refused(toy_vlm, tmp_path):
    folder = trained([record(tmp_path / "d", JOINTS)], toy_vlm, tmp_path / "out", policy={"image_size": [32, 48]})
    policy, shown = load_policy(folder), []
    assert policy.model.config.image_size == [32, 48] and policy.image_size is None, "an environment keeps its own two sizes"
    add = policy.history.add
    policy.history.add = lambda images, *rest: (shown.append(images), add(images, *rest))
    seen = observe(JOINTS)
    policy.predict_action_chunk([seen])
    assert shown[0].shape == (1, 2, 32, 48, 3)
    for at, camera in enumerate(SIZES):
        assert (shown[0][0, at] == resize(seen["images"][camera], (32, 48))).all()
    with pytest.raises(ObservationError, match=r"'hand' as \(24, 24, 3\).*got \(40, 60, 3\)"):
        policy.select_action([observe(JOINTS, sizes=dict.fromkeys(SIZES, (40, 60)))])
    swapped = dict(zip(SIZES, reversed(SIZES.values()), strict=True))
    with pytest.raises(ObservationError, match=r"'front' as \(40, 60, 3\)"):
        policy.select_action([observe(JOINTS, sizes=swapped)])


def test_relative_targets_move_with_the_state(toy_vlm, tmp_path):
    folder = trained(
        [record(tmp_path / "d", JOINTS)],
        toy_vlm,
        tmp_path / "out",
        policy={"action_representation": "relative", "has_state": False},
    )
    policy = load_policy(folder)
    here, there = observe(JOINTS), observe(JOINTS)
    there["state"] = here["state"] + np.float32([0.5, -0.25, 3])
    policy.reset(2)
    chunk = policy.predict_action_chunk([here, there])
    assert np.allclose(chunk[1, :, :2] - chunk[0, :, :2], [0.5, -0.25], atol=1e-4), "the network itself sees no state"
    assert np.allclose(chunk[1, :, 2], chunk[0, :, 2], atol=1e-4), "grippers are not relative"
    data = EpisodeDataset(tmp_path / "d")
    found = predict_chunks(policy, policy_windows(policy, data))
    assert np.allclose(found["recorded"][:, 0], data.column("action"), atol=1e-3)
    assert check_statistics(DiagnosisInputs(policy, data)).fault is None
    recorded = Policy(*make_policy(toy_vlm, JOINTS, policy.model.stats, **POLICY))
    assert check_statistics(DiagnosisInputs(recorded, data)).fault == "statistics of another dataset"
    for settings in ({"action_representation": "recorded"}, {"chunk_size": 5}):
        with pytest.raises(ValueError, match="expected action_representation='relative' and chunk_size=3, of which"):
            modify_policy(folder, **settings)
    assert modify_policy(folder, n_action_steps=2)[0].config.relative_chunk == 3
    with pytest.raises(ValueError, match="different origins"):
        load_policy(folder, n_action_steps=1, temporal_ensemble_coeff=0.1)


def test_the_chunk_that_is_continued_is_relative_to_the_newest_state(toy_vlm, tmp_path, monkeypatch):
    settings = {"head": "flow", "chunk_size": 8, **RELATIVE}
    policy = load_policy(trained([record(tmp_path / "d", JOINTS)], toy_vlm, tmp_path / "out", policy=settings))
    before, now, given = observe(JOINTS), observe(JOINTS), []
    now["state"] = before["state"] + np.float32([0.5, -0.25, 3])
    old = policy.predict_action_chunk([before])[:, 2:]

    def spy(head, features, previous, **options):
        given.append(previous)
        return continue_chunk(head, features, previous, **options)

    monkeypatch.setattr("rvlm.policy.policy.continue_chunk", spy)
    assert policy.predict_action_chunk([now], old, n_frozen=2).shape == (1, 8, 3)
    raw = policy.model.conditioning.raw_actions(policy.robot, given[0].numpy(), now["state"][None])
    assert np.allclose(raw, old, atol=1e-4), "targets stay where they were"


def test_tokens_of_relative_targets_are_learned_from_relative_targets(toy_vlm, tmp_path):
    policy = {"head": "fast", "chunk_size": 3, "head_options": {"scale": 4.0}, **RELATIVE}
    folder = record(tmp_path / "d", JOINTS)
    stage = Stage("fast", ROBOT, (folder,), str(toy_vlm), 24, policy=policy, batch_size=8, n_processes=1)
    model, processor, *_ = STAGE_BUILDERS[ROBOT](stage)
    data = EpisodeDataset(folder)
    windows = policy_windows(Policy(model, processor), data, split(data)[0])
    chunks = windows.batch(range(len(windows)))
    held = hold_masked(*(torch.from_numpy(chunks[name][:, 0]) for name in ("action", "action_mask")))
    learned = FASTTokenizer(3, JOINTS.is_binary, 4.0).learn(held.numpy(), model.head.max_vocab)
    assert windows.is_relative and model.config.action_vocabulary["merges"] == list(learned.merges)


def test_robots_of_different_dimensions_share_a_policy(toy_vlm, tmp_path):
    folders = [record(tmp_path / spec.dataset, spec) for spec in (JOINTS, PLANAR)]
    stage = Stage("both", ROBOT, tuple(folders), str(toy_vlm), 24, policy=POLICY, batch_size=8, n_processes=1)
    model, _, samples, collate = STAGE_BUILDERS[ROBOT](stage)
    assert [slot[1] for slot in model.config.action_slots] == ["a", "b", "jaw", "x", "y"]
    assert model.config.state_slots == ["a", "b", "jaw", "x", "y"]
    batch = collate([samples[i] for i in range(24)])
    for row, mask in zip(batch["dataset_index"], batch["action_mask"], strict=True):
        assert mask[0].any(0).tolist() == ([True] * 3 + [False] * 2 if row == 0 else [False] * 3 + [True] * 2)
    assert len(set(batch["dataset_index"].tolist())) == 2
    train_stage_in_process(stage, tmp_path / "out")
    for spec in (JOINTS, PLANAR):
        chunk = load_policy(tmp_path / "out/model", spec=spec).predict_action_chunk([observe(spec)])
        assert chunk.shape == (1, 3, spec.n_dims)


def test_a_trained_policy_learns_a_robot_of_new_dimensions(toy_vlm, tmp_path):
    first = trained([record(tmp_path / "joints", JOINTS)], toy_vlm, tmp_path / "out")
    second = record(tmp_path / "plane", PLANAR)
    with pytest.warns(UserWarning, match=r"new dimensions, actions .*'x'.*random weights"):
        model, _ = modify_policy(first, specs=[PLANAR])
    old = load_vla(first)[0]
    assert torch.equal(model.state_projector[2].weight, old.state_projector[2].weight)
    with pytest.raises(ValueError, match=r"dimensions that this policy has.*modify_policy"):
        old.register_embodiments([type(old.embodiment(JOINTS))(PLANAR, EpisodeDataset(second).stats())])
    with pytest.warns(UserWarning, match="new dimensions"):
        folder = trained([second], first, tmp_path / "second", allow_new_embodiment=True, policy={})
    for spec in (JOINTS, PLANAR):
        assert load_policy(folder, spec=spec).predict_action_chunk([observe(spec)]).shape == (1, 3, spec.n_dims)


def test_tokens_of_slots_that_a_robot_lacks_are_those_of_training(toy_vlm, tmp_path):
    """Acting and open loop: dimensions of other robots, and such as the robot's card calls absent."""
    line = replace(PLANAR.replace_group("action", 0, absent=("y",)), dataset="line")
    specs = {JOINTS: [True, True, True, False, False], line: [False, False, False, True, False]}
    folders = [record(tmp_path / spec.dataset, spec) for spec in specs]
    tokens = {"head": "tokens", "head_options": {"n_bins": 16}}
    model = trained(folders, toy_vlm, tmp_path / "out", policy=tokens)
    for (spec, is_present), folder in zip(specs.items(), folders, strict=True):
        policy, made = load_policy(model, spec=spec), []
        decode = policy.model.head.decode
        policy.model.head.decode = lambda ids, decode=decode, made=made: (made.append(ids), decode(ids))[1]
        policy.predict_action_chunk([observe(spec)])
        predict_chunks(policy, policy_windows(policy, EpisodeDataset(folder)))
        assert len(made) == 2
        for ids in made:
            is_zero = (ids == policy.model.head.encode(torch.zeros(3, 5))).unflatten(1, (3, 5))
            assert is_zero.all((0, 1))[~torch.tensor(is_present)].all() and not is_zero.all()


def turned_robot(dataset, order):
    names, units = ("x", "y", "z", *(f"q{axis}" for axis in order)), ("m",) * 3 + ("1",) * 4
    held = Group("pose", names, units, frame="base", rotation=f"quat_{order}")
    pose = replace(held, low=(-1.0,) * 7, high=(1.0,) * 7)
    return ActionSpec(dataset, "arm", 10.0, tuple(SIZES), (pose,), (held,))


def record_turned(folder, spec, about):
    """Poses about a quaternion x, y, z, w whose z and w change."""
    writer = EpisodeWriter(folder, spec)
    for episode in range(4):
        rng = np.random.default_rng(episode)
        images = {f"observation.images.{c}": rng.integers(0, 255, (8, *size, 3), dtype=np.uint8) for c, size in SIZES.items()}
        q = np.array(about) + rng.uniform(-0.1, 0.1, (8, 4)) * [0, 0, 1, 1]
        q = (q / np.linalg.norm(q, axis=1, keepdims=True))[:, ["xyzw".index(name[1]) for name in spec.names[3:]]]
        values = np.concatenate([rng.uniform(-0.5, 0.5, (8, 3)), q], 1)
        columns = dict.fromkeys(("action", "observation.state"), values.astype(np.float32))
        writer.add_episode({**images, **columns}, "lift it")
    return str(writer.finalize())


def test_the_half_sphere_of_quaternions_travels_with_the_policy(toy_vlm, tmp_path):
    spec = turned_robot("down", "xyzw")  # w about 0: the tool points down
    policy = load_policy(trained([record_turned(tmp_path / "d", spec, [0.99, 0.1, 0, 0])], toy_vlm, tmp_path / "out"))
    data, seen = EpisodeDataset(tmp_path / "d"), observe(spec)
    seen["state"] = data.column("observation.state")[0]
    assert check_statistics(DiagnosisInputs(policy, data)).fault is None
    opposite = {**seen, "state": seen["state"] * np.float32([1, 1, 1, -1, -1, -1, -1])}
    chunks = [(policy.reset(), policy.predict_action_chunk([one]))[1] for one in (seen, opposite)]
    assert (chunks[0] == chunks[1]).all(), "q and -q are one state"
    assert policy.expected.range_warning([opposite]) == ""
    recorded = predict_chunks(policy, policy_windows(policy, data))["recorded"]
    assert (recorded[..., 3] > 0.9).all(), "actions are learned as they were recorded, without a jump"


def test_robots_that_share_slots_share_the_half_sphere_of_quaternions(toy_vlm, tmp_path):
    """Which of two almost equal components is the larger, and so positive, is chance: the first robot's choice holds for all."""
    abouts = {"first": ("xyzw", [0.72, -0.69, 0, 0]), "second": ("wxyz", [0.69, -0.72, 0, 0])}
    specs = {name: turned_robot(name, order) for name, (order, _) in abouts.items()}
    folders = {name: record_turned(tmp_path / name, specs[name], about) for name, (_, about) in abouts.items()}
    sets = {name: EpisodeDataset(folder) for name, folder in folders.items()}
    own = {name: data.stats(episodes=split(data)[0]) for name, data in sets.items()}
    assert own["first"]["action"].reference[3:5] @ own["second"]["action"].reference[4:6] < 0
    stage = Stage("both", ROBOT, tuple(folders.values()), str(toy_vlm), 24, policy=POLICY, batch_size=8, n_processes=1)
    both, processor, *_ = STAGE_BUILDERS[ROBOT](stage)
    joined = load_vla(trained([folders["first"]], toy_vlm, tmp_path / "out"))[0]
    joined.register_embodiments([Embodiment(specs["second"], own["second"])])
    for model in (both, joined):
        actions, states = [], []
        for name, spec in specs.items():
            robot, raw = model.embodiment(spec), sets[name].column("action")
            actions.append(model.conditioning.normalized_actions(robot, raw[:, None], raw)[:, 0])
            state = spec.normalize_state(raw, robot.stats["observation.state"])
            states.append(model.conditioning.align_state(robot, state))
            inputs = DiagnosisInputs(Policy(model, processor, spec=spec), sets[name])
            assert check_statistics(inputs).fault is None
        for first, second in (actions, states):
            assert np.allclose(first[:, 5:], second[:, 5:], atol=0.05), "the same turns are the same z and w"
        assert np.array_equal(model.embodiment(specs["first"]).stats["action"].reference, own["first"]["action"].reference)


def test_continuous_grippers_of_opposite_directions_share_one_meaning(toy_vlm, tmp_path):
    """Open is the same side of a shared slot, that of the first robot; a robot alone keeps its numbers."""
    closing = JOINTS.replace_group("action", 1, open=0.0, close=100.0)
    closing = replace(closing, dataset="closing")
    robots = {spec.dataset: Embodiment(spec, EpisodeDataset(record(tmp_path / spec.dataset, spec)).stats())
              for spec in (JOINTS, closing)}  # fmt: skip
    for order in ([JOINTS, closing], [closing, JOINTS]):
        model, _ = make_policy(toy_vlm, order[0], robots[order[0].dataset].stats, specs=order, **POLICY)
        model.register_embodiments([robots[spec.dataset] for spec in order])
        opened = []
        for spec in order:
            robot, state = robots[spec.dataset], np.zeros(3)
            raw = spec.set_grippers(np.full((1, 3), 1.0), True)
            slots = model.conditioning.normalized_actions(robot, raw, state)
            assert np.allclose(model.conditioning.raw_actions(robot, slots, state), raw)
            assert model.conditioning.align_action(robot, np.ones((1, 3), bool)).all(), "masks stay masks"
            opened.append(slots[0, 2])
        first = order[0]
        alone = first.normalize(first.set_grippers(np.full((1, 3), 1.0), True), robots[first.dataset].stats["action"])
        assert opened[0] == alone[0, 2], "the first robot's numbers are as in a policy of its own"
        assert np.sign(opened).tolist() == [np.sign(opened[0])] * 2 and abs(opened[0]) > 0.5
    for first, is_refused in ((JOINTS, True), (replace(JOINTS, dataset="twin"), False)):
        other = closing if is_refused else JOINTS
        model, processor = make_policy(toy_vlm, first, robots["joints"].stats, specs=[first, other], **POLICY)
        model.register_embodiments([Embodiment(first, robots["joints"].stats), robots[other.dataset]])
        model.save_pretrained(tmp_path / first.dataset, processor)
        assert load_vla(tmp_path / first.dataset)[0].conditioning == model.conditioning
        path = tmp_path / first.dataset / "config.json"
        config = json.loads(path.read_text())
        assert config.pop("directions") == [1, 1, 1]
        path.write_text(json.dumps(config))
        if not is_refused:
            assert load_vla(path.parent)[0].conditioning == model.conditioning, "robots that count alike load as before"
            continue
        for load in (load_vla, modify_policy):
            with pytest.raises(ValueError, match=r"'directions'.*open and closed of \['closing'\] may be.*train it again"):
                load(path.parent)
