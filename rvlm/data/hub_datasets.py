"""Datasets by folder or name on the Hub, with the data card of one that does not say what its actions mean.

A name on the Hub means its last commit, which changes; offline, the last one fetched.
"""

import json
from pathlib import Path

import huggingface_hub

from rvlm.caches import Code, register
from rvlm.data.actions import ActionSpec
from rvlm.data.dataset import EpisodeDataset
from rvlm.data.errors import EpisodeError
from rvlm.files import CARDS, artifacts_dir, config_hash, folder_hash, make_folder

_FILES = ("meta/*", "data/*", "videos/*", "images/*")  # of LeRobot's format
_CODE = Code(("rvlm.data.hub_datasets:fetch_dataset",))


def fetch_dataset(name: str | Path, card: str | Path = "", revision: str | None = None) -> Path:
    """The folder of a LeRobot dataset, fetched if it is a name on the Hub.

    Args:
        name: Folder, or name on the Hub.
        card: Name or path of the data card of a dataset that stores none (`ActionSpec.from_card`).
        revision: Commit, branch or tag on the Hub; the last commit if left out.

    Returns:
        The folder, named by its commit if it is of the Hub; with a card, one in the artifacts folder that links to it, stores the
        card, and records commit or content as the `version` in its `made.json`.

    Raises:
        EpisodeError: No such dataset, no card, or one that the dataset contradicts.
    """
    source = _source(str(name), revision)
    data = EpisodeDataset(source, card or None)
    if data.spec is None:
        cards = ", ".join(sorted(path.stem for path in CARDS.glob("*.md")))
        raise EpisodeError(f"{name} does not say what its actions mean; give its data card: {cards}, or the path of your own")
    if not card:
        return source
    spec, version = data.spec, folder_hash(source) if Path(name).expanduser().is_dir() else source.name
    settings = {"dataset": str(name), "version": version, "folder": str(source), "spec": spec.to_dict()}
    final = artifacts_dir() / "datasets" / f"{Path(name).name}-{config_hash(settings)}"
    return register(make_folder(final, lambda part: _link(source, part, spec)), _CODE, settings)


def _source(name: str, revision: str | None) -> Path:
    if (folder := Path(name).expanduser()).is_dir():
        if revision:
            raise EpisodeError(f"{folder}: expected a name on the Hub with revision={revision!r}, got a folder; leave it out")
        return folder.resolve()
    try:
        fetched = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(_FILES))
    except (OSError, ValueError) as error:  # unknown names, no network, no access
        raise EpisodeError(
            f"no folder {folder}; and no such dataset on the Hub ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check the name and, of one on the Hub, revision, network and access"
        ) from error
    return Path(fetched)


def _link(source: Path, part: Path, spec: ActionSpec) -> None:
    """Fill a folder with links to a dataset's files, and an info.json that stores the spec."""
    for path in (p for p in source.iterdir() if p.name != "meta"):
        (part / path.name).symlink_to(path)
    (part / "meta").mkdir()
    for path in (p for p in (source / "meta").iterdir() if p.name != "info.json"):
        (part / "meta" / path.name).symlink_to(path)
    info = json.loads((source / "meta/info.json").read_text())
    (part / "meta/info.json").write_text(json.dumps({**info, "rvlm": {"spec": spec.to_dict()}}, indent=1))
