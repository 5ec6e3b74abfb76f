"""Real robots read from the robosuite wheel: the conversion on a toy file always, the robots where the wheel is."""

from importlib.util import find_spec
from xml.etree import ElementTree

import mujoco
import numpy as np
import pytest

from rvlm.data.actions import ActionSpec
from rvlm.envs.tabletop import robosuite_arms
from rvlm.envs.tabletop.arm_control import axis_angle
from rvlm.envs.tabletop.arms import ARMS
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.robosuite_arms import PANDA, REAL_ARMS, chain_xml, coarsen, meshes_xml, read_stl
from rvlm.envs.tabletop.scene import SETTINGS
from rvlm.envs.tabletop.world import World

needs_wheel = pytest.mark.skipif(find_spec("robosuite") is None, reason=f"the asset pack is missing: {robosuite_arms.INSTALL}")
FAMILIES = ("lift", "push_left", "open_drawer", "turn_on_light", "stack")

TOY = """<mujoco><compiler angle="radian"/><actuator><motor joint="elbow"/></actuator>
<asset><material name="paint"/><mesh name="hull" file="meshes/hull.stl"/><mesh name="pretty" file="pretty.obj"/></asset>
<worldbody><body name="base"><camera name="robotview"/><site name="mark"/>
  <body name="upper" pos="0 0 .3"><inertial pos="0 0 .1" mass="2" diaginertia=".01 .01 .01"/>
    <joint name="shoulder" axis="0 0 1" limited="true" range="-1 2" damping="9" frictionloss="3"/>
    <geom type="mesh" mesh="pretty" material="paint" contype="0" conaffinity="0" group="1"/>
    <geom type="mesh" mesh="hull" group="0" name="upper_col"/>
    <body name="lower" pos="0 0 .3"><inertial pos="0 0 .1" mass="1" diaginertia=".01 .01 .01"/>
      <joint name="elbow" axis="0 1 0"/><geom size=".05 .1" type="cylinder" rgba="1 0 0 1"/>
      <body name="right_hand" pos="0 0 .2"><camera name="eye_in_hand"/></body></body></body></body></worldbody></mujoco>"""


def write_stl(path, triangles):
    record = np.zeros(len(triangles), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    record["corners"] = triangles
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(80) + np.uint32(len(triangles)).tobytes() + record.tobytes())


@pytest.fixture
def tetrahedron():
    corners = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]])
    return corners[[[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]]


@pytest.mark.parametrize("grain", [0.0, 0.01])
def test_a_toy_robot_becomes_the_tabletops(tmp_path, tetrahedron, grain):
    write_stl(tmp_path / "meshes/hull.stl", tetrahedron)
    robot = ElementTree.fromstring(TOY)
    assets, chain = meshes_xml(robot, tmp_path, grain), chain_xml(robot, PANDA)
    default = '<default><default class="arm"><geom contype="2" conaffinity="1"/></default><default class="finger"/></default>'
    compiler = '<compiler angle="radian" autolimits="true"/>'
    model = mujoco.MjModel.from_xml_string(f"<mujoco>{compiler}{default}{assets}<worldbody>{chain}</worldbody></mujoco>")
    assert [model.joint(i).name for i in range(model.njnt)] == ["joint0", "joint1", "finger_left", "finger_right"]
    assert model.jnt_range[0] == pytest.approx([-1, 2]) and model.jnt_range[1] == pytest.approx([-2 * np.pi, 2 * np.pi], abs=1e-4)
    assert model.dof_frictionloss[0] == 0 and model.dof_damping[0] == 1 and model.dof_armature[0] == pytest.approx(0.1)
    assert model.nmesh == 1 and model.mesh("hull").facenum == 4 and model.ncam == 1 and model.nsite == 1 and model.nu == 0
    of_arm = [g for g in range(model.ngeom) if model.geom(g).name == ""]
    assert len(of_arm) == 3  # hull, cylinder and palm; visual geometry is removed
    assert {(int(model.geom_contype[g]), int(model.geom_conaffinity[g])) for g in of_arm} == {(2, 1)}
    assert model.geom_rgba[of_arm[0]] == pytest.approx(PANDA.rgba)
    assert model.body("upper").mass == 2 and model.body("lower").mass == 1
    assert model.body("hand").parentid == model.body("right_hand").id and model.body_gravcomp[1:].all()


def test_a_file_without_a_hand_is_refused():
    with pytest.raises(ValueError, match=r"expected a robot's MJCF .* 'right_hand'"):
        chain_xml(ElementTree.fromstring(TOY.replace("right_hand", "flange")), PANDA)


def test_a_raised_base_stands_on_a_column(tmp_path):
    chain = ElementTree.fromstring(chain_xml(ElementTree.fromstring(TOY), REAL_ARMS["iiwa"]))
    assert "0 0 -0.2 0 0 0" in [geom.get("fromto") for geom in chain.findall("geom")]


def test_coarse_meshes_keep_their_shape(tmp_path, tetrahedron):
    write_stl(tmp_path / "meshes/hull.stl", tetrahedron)
    assert read_stl(tmp_path / "meshes/hull.stl") == pytest.approx(tetrahedron, abs=1e-7)
    angles = np.linspace(0, 2 * np.pi, 400)
    ring = np.stack([0.1 * np.cos(angles), 0.1 * np.sin(angles), 0 * angles], axis=1)
    fan = np.stack([np.zeros((399, 3)), ring[:-1], ring[1:]], axis=1)
    vertices, faces = coarsen(fan, 0.02)
    assert 8 < len(faces) < 60 and faces.max() < len(vertices)
    edges = np.diff(vertices[faces], axis=1)
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1).sum() / 2
    assert area == pytest.approx(np.pi * 0.01, rel=0.05)


def test_without_the_wheel_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(robosuite_arms, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'panda' .* python -m pip install --no-deps robosuite==1\.5\.2"):
        Tabletop(robot="panda")


def test_another_wheel_is_refused(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(robosuite_arms, "find_spec", lambda name: Spec)
    with pytest.raises(FileNotFoundError, match=r"expected .*panda/robot\.xml, as in robosuite 1\.5\.2"):
        World("panda", SETTINGS["simple"])


def test_an_unknown_robot_lists_all():
    with pytest.raises(KeyError, match="franka7, ur6, small5, panda, sawyer, ur5e, iiwa, kinova3"):
        Tabletop(robot="spot")
    with pytest.raises(KeyError, match="franka7, ur6, small5, panda, sawyer, ur5e, iiwa, kinova3"):
        World("spot", SETTINGS["simple"])


def test_the_cards_tell_the_robots_apart():
    names = [*ARMS, *REAL_ARMS]
    specs = [ActionSpec.from_card(f"tabletop_{name}") for name in names]
    keys = {(s.scale, s.rate_hz, s.action[1].open, s.action[1].close) for s in specs}
    assert len(keys) == len(names) and [s.robot for s in specs] == names


@needs_wheel
@pytest.mark.parametrize("robot", REAL_ARMS)
def test_the_hand_starts_where_it_should_pointing_down(robot):
    world = World(robot, SETTINGS["simple"])
    assert world.model.nu == len(REAL_ARMS[robot].home) + 2
    for seed in range(5):
        world.randomize(np.random.default_rng(seed))
        assert np.linalg.norm(world.controller.target_pos - world.pos_tcp_world) < 0.005
        error = axis_angle(world.controller.target_rotation @ world.controller.rotation_tcp_world.T)
        assert np.degrees(np.linalg.norm(error)) < 2
        assert (
            np.degrees(np.linalg.norm(world.tilt[:2])) < 8 and abs(world.controller.rotation_tcp_world[1, 1]) > 0.9
        )  # fingers close along y


@needs_wheel
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("robot", REAL_ARMS)
def test_experts_succeed(robot, family, monkeypatch):
    env = Tabletop(robot=robot, image_size=32)
    monkeypatch.setattr(env, "image", lambda *_: np.zeros((32, 32, 3), np.uint8))  # experts need no images
    successes = 0
    for seed in range(2):
        env.reset(seed=seed, options={"task": family})
        for _ in range(env.max_steps):
            _, _, is_success, _, _ = env.step(env.expert_action())
            if is_success:
                break
        successes += is_success
    assert successes == 2


@needs_wheel
@pytest.mark.parametrize("robot", REAL_ARMS)
def test_same_seed_same_frames(robot):
    def episode():
        env = Tabletop(robot=robot, image_size=32)
        first, _ = env.reset(seed=3, options={"task": "lift"})
        last, *_ = env.step(env.expert_action())
        env.close()
        return [values for o in (first, last) for values in (*o["images"].values(), o["state"])]

    frames = episode()
    assert all(np.array_equal(a, b) for a, b in zip(frames, episode(), strict=True))
    assert frames[0].std() > 20
