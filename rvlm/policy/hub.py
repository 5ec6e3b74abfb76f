"""Models by folder or Hub name: resolve and download them, and upload policies.

A Hub name means its last commit, which changes, so the commit is always recorded too. Only safetensors, JSON and text files are
downloaded: no pickles, no code.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub

from rvlm.policy.checkpoint_files import CONFIG, INDEX, CheckpointError, read_json_object, tensors_hash

FETCHED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.md")
NOT_FETCHED = ("onnx/*", "original/*", "consolidated*", "runs/*", "checkpoint-*")
INSIDE = "backbone"  # a policy's base model inside its folder on the Hub, if that was a local folder


def fetch(name: str | Path, revision: str | None = None, **options: Any) -> Path:
    """The folder of a model: itself, or the files of a name on the Hub at one commit.

    Args:
        name: Folder, or name on the Hub.
        revision: Commit, branch or tag on the Hub; the last commit if left out.
        options: Of `huggingface_hub.snapshot_download`: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Raises:
        CheckpointError: Neither exists, or a folder is given with a revision.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision not in (None, "main", folder.name):
            raise CheckpointError(f"{folder}: expected a name on the Hub with revision={revision!r}, got a folder; leave it out")
        return folder
    try:
        fetched = huggingface_hub.snapshot_download(
            str(name), revision=revision, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED), **options
        )
    except (OSError, ValueError) as error:  # unknown names, no network, no access
        at = f" at revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"no folder {folder}; and no such name on the Hub{at} ({type(error).__name__}: {reason}); check the name and, of "
            "one on the Hub, revision, network and access"
        ) from error
    return Path(fetched)


def commit_of(folder: Path) -> str | None:
    """The commit on the Hub whose files a folder of `fetch` holds; None of any other folder."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def origin(name: str | Path, folder: Path) -> dict[str, Any]:
    """Where a model came from: `name`, `revision` (None of a folder) and a hash of its `weights`."""
    is_folder = Path(name).is_dir()
    where = str(Path(name).resolve()) if is_folder else str(name)
    return {"name": where, "revision": None if is_folder else commit_of(folder), "weights": tensors_hash(folder)}


def put_backbone_inside(folder: Path) -> None:
    """Copy a saved policy's base model into its folder, if that is a local folder; recursively, if that is a policy.

    Raises:
        CheckpointError: The base model is no longer where it was.
    """
    config = read_json_object(folder / CONFIG)
    base = config.get("base_model")
    if not base or base.get("revision") or (folder / INSIDE).is_dir():
        return
    source = Path(base["name"])
    if not source.is_dir():
        raise CheckpointError(f"{folder}: expected its base model in {source}, got none; merge it first: merge_policy")
    wanted = [path for path in source.rglob("*") if path.is_file() and any(path.match(pattern) for pattern in FETCHED)]
    for path in wanted:
        target = folder / INSIDE / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / CONFIG).write_text(json.dumps({**config, "base_model": {**base, "name": INSIDE}}, indent=2, sort_keys=True) + "\n")
    put_backbone_inside(folder / INSIDE)


def send(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a policy's folder to the Hub as one commit; weights of the previous commit are deleted.

    Args:
        folder: Uploaded whole.
        repo_id: Name on the Hub; made if it does not exist.
        commit_message: Of `huggingface_hub`, as all that follow.
        commit_description: Its body.
        private: Of a repository that is created.
        token: Of the account.
        revision: Branch; the main one if left out.
        create_pr: Whether to propose the commit, not make it.

    Returns:
        The library's `CommitInfo`; its `oid` is the `revision` to load.
    """
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload policy",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=["*.safetensors", f"*{INDEX}", "adapter/*", f"{INSIDE}/*"],
    )
