"""A suite is loaded by name, and fits its environment or is refused in words."""

import dataclasses
import functools
import pickle

import gymnasium
import numpy as np
import pytest
from toy_suites import TASKS, StubEnv, libero_stub, stub_suite

from rvlm import importing
from rvlm.data.actions import ActionSpec
from rvlm.envs.suite_checks import SuiteError, check_suite
from rvlm.envs.suites import load_suite

SPEC = ActionSpec.from_card("libero")


def test_anybodys_suite_is_loaded_by_module_and_function():
    suite = load_suite("toy_suites:libero_stub")
    assert suite == stub_suite("libero") == load_suite(suite) and suite is load_suite("toy_suites:libero_stub")
    assert suite.default_tasks == TASKS and suite.limit(TASKS[0]) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kitchen", r"no suite 'kitchen'; there are tabletop/..., and your own as 'package.module:function'"),
        ("no_such_module:suite", r"no_such_module:suite: no module 'no_such_module'; install it"),
        ("toy_suites:libro", r"module toy_suites has no 'libro'; it has .*libero_stub"),
        ("toy_suites:TASKS", r"expected a Suite, or a function that returns one; got \('push the block'"),
        ("tabletop/franka9", r"no robot 'franka9'; there are franka7"),
        (
            "tabletop/so101/simple/more",
            r"no suite 'tabletop/so101/simple/more': expected tabletop/ROBOT or tabletop/ROBOT/SETTING",
        ),
        ("tabletop/franka7/dark", r"no setting 'dark'; there are simple"),
    ],
)
def test_a_suite_that_does_not_exist_is_refused_with_those_that_do(name, message):
    with pytest.raises(ValueError, match=message):
        load_suite(name)


def test_what_an_environments_module_imports_is_part_of_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_here.py").write_text("import numpy\nfrom beside_it import LIMIT\ndef make(image_size=None): ...\n")
    (tmp_path / "unrelated.py").write_text("x = 1")
    seen = []
    for text in ("from deeper import LIMIT", "from deeper import LIMIT  # changed"):
        (tmp_path / "beside_it.py").write_text(text)
        for value in (3, 5):
            (tmp_path / "deeper.py").write_text(f"LIMIT = {value}")
            seen.append(importing.source_hash(importing.import_by_name("made_here:make")))
    (tmp_path / "unrelated.py").write_text("x = 2")
    assert len(set(seen)) == 4 and importing.source_hash(importing.import_by_name("made_here:make")) == seen[-1]


def nested():
    return lambda image_size: StubEnv(SPEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "push"}, "expected tasks as a tuple of different names, got 'push'"),
        ({"tasks": ("a", "a")}, "expected tasks as a tuple of different names"),
        ({"default_tasks": ("close the box",)}, "has no task 'close the box'; there are push the block, open the box"),
        ({"max_steps": {TASKS[0]: 3}}, r"expected max_steps of each task \['push the block', 'open the box'\], got \['push the"),
        ({"max_steps": 2.5}, r"expected max_steps as whole numbers above 0 \[control steps\], got 2.5"),
        ({"n_starts": 0}, "expected n_starts as a whole number above 0, or None; got 0"),
        ({"noise_scale": (1.0,) * 6 + (float("nan"),)}, "expected noise_scale as 7 finite numbers from 0 on"),
        ({"make_env": nested()}, "make_env: expected a function or class at the top of a module"),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stub_suite("libero", **changes)


class Faulty(StubEnv):
    """A stub environment with one fault."""

    def __init__(self, *args, fault, **kwargs):
        super().__init__(*args, **kwargs)
        self.fault = fault
        if fault == "narrow":
            self.action_space = gymnasium.spaces.Box(-0.5, 0.5, (7,), np.float32)
        if fault == "six":
            self.action_space = gymnasium.spaces.Box(-1, 1, (6,), np.float32)
        if fault == "slow":
            self.action_spec = dataclasses.replace(self.action_spec, rate_hz=10.0)
        if fault == "no space":
            del self.action_space
        if fault == "no spec":
            self.action_spec = None

    def reset(self, *, seed=None, options=None):
        if self.fault == "any task" and options:
            options = {**options, "task": TASKS[0]}
        if self.fault == "other task":
            options = {**options, "task": TASKS[1]}
        if self.fault == "start unread":
            options = {"task": options["task"]}
        if self.fault == "one start of several":
            options = {**options, "start": 0}
        observation, info = super().reset(seed=0 if self.fault == "one start" else seed, options=options)
        images = observation["images"]
        if self.fault == "unseeded":
            images["image"] = np.random.default_rng().integers(0, 255, (48, 48, 3), dtype=np.uint8)
        if self.fault in ("info none", "old reset"):
            return (observation, None) if self.fault == "info none" else observation
        observation |= {
            "camera": {"images": {"front": images["image"]}},
            "float": {"images": {camera: image / 255 for camera, image in images.items()}},
            "channels first": {"images": {camera: image.transpose(2, 0, 1) for camera, image in images.items()}},
            "old": {"images": None},
            "state": {"state": observation["state"][:7]},
            "nan": {"state": observation["state"] * np.nan},
            "instruction": {"instruction": ""},
        }.get(self.fault, {})
        return observation, info

    def step(self, action):
        if self.fault == "step raises":
            raise RuntimeError("diverged")
        observation, reward, is_terminated, is_truncated, info = super().step(action)
        changed = {"no success": {}, "two successes": {"is_success": np.zeros(2)}, "no info": None}
        end = np.zeros(2) if self.fault == "two ends" else is_terminated
        if self.fault == "state lost":
            observation.pop("state")
        values = observation, reward, end, is_truncated, changed.get(self.fault, info)
        return values[:3] + values[4:] if self.fault == "old step" else values


class WithoutSeed(StubEnv):
    """A stub environment of an old reset()."""

    def reset(self, options=None):
        return super().reset(options=options)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no spec", "expected a gymnasium.Env with an ActionSpec as action_spec, got Faulty with None"),
        ("slow", r"suite vs environment: 1 convention\(s\) differ: rate_hz: 20.0 against 10.0"),
        ("six", r"expected an action space Box of 7 dimensions \['dx'.*got Box\(-1.0, 1.0, \(6,\)"),
        ("narrow", r"expected the spec's range of \['dx'.*got \[-0.5"),
        ("camera", r"expected images of the cameras \['image', 'wrist_image'\], got \['front'\]"),
        ("float", r"expected images \(h, w, 3\) of uint8 from 'image', got ndarray of shape \(48, 48, 3\) and float64"),
        ("channels first", r"from 'image', got ndarray of shape \(3, 48, 48\)"),
        ("old", r"expected observations with \['images', 'instruction', 'state'\], images by camera"),
        ("state", r"expected a state of 8 finite floats .*got shape \(7,\)"),
        ("nan", r"expected a state of 8 finite floats .*nan"),
        ("instruction", r"expected an instruction in words, got ''"),
        ("unseeded", r"expected the same start after two resets with seed 900000, got others in image; seed all"),
        ("one start", r"expected two seeds that start differently, got the same images and state"),
        ("any task", r"expected a refusal of the unknown task 'no such task', got a reset"),
        ("no space", r"expected an action space Box of 7 dimensions .*got None; make it"),
        ("old reset", r"expected reset\(seed=900000, .*\) to return \(observation, info\), got dict; return them as gymnasium"),
        ("info none", r"to return \(observation, info\), info a dict, got info None"),
        ("step raises", r"the environment refuses step\(\[0.0, 0.0, .*\]\): RuntimeError: diverged; it must take the card's raw"),
        ("old step", r"expected step\(.*\) to return \(observation, reward, terminated, truncated, info\), got 4 values"),
        ("two ends", r"expected terminated and truncated of step\(.*\) as True or False, got \[array\(\[0., 0.\]\), False\]"),
        ("no info", r"info a dict, got info None"),
        ("no success", r"expected info\['is_success'\] of Faulty after each step, got \[\]; add it"),
        ("two successes", r"expected info\['is_success'\] of Faulty as True or False, got array"),
        (
            "state lost",
            r"expected observations with \['images', 'instruction', 'state'\], images by camera, got \['images', 'instr",
        ),
        ("other task", r"expected task 'push the block', which reset\(\) was asked for, got info\['task'\] 'open the box'"),
    ],
)
def test_an_environment_unlike_its_suite_is_refused_with_both(fault, message):
    suite = stub_suite("libero")
    env = Faulty(SPEC, fault=fault)
    with pytest.raises(SuiteError, match=message):
        check_suite(suite, env)
    faulty = dataclasses.replace(suite, make_env=functools.partial(Faulty, SPEC, fault=fault, tasks=TASKS))
    with pytest.raises(SuiteError, match=message):
        faulty.make()


@pytest.mark.parametrize(
    ("fault", "n_starts", "message"),
    [
        ("start unread", 2, r"'start' 0 alike with seeds 900000 and 900001, got others in image, wrist_image, state; read the"),
        ("start unread", 1, r"expected the initial state 'start' 0 alike with seeds"),
        ("one start of several", 2, r"expected two initial states 'start' that start differently, got the same images and state"),
    ],
)
def test_fixed_initial_states_are_the_starts_and_not_the_seeds(fault, n_starts, message):
    with pytest.raises(SuiteError, match=message):
        check_suite(stub_suite("libero", n_starts=n_starts), Faulty(SPEC, fault=fault))


def test_an_environment_that_takes_no_seed_or_no_image_size_is_refused():
    with pytest.raises(
        SuiteError, match=r"refuses reset\(seed=900000, .*TypeError: .*unexpected keyword argument 'seed'; correct"
    ):
        check_suite(stub_suite("libero"), WithoutSeed(SPEC))
    with pytest.raises(SuiteError, match=r"expected make_env\(image_size=...\), got one that refuses it \(.*'suite'\); give"):
        stub_suite("libero", make_env=load_suite)


def test_the_stub_and_the_tabletop_are_as_their_suites_say():
    for suite in (libero_stub(), stub_suite("libero", n_starts=3), stub_suite("libero", n_starts=1), load_suite("tabletop/ur6")):
        env = suite.make_env(image_size=(48, 64))
        check_suite(suite, env)
        observation, _ = env.reset(seed=1, options={"task": suite.tasks[0]})
        assert {image.shape for image in observation["images"].values()} == {(48, 64, 3)} and observation in env.observation_space


def test_episodes_end_at_the_limit_of_their_task():
    env = stub_suite("libero", max_steps={TASKS[0]: 2, TASKS[1]: 1}).make()
    for task, limit in zip(TASKS, (2, 1), strict=True):
        for reset in ({"options": {"task": task}}, {"seed": 4}):
            _, info = env.reset(**reset)
            limit = (2, 1)[TASKS.index(info["task"])]
            ends = [env.step(np.zeros(7))[3] for _ in range(limit)]
            assert ends == [False] * (limit - 1) + [True]


def test_content_is_all_that_decides_how_episodes_go(tmp_path, monkeypatch):
    suite, same = stub_suite("libero"), stub_suite("libero")
    assert suite == same == pickle.loads(pickle.dumps(suite)) and hash(suite) == hash(same)
    changed = [
        stub_suite("libero", max_steps=7),
        stub_suite("libero", n_starts=2),
        stub_suite("libero", sizes={"image": (32, 32)}),
        stub_suite("bridge"),
        stub_suite("libero", setting="dark"),
    ]
    assert all(suite != other for other in changed) and load_suite("tabletop/ur6") != load_suite("tabletop/franka7")
    monkeypatch.setattr(importing, "file_hash", lambda path: "other code")
    assert stub_suite("libero") != suite
