"""A recording loses nothing: not by a kill, not by a second recorder, not by a disk that fails."""

import errno
import functools
import multiprocessing
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_data import toy_frames

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import EpisodeError
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, record_dataset
from rvlm.data.writer import partial_folder

SPEC = ActionSpec.from_card("tabletop_franka7")
N_EPISODES = 12
toy = functools.partial(toy_frames, SPEC, size=16)


def record(root, first=0, n=N_EPISODES, pause_s=0.0, per_file=5):
    """Record or resume a dataset, as a user's script would."""
    with EpisodeWriter(root, SPEC, episodes_per_file=per_file) as writer:
        for seed in range(first + writer.n_resumed, first + n):
            writer.add_episode(toy(4 + seed % 3, seed), f"task {seed % 2}", {"seed": seed})
            time.sleep(pause_s)


def actions_of(root):
    """Actions of each episode, checked to be those recorded, with all frames."""
    data = EpisodeDataset(root)
    assert all(len(data.episode(i)["observation.images.wrist"]) == n for i, n in enumerate(data.episodes["length"]))
    return [data.episode(i)["action"] for i in range(data.n_episodes)]


def child(target, *arguments, **options):
    """A forked process, without imports."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted") / "demos"
    record(root)
    return root


def test_a_repeatedly_killed_recording_equals_an_uninterrupted_one(tmp_path, uninterrupted):
    """SIGKILL at random, also in finalize: each time all added episodes are there."""
    root, rng, kept, n_kills = tmp_path / "demos", np.random.default_rng(16), 0, 0
    while not root.exists() and n_kills < 40:
        process = child(record, root, pause_s=0.05)
        process.join(timeout=rng.uniform(0.1, 0.6) + 0.05 * n_kills)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        shards = list(partial_folder(root).glob("shard-*"))
        assert root.exists() or len(shards) >= kept
        kept, n_kills = len(shards), n_kills + 1
    assert n_kills > 2
    for expected, got in zip(actions_of(uninterrupted), actions_of(root), strict=True):
        assert np.array_equal(expected, got)
    record_dataset(root, SPEC, lambda i: pytest.fail("recorded again"), 1, progress=False)
    assert not partial_folder(root).exists()


def test_an_episode_is_on_the_disk_when_it_was_added(tmp_path):
    """Of a hundred that would share a file, all but the current one survive the process."""
    process = child(record, tmp_path / "d", pause_s=3600, per_file=100)
    until = time.monotonic() + 120
    while not list(partial_folder(tmp_path / "d").glob("shard-00000")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.join()
    with EpisodeWriter(tmp_path / "d", SPEC) as writer:
        assert writer.n_resumed == 1
    assert EpisodeDataset(tmp_path / "d").n_episodes == 1


@pytest.mark.parametrize("step", ["assembled", "renamed"])
def test_a_recording_killed_in_finalize_is_finalized_again(tmp_path, step, monkeypatch):
    """The last two moments: before the rename, and before the parts are deleted."""
    root, partial = tmp_path / "d", partial_folder(tmp_path / "d")
    writer = EpisodeWriter(root, SPEC)
    writer.add_episode(toy(4, 0), "lift")

    def killed(*_, **__):
        raise SystemExit

    if step == "assembled":
        monkeypatch.setattr(Path, "rename", killed)
    else:
        monkeypatch.setattr("rvlm.data.writer.shutil", SimpleNamespace(rmtree=killed))
    with pytest.raises(SystemExit):
        writer.finalize()
    monkeypatch.undo()
    assert root.exists() == (step == "renamed") and (partial / "shard-00000").exists()
    writer.close()
    if step == "renamed":
        with pytest.raises(EpisodeError, match="A finished dataset takes no more episodes: record them into another folder"):
            EpisodeWriter(root, SPEC)
    else:
        EpisodeWriter(root, SPEC).finalize()
    assert EpisodeDataset(root).n_episodes == 1 and not partial.exists()


def test_finalize_does_nothing_the_second_time(tmp_path):
    with EpisodeWriter(tmp_path / "d", SPEC) as writer:
        writer.add_episode(toy(4, 0), "lift")
        made = writer.finalize().stat().st_mtime_ns
    assert writer.finalize().stat().st_mtime_ns == made
    with pytest.raises(EpisodeError, match="takes no more episodes"):
        writer.add_episode(toy(4, 1), "lift")


def test_what_was_recorded_before_an_error_is_kept(tmp_path):
    with pytest.raises(ZeroDivisionError), EpisodeWriter(tmp_path / "d", SPEC) as writer:
        writer.add_episode(toy(4, 0), "lift")
        _ = 1 / 0
    assert not (tmp_path / "d").exists() and EpisodeWriter(tmp_path / "d", SPEC).n_resumed == 1


def refusal(root, answer):
    try:
        record(root, first=50)
    except EpisodeError as error:
        answer.send(str(error))


def test_a_second_process_is_refused_and_the_first_loses_nothing(tmp_path):
    root, (ours, theirs) = tmp_path / "d", multiprocessing.Pipe()
    with EpisodeWriter(root, SPEC) as writer:
        writer.add_episode(toy(4, 0), "lift")
        other = child(refusal, root, theirs)
        assert ours.poll(120) and "d: another process is recording it at this moment; wait until" in ours.recv()
        other.join()
        writer.add_episode(toy(4, 1), "lift")
    assert EpisodeDataset(root).n_episodes == 2
    record(tmp_path / "e", n=2)
    assert Path(f"{root}.lock").exists() or not Path(f"{tmp_path / 'e'}.lock").exists(), "nothing holds it"


def test_two_writers_of_one_process_share_a_folder(tmp_path):
    one, two = EpisodeWriter(tmp_path / "d", SPEC), EpisodeWriter(tmp_path / "d", SPEC)
    for seed in range(4):
        one.add_episode(toy(4, seed), "lift")
        two.add_episode(toy(4, 10 + seed), "push")
    assert EpisodeDataset(one.finalize()).n_episodes == 8 and two.finalize() == one.root
    with pytest.raises(EpisodeError, match="takes no more episodes"):
        two.add_episode(toy(4, 99), "lift")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fails_costs_no_episode(tmp_path, code, monkeypatch):
    """A finished episode that cannot be renamed is kept complete, and used when the recording resumes."""
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    writer.add_episode(toy(4, 0), "lift")

    def fails(*_):
        raise OSError(code, "as the disk says")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(EpisodeError, match=r"shard\.\w+: the shard is complete there.*as the disk says"):
        writer.add_episode(toy(4, 1), "lift")
    with pytest.raises(EpisodeError, match="the shard is complete there"):
        writer.finalize()
    monkeypatch.undo()
    again = EpisodeWriter(tmp_path / "d", SPEC)
    assert again.n_resumed == 2 and EpisodeDataset(again.finalize()).n_episodes == 2


@pytest.mark.parametrize(
    "broken", ["rvlm.data.video.VideoWriter.add", "rvlm.data.shards.pq.write_table", "rvlm.data.shards.os.fsync"]
)
def test_an_episode_that_could_not_be_written_may_be_added_again(tmp_path, broken, monkeypatch):
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    writer.add_episode(toy(4, 0), "lift")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(broken, full)
    with pytest.raises(EpisodeError, match=r"could not be written .*no space left.* all .* before it are kept in .*d\.partial"):
        writer.add_episode(toy(4, 1), "lift")
    monkeypatch.undo()
    writer.add_episode(toy(4, 1), "lift")
    assert EpisodeDataset(writer.finalize()).n_episodes == 2


def test_a_dataset_that_cannot_be_renamed_keeps_all_that_it_was_made_of(tmp_path):
    root = tmp_path / "d"
    writer = EpisodeWriter(root, SPEC)
    writer.add_episode(toy(4, 0), "lift")
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text("{}")
    with pytest.raises(EpisodeError, match=r"could not be renamed .* all recorded episodes are kept"):
        writer.finalize()
    assert (partial_folder(root) / "shard-00000").exists() and (root / "meta/info.json").read_text() == "{}"


def test_a_shard_that_a_worker_could_not_rename_is_not_made_again(tmp_path, monkeypatch):
    made = []

    def make(index):
        made.append(index)
        yield toy(4, index), "lift", None

    def fails(*_):
        raise OSError(errno.EIO, "as the disk says")

    with monkeypatch.context() as patch, pytest.raises(EpisodeError, match=r"shard-00000\.\w+: the shard is complete there"):
        patch.setattr(Path, "rename", fails)
        record_dataset(tmp_path / "d", SPEC, make, 2, progress=False)
    assert EpisodeDataset(record_dataset(tmp_path / "d", SPEC, make, 2, progress=False)).n_episodes == 2 and made == [0, 1]


def test_resuming_needs_the_same_settings(tmp_path):
    first = EpisodeWriter(tmp_path / "d", SPEC)
    first.add_episode(toy(4, 0), "lift")
    again = EpisodeWriter(tmp_path / "d", SPEC)
    with pytest.raises(EpisodeError, match=r"expected uint8 of shape \(n, 16, 16, 3\), got uint8 \(4, 48, 48, 3\)"):
        again.add_episode(toy_frames(SPEC, 4, 1), "lift")
    with pytest.raises(EpisodeError, match="an unfinished recording with other features"):
        EpisodeWriter(tmp_path / "d", SPEC, features={"action": {}})
    with pytest.raises(EpisodeError, match=r"differs in \['n_shards'\]"):
        record_dataset(tmp_path / "d", SPEC, lambda i: [], 3, progress=False)


def test_files_of_many_hold_the_frames_of_single_ones_bit_for_bit(tmp_path):
    """They are joined without decoding; each episode still begins with a key frame."""
    roots = {per_file: tmp_path / str(per_file) for per_file in (1, 4, 100)}
    for per_file, root in roots.items():
        record(root, n=6, per_file=per_file)
        videos = sorted(root.glob("videos/*/*/*.mp4"))
        assert len(videos) == 2 * -(-6 // per_file)
    single, few, one = (EpisodeDataset(root) for root in roots.values())
    for i in range(6):
        for key, values in single.episode(i).items():
            for other in (few, one):
                assert np.array_equal(values, other.episode(i)[key]), key
    with av.open(str(next(roots[100].glob("videos/*/*/*.mp4")))) as file:
        keys = {round(p.pts * p.time_base * SPEC.rate_hz) for p in file.demux(video=0) if p.is_keyframe and p.pts is not None}
    lengths = pq.read_table(roots[100] / "meta/episodes/chunk-000/file-000.parquet")["length"].to_pylist()
    assert set(np.cumsum([0, *lengths[:-1]])) <= keys
