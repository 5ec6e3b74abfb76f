"""The Hub, by a fake on disk: an uploaded policy can be loaded, and a commit does not change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from toy_policies import ONE_STEP, SPEC, perturbed_policy, predicted

from rvlm.policy.checkpoint_files import CheckpointError
from rvlm.policy.factory import load_vla, make_policy, modify_policy
from rvlm.policy.model import VLA
from rvlm.policy.policy import load_policy


class Hub:
    """Commits as folders, by the client's own rules for which files are uploaded, downloaded and deleted."""

    def __init__(self, root):
        self.root, self.heads = root, {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, delete_patterns=None, revision=None, **_):
        commit, head = f"{len(self.heads_of(repo_id)) + 1:040x}", self.heads.get(repo_id)
        target = self.root / repo_id / commit
        target.mkdir(parents=True)
        if head:
            files = [p.relative_to(head).as_posix() for p in head.rglob("*") if p.is_file()]
            gone = set(filter_repo_objects(files, allow_patterns=delete_patterns)) if delete_patterns else set()
            self.copy(head, target, [name for name in files if name not in gone])
        self.copy(
            Path(folder_path),
            target,
            [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()],
        )
        self.heads[repo_id] = target
        return SimpleNamespace(oid=commit)

    def heads_of(self, repo_id):
        return list((self.root / repo_id).glob("*"))

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None, **_):
        source = self.heads.get(repo_id) if revision in (None, "main") else self.root / repo_id / revision
        if source is None or not source.is_dir():
            raise RevisionNotFoundError(f"404: {repo_id} at {revision}", response=SimpleNamespace(headers={}, request=None))
        target = self.root.parent / "fetched" / repo_id / source.name
        files = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        self.copy(source, target, filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(target)

    @staticmethod
    def copy(source, target, names):
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


def test_what_is_pushed_is_what_is_loaded_and_a_commit_stays(hub, toy_vlm, toy_stats):
    model, processor = perturbed_policy(toy_vlm, toy_stats)
    before = predicted(model, processor)
    first = model.push_to_hub("lab/policy").oid
    with torch.no_grad():
        model.head.layers[-1].bias += 1
    model.save_pretrained(hub.root / "local", push_to_hub=True, repo_id="lab/policy", card="# Moved")
    assert (hub.heads["lab/policy"] / "README.md").read_text() == "# Moved"
    old, new = VLA.from_pretrained("lab/policy", revision=first), VLA.from_pretrained("lab/policy")
    assert torch.equal(predicted(old, old.processor), before)
    assert torch.equal(predicted(new, new.processor), predicted(model, processor))
    assert not torch.equal(predicted(new, processor), before)
    assert load_policy("lab/policy", revision=first).model.config.vlm == {"name": "vlm", "revision": None}
    with pytest.raises(
        CheckpointError, match=r"no folder lab/policy; and no such name on the Hub at revision 'f+' \(RevisionNot"
    ):
        load_vla("lab/policy", revision="f" * 40)
    with pytest.raises(CheckpointError, match="expected a name on the Hub with revision='v1', got a folder"):
        load_vla(hub.root / "local", revision="v1")


@pytest.mark.parametrize("finetuning", ["head", "lora"])
def test_a_policy_over_a_folder_is_pushed_with_its_base_model(hub, toy_vlm, toy_stats, tmp_path, finetuning):
    """Two levels: adapters over adapters over a model, all deleted; then pushed from the loaded policy."""
    base = shutil.copytree(toy_vlm, tmp_path / "base")
    first, _ = perturbed_policy(base, toy_stats, finetuning)
    first.save_pretrained(tmp_path / "first")
    second, processor = modify_policy(tmp_path / "first", finetuning=finetuning, lora_rank=2)
    before = predicted(second.eval(), processor)
    commit = second.push_to_hub("lab/adapted").oid
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "first")
    loaded = VLA.from_pretrained("lab/adapted", revision=commit)
    torch.testing.assert_close(predicted(loaded, processor), before, atol=1e-5, rtol=0)
    assert json.loads((hub.heads["lab/adapted"] / "config.json").read_text())["base_model"]["name"] == "backbone"
    sent = [path.read_text() for path in hub.heads["lab/adapted"].rglob("*") if path.suffix in (".json", ".md")]
    assert len(sent) > 5 and not any(str(tmp_path) in text for text in sent), "no path of this machine"
    again = loaded.push_to_hub("lab/again").oid
    torch.testing.assert_close(predicted(VLA.from_pretrained("lab/again", revision=again), processor), before, atol=1e-5, rtol=0)


def test_a_policy_over_a_hub_model_names_one_commit(hub, toy_vlm, toy_stats, tmp_path):
    """The base model on the Hub changes; the policy does not. Weights are compared by content, not by place."""
    (shutil.copytree(toy_vlm, tmp_path / "sent") / "own.py").write_text("raise SystemExit")
    (tmp_path / "sent" / "pytorch_model.bin").write_bytes(b"pickled")
    commit = hub.upload_folder(repo_id="lab/vlm", folder_path=tmp_path / "sent").oid
    model, processor = perturbed_policy("lab/vlm", toy_stats, "lora")
    before = predicted(model, processor)
    assert (
        model.config.base_model["revision"] == model.config.vlm["revision"] == commit
        and model.config.base_model["name"] == "lab/vlm"
    )
    model.save_pretrained(tmp_path / "policy")
    weights = load_file(toy_vlm / "model.safetensors")
    moved = shutil.copytree(toy_vlm, tmp_path / "moved")
    save_file({name: value + 0.01 for name, value in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    newest = hub.upload_folder(repo_id="lab/vlm", folder_path=moved).oid
    assert torch.equal(predicted(load_vla(tmp_path / "policy")[0], processor), before)
    assert torch.equal(predicted(load_vla(tmp_path / "policy", base_model=toy_vlm)[0], processor), before), (
        "the same weights in a folder"
    )
    for other in (moved, "lab/vlm-2"):
        hub.upload_folder(repo_id="lab/vlm-2", folder_path=moved)
        with pytest.raises(
            CheckpointError, match=rf"it was trained on lab/vlm at revision {commit} with weights .*; got .* with"
        ):
            load_vla(tmp_path / "policy", base_model=other)
    assert make_policy("lab/vlm", SPEC, toy_stats, finetuning="head", **ONE_STEP)[0].config.base_model["revision"] == newest
    assert make_policy("lab/vlm", SPEC, toy_stats, revision=commit, **ONE_STEP)[0].config.vlm["revision"] == commit
    assert f"revision {commit}" in (tmp_path / "policy" / "README.md").read_text()
    model.push_to_hub("lab/policy")
    assert not (hub.heads["lab/policy"] / "backbone").exists(), "what is on the Hub is named, not sent again"
    assert torch.equal(predicted(VLA.from_pretrained("lab/policy"), processor), before)
    fetched = {path.name for path in (tmp_path / "fetched").rglob("*")}
    assert not fetched & {"own.py", "pytorch_model.bin"}, "neither code nor pickles"
