"""Toys that several test modules share: a vision-language model and demonstrations, both real and tiny."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if not os.environ.get("MUJOCO_GL"):  # before mujoco is imported, by whichever test comes first
    from rvlm.envs.gl import choose_gl

    choose_gl()

import numpy as np
import pytest

TEXTS = ["lift the red cube", "push the blue ball left", "open the drawer", "is the light on ? yes no nothing"]
TOY = {"image_size": 48, "patch_size": 12, "width": 32, "vision_width": 32, "vision_layers": 1, "text_layers": 1}


def toy_frames(spec, n, seed, size=48):
    """Frames of one made-up episode, in LeRobot's keys."""
    rng = np.random.default_rng(seed)
    action = spec.set_gripper(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random(n) > 0.5)
    images = {f"observation.images.{c}": rng.integers(0, 255, (n, size, size, 3), dtype=np.uint8) for c in spec.cameras}
    return {**images, "observation.state": rng.normal(size=(n, 7)).astype(np.float32), "action": action}


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_notebooks_run"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An artifacts folder of the module's own, which RVLM_HOME names."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("RVLM_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """An artifacts folder of the module's notebooks: what one collects or trains the next one finds, as in a real run."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory):
    """An artifacts folder for the toys of this session."""
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="session")
def toy_vlm(toy_home):
    """Folder of an untrained vision-language model of SmolVLM's class; it draws in microseconds."""
    import torch

    from rvlm.vlm.small import small_vlm, train_tokenizer

    torch.manual_seed(0)
    model, processor = small_vlm(train_tokenizer(TEXTS, ["<loc00>"]), **TOY)
    model.save_pretrained(toy_home / "vlm")
    processor.save_pretrained(toy_home / "vlm")
    return toy_home / "vlm"


@pytest.fixture(scope="session")
def toy_demos(toy_home):
    """Folder of twelve made-up demonstrations of the default robot."""
    from rvlm.data.actions import ActionSpec
    from rvlm.data.windows import EpisodeWriter

    spec = ActionSpec.from_card("tabletop_franka7")
    writer = EpisodeWriter(toy_home / "demos", spec)
    for seed in range(12):
        writer.add_episode(toy_frames(spec, 5 + seed % 3, seed), TEXTS[seed % 3])
    return writer.finalize()


@pytest.fixture(scope="session")
def toy_stats(toy_demos):
    from rvlm.data.windows import EpisodeDataset

    return EpisodeDataset(toy_demos).stats()


@pytest.fixture(scope="session")
def saved(toy_vlm, toy_stats, toy_home):
    """A saved policy with a history: its folder, and the model as it was."""
    from toy_policies import POLICY_HEAD, build

    model, processor = build(toy_vlm, toy_stats, POLICY_HEAD)
    model.save_pretrained(toy_home / "policy", processor)
    return toy_home / "policy", model
