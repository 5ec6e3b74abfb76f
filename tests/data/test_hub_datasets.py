"""Datasets from the Hub, by a fake on disk: fetched at a commit, given a card, trained on; without a network an error."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

from rvlm.caches import read_provenance
from rvlm.data.dataset import EpisodeDataset
from rvlm.data.errors import EpisodeError
from rvlm.data.hub_datasets import fetch_dataset
from rvlm.files import folder_hash

NAME, CARD = "lab/lifts", "tabletop_franka7"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch, toy_demos):
    """A dataset on the Hub at two commits, which does not say what its actions mean."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    for commit in COMMITS:
        folder = shutil.copytree(toy_demos, tmp_path / "hub" / commit)
        info = json.loads((folder / "meta/info.json").read_text())
        (folder / "meta/info.json").write_text(json.dumps({k: v for k, v in info.items() if k != "rvlm"} | {"note": commit}))
        (folder / "train.py").write_text("print('code')")

    def snapshot_download(name, *, repo_type, revision=None, allow_patterns):
        assert (name, repo_type) == (NAME, "dataset")
        source = tmp_path / "hub" / (revision or COMMITS[-1])
        names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            target = tmp_path / "fetched" / source.name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target)
        return str(tmp_path / "fetched" / source.name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path / "hub"


def test_a_dataset_of_the_hub_is_fetched_and_given_its_card(hub, toy_demos):
    folder = fetch_dataset(NAME, CARD)
    data, recorded = EpisodeDataset(folder), EpisodeDataset(toy_demos)
    assert data.spec == recorded.spec and data.info["note"] == COMMITS[-1]
    np.testing.assert_array_equal(data.column("action"), recorded.column("action"))
    np.testing.assert_array_equal(data.episode(0)["observation.images.static"], recorded.episode(0)["observation.images.static"])
    assert read_provenance(folder)["settings"]["version"] == COMMITS[-1]
    assert not (folder / "train.py").exists(), "code"
    assert fetch_dataset(NAME, CARD) == folder and folder_hash(folder), "what a stage's name is made of"
    assert fetch_dataset(NAME, CARD, revision=COMMITS[0]) != folder


def test_a_folder_is_itself_or_links_with_a_card(hub, toy_demos):
    assert fetch_dataset(toy_demos) == toy_demos.resolve()
    bare = hub / COMMITS[0]
    linked = fetch_dataset(bare, CARD)
    assert EpisodeDataset(linked).spec and (linked / "data").resolve() == bare / "data"
    before = folder_hash(linked)
    (bare / "data/more.txt").write_text("changed")
    assert fetch_dataset(bare, CARD) != linked and folder_hash(linked) != before


def test_what_is_missing_is_said(hub, toy_demos, monkeypatch):
    with pytest.raises(
        EpisodeError, match=r"lab/lifts does not say what its actions mean; give its data card: aloha, bridge, calvin"
    ):
        fetch_dataset(NAME)
    with pytest.raises(EpisodeError, match=r"card 'libero' says 20 Hz"):
        fetch_dataset(NAME, "libero")
    with pytest.raises(EpisodeError, match="got a folder; leave it out"):
        fetch_dataset(toy_demos, revision="main")

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no snapshot on the disk, and offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        EpisodeError, match=r"no folder lab/lifts; and no such dataset on the Hub \(LocalEntry.*network and access"
    ):
        fetch_dataset(NAME, CARD)
    assert not list(hub.parent.glob("home/datasets/*")), "nothing is left of what was refused"
