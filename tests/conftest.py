"""Toys for several test modules: a vision-language model and demonstrations, both real and tiny."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if not os.environ.get("MUJOCO_GL"):  # before mujoco is imported, by whichever test comes first
    from rvlm.envs.gl import choose_gl

    choose_gl()

import pytest
from toy_data import TEXTS, TOY, toy_frames

LONGEST = (
    *("test_first_notebooks", "test_later_notebooks", "test_model_families", "test_launch", "test_trainer", "test_memory_plan"),
    *("test_policy", "test_recipes", "test_prompts", "test_search", "test_resuming", "test_cache_keys"),
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """What is imported stays: else a garbage collection, of which a training has several, goes through it for a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The module's own artifacts folder, set as RVLM_HOME."""
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
def llava(toy_home):
    """Folder of an untrained LLaVA, whose tokenizer has no `<act>`."""
    from toy_llava import save_llava

    save_llava(toy_home / "llava")
    return toy_home / "llava"


@pytest.fixture(scope="session")
def toy_demos(toy_home):
    """Folder of twelve synthetic demonstrations of the default robot."""
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
