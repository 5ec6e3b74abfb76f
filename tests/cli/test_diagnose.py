"""`rvlm diagnose`: data alone, with an environment, with a policy; what it names, and what it refuses."""

import re

import numpy as np
import pytest
from public_datasets import record_public

from rvlm.cli.main import main
from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeDataset, EpisodeWriter
from rvlm.diagnosis.checklist import CHECKS
from rvlm.diagnosis.results import FIXES
from rvlm.envs.stand_in import StandIn, record_stand_in
from rvlm.policy.factory import make_policy


@pytest.fixture(scope="module")
def recorded(home):
    return record_public("pusht", home / "pusht")


def diagnose(*words):
    return main(["diagnose", *map(str, words), "--episodes", "2", "--frames", "12"])


def changed(recorded, folder, change):
    """The recording, with changed actions."""
    data = EpisodeDataset(recorded, "pusht")
    with EpisodeWriter(folder, data.spec) as writer:
        for i in range(data.n_episodes):
            episode = data.episode(i)
            columns = {
                "observation.state": episode["observation.state"],
                "observation.images.image": episode["observation.image"],
            }
            writer.add_episode({**columns, "action": change(episode["action"])}, episode["instruction"])
    return writer.finalize()


def test_data_alone_and_with_an_environment(recorded, capsys):
    assert diagnose(recorded, "--card", "pusht") == 0
    alone = capsys.readouterr().out
    assert alone.endswith("no fault found\n") and len(alone.splitlines()) == len(CHECKS) + 2 and alone.count("skipped") > 3
    assert diagnose(recorded, "--card", "pusht", "--suite", "public_datasets:pusht_suite") == 0
    assert capsys.readouterr().out.count("skipped") < alone.count("skipped")


def test_a_fault_is_named_with_its_fix(recorded, tmp_path, capsys):
    swapped = changed(recorded, tmp_path / "swapped", lambda actions: np.ascontiguousarray(actions[:, ::-1]))
    assert diagnose(swapped) == 1
    printed = capsys.readouterr().out
    assert f"fault: dimensions swapped\nfix: {FIXES['dimensions swapped']}\n" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[:-3]] == ["data card", "motion"], "up to the first that fails"


def test_a_policy_that_has_not_learned_is_named_so(recorded, toy_vlm, tmp_path, capsys):
    data = EpisodeDataset(recorded, "pusht")
    statistics = data.stats(episodes=[0, 1, 2])
    model, processor = make_policy(toy_vlm, data.spec, statistics, cameras=data.cameras[:1], chunk_size=3)
    model.save_pretrained(tmp_path / "policy", processor=processor)
    words = [recorded, "--card", "pusht", "--policy", tmp_path / "policy", "--suite", "public_datasets:pusht_suite"]
    assert diagnose(*words) == 1
    assert re.search("fault: not learned|fault: statistics", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["{}"], "does not say what its actions mean; give its data card: aloha, "),
        (["{}", "--card", "libero"], "libero"),
        (["{}", "--card", "pusht", "--suite", "tabletop/franka8"], "no robot 'franka8'"),
        (["{}", "--card", "pusht", "--policy", "no_policy_here"], "no_policy_here"),
        (["{}", "--card", "pusht", "--seed", "-1"], "--seed: expected a whole number from 0 on, got -1"),
        (["{}", "--card", "pusht", "--suite", "toy_suites:other_tasks"], "options {'task': 'far'}: KeyError: "),
        (["{}", "--card", "pusht", "--suite", "toy_suites:old_step"], "to return (observation, reward, terminated, trunc"),
        (["{}", "--card", "pusht", "--suite", "toy_suites:loses_its_state"], "KeyError: 'state'"),
        (["{}", "--card", "pusht", "--episodes", "0"], "--episodes: expected at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(recorded, words, message, capsys):
    assert main(["diagnose", *(word.format(recorded) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_episodes_of_a_single_step_are_diagnosed(tmp_path, capsys):
    env = StandIn(ActionSpec.from_card("pusht"), sizes={"image": (96, 96)}, max_steps=1)
    data = record_stand_in(env, tmp_path / "single", range(4))
    assert diagnose(data, "--suite", "public_datasets:pusht_suite") == 0
    assert capsys.readouterr().out.count("single step") == 2


@pytest.mark.parametrize("name", ["needs_its_task", "says_no_task"])
def test_suites_whose_environment_needs_or_says_no_task(recorded, name):
    assert diagnose(recorded, "--card", "pusht", "--suite", f"toy_suites:{name}") == 0


def test_a_policy_of_another_robot_is_named_so(recorded, toy_vlm, home, tmp_path, capsys):
    other = EpisodeDataset(record_public("so101", home / "so101"), "so101")
    model, processor = make_policy(toy_vlm, other.spec, other.stats(), cameras=other.cameras[:1], chunk_size=3)
    model.save_pretrained(tmp_path / "policy", processor=processor)
    assert diagnose(recorded, "--card", "pusht", "--policy", tmp_path / "policy") == 1
    printed = capsys.readouterr().out
    assert "fault: conventions differ" in printed and "policy vs data: " in printed and "environment:" not in printed
