"""Validation of foreign datasets and cards: whatever is wrong, samples are right or one of our errors names it.

One small recording is damaged in many ways, one at a time. Every way of reading it must give what was recorded, or an
`EpisodeError` that says what is wrong and where; never another exception, and never silently other samples.
"""

import dataclasses
import io
import json
import re
import shutil
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rvlm.data.actions import CARDS, ActionSpec, NormStats
from rvlm.data.camera_names import find_camera
from rvlm.data.dimensions import check_order
from rvlm.data.errors import CardError, EpisodeError, SpecMismatch
from rvlm.data.pooled_statistics import pooled_stats
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, Windows, split
from rvlm.files import PACKAGE
from rvlm.policy.action_tokenizer import ActionTokenizer

SPEC = ActionSpec.from_card("tabletop_franka7")
STATIC, WRIST = "observation.images.static", "observation.images.wrist"
LENGTHS, TASKS, SIZE = (6, 4, 5, 3), ("pick", "place", "wipe", "open"), 16
DATA, VIDEO = "data/chunk-000/file-{:03d}.parquet", "videos/{}/chunk-000/file-{:03d}.mp4"
EPISODES, TASK_TABLE = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"


def frames_of(n, seed, invert=False):
    """Random actions and states, and grey images whose level encodes episode and frame."""
    rng = np.random.default_rng(seed)
    level = (40 + (53 * seed + 7 * np.arange(n)) % 200).astype(np.uint8)
    images = np.repeat((255 - level if invert else level)[:, None], SIZE * SIZE * 3, 1).reshape(n, SIZE, SIZE, 3)
    action = SPEC.set_grippers(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random((n, 1)) > 0.5)
    state = rng.normal(size=(n, 7)).astype(np.float32)
    return {STATIC: images, WRIST: 255 - images, "observation.state": state, "action": action}


def record(root, lengths=LENGTHS, tasks=TASKS, per_file=2):
    writer = EpisodeWriter(root, SPEC, episodes_per_file=per_file)
    for i, (n, task) in enumerate(zip(lengths, tasks, strict=True)):
        writer.add_episode(frames_of(n, i), task)
    return writer.finalize()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A valid recording of four episodes in two files, and one in v2.1 with a camera embedded as PNG."""
    root = record(tmp_path_factory.mktemp("sound") / "demos")
    return root, as_v21(root, root.with_name("old"))


def as_v21(v3, root):
    info = json.loads((v3 / "meta/info.json").read_text())
    info["features"][WRIST] = {"dtype": "image", "shape": [3, SIZE, SIZE], "names": ["channels", "height", "width"]}
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{STATIC}"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info | paths | {"codebase_version": "v2.1"}))
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": i, "task": t}) for i, t in enumerate(TASKS)))
    rows = [{"episode_index": i, "tasks": [TASKS[i]], "length": n} for i, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = pa.concat_tables([pq.read_table(v3 / DATA.format(i)) for i in (0, 1)])
    for i, n in enumerate(LENGTHS):
        frames = frames_of(n, i)
        cells = [{"bytes": png(image), "path": None} for image in frames[WRIST]]
        own = table.slice(sum(LENGTHS[:i]), n).append_column(WRIST, pa.array(cells))
        pq.write_table(own, root / f"data/chunk-000/episode_{i:06d}.parquet")
        mp4(root / f"videos/chunk-000/{STATIC}/episode_{i:06d}.mp4", frames[STATIC])
    return root


def png(image, mode=None):
    Image.fromarray(image, mode).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def png16(image):
    """A PNG of 16-bit colours, which Pillow reads and can't write."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def mp4(path, images, rate=10, pts=lambda i: i, base=None, frames="rgb24", **options):
    """A video of images, the i-th one shown at pts(i) ticks of `base` seconds."""
    path.unlink(missing_ok=True)
    base = base or 1 / Fraction(rate)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(rate), options={"crf": "8", "bf": "0", **options})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv444p"
        stream.codec_context.time_base = base
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=frames).reformat(format="yuv444p")
            frame.pts, frame.time_base = pts(i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def edit_info(root, change):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(path, change):
    """Change a table by pandas, keeping the order of columns; types are inferred by pandas."""
    frame = pd.read_parquet(path)
    changed = change(frame)
    (frame if changed is None else changed).to_parquet(path)


def set_cells(path, name, values, kind=None):
    table = pq.read_table(path)
    column = pa.array(values, kind)
    if name in table.column_names:
        table = table.set_column(table.schema.get_field_index(name), name, column)
    else:
        table = table.append_column(name, column)
    pq.write_table(table, path)


def samples_of(root, spec=None):
    """All samples of a training, and the same data by episodes."""
    dataset = EpisodeDataset(root, spec)
    windows = Windows(dataset, 2, 2)
    batch = windows.batch(range(len(windows)))
    whole = [dataset.episode(i) for i in range(dataset.n_episodes)]
    return {
        **{key: np.asarray(batch[key]) for key in ("images", "state", "action", "instruction", "episode_index", "frame_index")},
        "actions by episode": np.concatenate([e["action"] for e in whole]),
        "images by episode": np.concatenate([np.stack([e[dataset.camera_keys[c]] for c in dataset.cameras], 1) for e in whole]),
        "instructions by episode": np.array([e["instruction"] for e in whole]),
    }


@pytest.fixture(scope="module")
def right(sound, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(tmp_path_factory.mktemp("right")))
        return samples_of(sound[0])


def assert_same(got, right):
    for key, values in right.items():
        if key.startswith("images"):
            assert np.abs(got[key].astype(int) - values).max() <= 3, f"{key} differ"
        else:
            exact = np.array_equal if values.dtype.kind in "iU" else np.allclose
            assert exact(got[key], values), f"{key} differ"


# --- damages ----------------------------------------------------------------------------------------------------------------
RIGHT = None


def info(**values):
    return lambda root: edit_info(root, lambda i: i.update(values))


def without_info(*names):
    return lambda root: edit_info(root, lambda i: [i.pop(name) for name in names])


def feature(key, **values):
    return lambda root: edit_info(root, lambda i: i["features"].setdefault(key, {}).update(values))


def text(name, change):
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def table(name, change):
    return lambda root: edit_table(root / name, change)


def cells(name, column, change, kind=None):
    """Change one column's values, given as Python objects."""

    def damage(root):
        old = pq.read_table(root / name)[column]
        set_cells(root / name, column, change(old.to_pylist()), kind or old.type)

    return damage


def put(values, at, value):
    values[at] = value
    return values


def deep(values, at, i, value):
    values[at] = put(list(values[at]), i, value)
    return values


def half(data):
    return data[: len(data) // 2]


def other_feature(key, how, camera=WRIST):
    """A second image feature, whose files are those of a camera."""

    def damage(root):
        edit_info(root, lambda i: i["features"].update({key: {**i["features"][camera], **how}}))
        path = root / EPISODES
        frame = pd.read_parquet(path)
        for column in [c for c in frame if c.startswith(f"videos/{camera}/")]:
            frame[column.replace(camera, key)] = frame[column]
        frame.to_parquet(path)
        shutil.copytree(root / f"videos/{camera}", root / f"videos/{key}")

    return damage


def renamed_camera(old, new):
    def damage(root):
        other_feature(new, {}, old)(root)
        edit_info(root, lambda i: i["features"].pop(old))

    return damage


def reversed_rows(root):
    for i in (0, 1):
        path = root / DATA.format(i)
        rows = pq.read_table(path)
        pq.write_table(rows.take(np.arange(len(rows))[::-1]), path)


def file_by_file_table(*, extra):
    def damage(root):
        frame = pd.read_parquet(root / EPISODES)
        frame.iloc[2:].assign(**extra).to_parquet(root / EPISODES.replace("000.parquet", "001.parquet"))
        frame.iloc[:2].to_parquet(root / EPISODES)

    return damage


def boundary(root):
    """The table puts episode 2, the first of the second file, into the first file."""
    edit_table(root / EPISODES, lambda f: f.assign(**{"data/file_index": [0, 0, 0, 1]}))


def deleted_episode(root, *, renumber=False):
    edit_table(root / EPISODES, lambda f: f[f["episode_index"] != 1])
    if renumber:
        edit_table(root / EPISODES, lambda f: f.assign(episode_index=range(len(f))))
    edit_info(root, lambda i: i.update(total_episodes=3, total_frames=14))


def language(root):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("timestamp", pa.float64())]))
    for i in (0, 1):
        n = pq.read_metadata(root / DATA.format(i)).num_rows
        word = {"role": "user", "content": "the other one", "timestamp": 0.4}
        set_cells(root / DATA.format(i), "language_events", [[word]] + [[]] * (n - 2) + [None], kind)
    edit_info(root, lambda i: i["features"].update(language_events={"dtype": "language", "shape": [1], "names": None}))


def damaged_png(change):
    def damage(root):
        path = "data/chunk-000/episode_000001.parquet"
        cells(path, WRIST, lambda values: put(values, 2, change(values[2])))(root)

    return damage


def video(key, file, images, **how):
    return lambda root: mp4(root / VIDEO.format(key, file), images(), **how)


def first_file(camera=STATIC):
    return np.concatenate([frames_of(n, i)[camera] for i, n in enumerate(LENGTHS[:2])])


def bits_flipped(root):
    path = root / VIDEO.format(STATIC, 0)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at + 700 : -900 or None] = bytes(b ^ 0x5A for b in data[at + 700 : -900])
    path.write_bytes(bytes(data))


def float_images(root):
    edit_info(root, lambda i: i["features"].update({WRIST: {"dtype": "float32", "shape": [2, 2, 3], "names": None}}))
    for i in (0, 1):
        n = pq.read_metadata(root / DATA.format(i)).num_rows
        set_cells(root / DATA.format(i), WRIST, np.zeros((n, 2, 2, 3)).tolist(), pa.list_(pa.list_(pa.list_(pa.float32()))))


V3 = {
    # meta/info.json
    "info is empty": (text("meta/info.json", lambda b: b""), r"expected whole JSON at .*info\.json"),
    "info is cut short": (text("meta/info.json", half), r"expected whole JSON at .*info\.json"),
    "info is a list": (text("meta/info.json", lambda b: b"[1]"), r"info\.json: expected a JSON object .*got a list"),
    "info is not UTF-8": (text("meta/info.json", lambda b: b"\xff\xfe\x00"), r"expected readable UTF-8 text at .*info\.json"),
    "info begins with a byte order mark": (text("meta/info.json", lambda b: b"\xef\xbb\xbf" + b), RIGHT),
    "info is nested without end": (text("meta/info.json", lambda b: b"[" * 100_000), r"expected whole JSON at .*info\.json"),
    "no version": (without_info("codebase_version"), "expected format v3.0 or v2.1, got None"),
    "v2.0": (info(codebase_version="v2.0"), "got 'v2.0'; convert it to v2.1, .*v20_to_v21"),
    "a newer version": (info(codebase_version="v3.1"), "got 'v3.1'; it is newer than what is read here"),
    "no fps": (without_info("fps"), "info.json: expected 'fps' as a number above 0, got None"),
    "fps is text": (info(fps="10"), "expected 'fps' as a number above 0, got '10'"),
    "fps is NaN": (info(fps=float("nan")), "expected 'fps' as a number above 0, got nan"),
    "fps is 0": (info(fps=0), "expected 'fps' as a number above 0, got 0"),
    "fps is true": (info(fps=True), "expected 'fps' as a number above 0, got True"),
    "fps is not the card's": (info(fps=30), r"card 'tabletop_franka7' says 10 Hz, info.json 30 frames per second \(fps\)"),
    "no features": (without_info("features"), "info.json: expected 'features' as an object"),
    "features is a list": (info(features=[1]), "info.json: expected 'features' as an object"),
    "a feature without shape": (feature("extra", dtype="float32"), "info.json: expected feature 'extra' with a 'dtype'"),
    "a shape of text": (feature("action", shape="7"), "expected feature 'action' with a 'dtype' in words and a 'shape'"),
    "no counts": (without_info("total_episodes"), "expected 'total_episodes' as a whole number above 0, got None"),
    "counts are text": (info(total_frames="18"), "expected 'total_frames' as a whole number above 0, got '18'"),
    "more episodes promised": (info(total_episodes=9), "promises 9 episodes of 18 frames, the episodes table has 4 of 18"),
    "fewer frames promised": (info(total_frames=17), "promises 4 episodes of 17 frames, the episodes table has 4 of 18"),
    "stale splits": (info(splits={"train": "0:99"}), RIGHT),
    "a stored card that is text": (info(rvlm={"spec": "franka"}), r"info\.json, rvlm.spec: action spec: expected an object"),
    "a stored card of another time": (
        info(rvlm={"spec": {"names": []}}),
        r"info\.json, rvlm.spec: action spec: .*missing fields",
    ),
    # paths and names of files
    "an absolute data_path": (
        info(data_path="/tmp/{chunk_index}{file_index}.parquet"),
        "'data_path' as a path below the dataset's",
    ),
    "a data_path that climbs": (info(data_path="../x/{file_index}.parquet"), "'data_path' as a path below the dataset's folder"),
    "a video_path that climbs": (info(video_path="videos/../../{video_key}/{file_index}.mp4"), "'video_path' as a path below"),
    "an attribute in a path": (
        info(data_path="{chunk_index.__class__}/{file_index}"),
        "placeholders .*chunk_index.__class__.*exist",
    ),
    "an index in a path": (info(data_path="{chunk_index[0]}/{file_index}"), r"placeholders .*chunk_index\[0\].*those that exist"),
    "an unknown placeholder": (info(video_path="videos/{camera}/{file_index}.mp4"), "placeholders .*camera.*video_key"),
    "a conversion in a path": (info(data_path="{chunk_index!r}/{file_index}"), "placeholders .*chunk_index.*those that exist"),
    "a brace too few": (info(data_path="data/{chunk_index/{file_index}"), "expected 'data_path' as a path with placeholders"),
    "a number as path": (info(data_path=7), "expected 'data_path' as a path with placeholders, got 7"),
    "no data_path": (without_info("data_path"), "expected 'data_path' as a path with placeholders, got None"),
    "no video_path": (info(video_path=None), "expected 'video_path' as a path with placeholders, got None"),
    "a video_path for one camera": (
        info(video_path=f"videos/{STATIC}/chunk-{{chunk_index:03d}}/file-{{file_index:03d}}.mp4"),
        r"expected 'video_path' with \{video_key\}",
    ),
    "a video_path that pads words": (info(video_path="{video_key:03d}/{file_index}.mp4"), "placeholders .*video_key:03d"),
    "a camera that is a path": (
        renamed_camera(WRIST, "observation.images.x"),
        "unknown camera 'wrist'; cameras that exist: static, x",
    ),
    "a camera named /tmp/x": (
        feature("observation.images./tmp/x", dtype="video", shape=[16, 16, 3]),
        "can't be the name of a camera",
    ),
    "a camera named ..": (feature("observation.images.a..b", dtype="image", shape=[16, 16, 3]), "can't be the name of a camera"),
    "a camera named with a zero": (feature("observation.images.a\0", dtype="video", shape=[16, 16, 3]), "can't be the name of"),
    # cameras
    "a depth camera beside": (other_feature("observation.depth.wrist", {}), RIGHT),
    "depth and colour": (other_feature("observation.images.depth.static", {}, STATIC), RIGHT),
    "two colours end alike": (other_feature("observation.left.wrist", {}), RIGHT),
    "the card's camera is depth": (feature(WRIST, info={"is_depth_map": True}), "camera 'wrist' is .*a depth map"),
    "the card's camera is depth, in other words": (
        feature(WRIST, info={"video.is_depth_map": True}),
        "camera 'wrist' is .*a depth map",
    ),
    "a depth map marked in words": (feature(STATIC, info={"is_depth_map": "false"}), "'is_depth_map' .* as true or false"),
    "depth named otherwise": (other_feature("observation.images.Depth2.static", {}, STATIC), RIGHT),
    "only depth has the name": (
        renamed_camera(WRIST, "observation.depth.wrist"),
        "unknown camera 'wrist'; cameras that exist: static",
    ),
    "only left and right have it": (
        lambda root: (renamed_camera(WRIST, "left.wrist")(root), other_feature("right.wrist", {}, "left.wrist")(root)),
        "camera 'wrist' may be any of .*'left.wrist' or 'right.wrist' in the card",
    ),
    "a camera more than the card has": (other_feature("observation.images.top", {}), RIGHT),
    "images as numbers": (float_images, "unknown camera 'wrist'; cameras that exist: static; .*observation.images.wrist"),
    "another size": (
        feature(STATIC, shape=[32, 16, 3]),
        r"file-00[01]\.mp4: expected images of observation.images.static .*16 x 16 pixels",
    ),
    "channels first": (feature(STATIC, shape=[3, 16, 16]), RIGHT),
    "a shape without channels": (feature(STATIC, shape=[16, 16]), RIGHT),
    "one channel, first": (feature(STATIC, shape=[1, 16, 16]), RIGHT),
    "four channels, first": (feature(STATIC, shape=[4, 16, 16]), RIGHT),
    # meta/tasks.parquet
    "tasks in another order": (table(TASK_TABLE, lambda f: f.iloc[[2, 0, 3, 1]]), RIGHT),
    "tasks as a column": (table(TASK_TABLE, lambda f: f.reset_index()), RIGHT),
    "task indices with a gap": (
        lambda root: (
            edit_table(root / TASK_TABLE, lambda f: f.assign(task_index=[0, 1, 2, 9])),
            cells(DATA.format(1), "task_index", lambda v: [9 if x == 3 else x for x in v])(root),
        ),
        RIGHT,
    ),
    "a task twice": (table(TASK_TABLE, lambda f: f.assign(task_index=[0, 1, 1, 3])), "tasks with a task_index of their own"),
    "a task without a word": (
        table(TASK_TABLE, lambda f: f.set_index(pd.Index([" ", *TASKS[1:]], name="task"))),
        r"tasks\.parquet: expected an instruction in words for task 0, got ' ', which holds no word; write one, .* meta/episodes",
    ),
    "tasks without words": (
        table(TASK_TABLE, lambda f: f.reset_index(drop=True)),
        r"tasks\.parquet: expected a number and words",
    ),
    "tasks without numbers": (
        table(TASK_TABLE, lambda f: f.rename(columns={"task_index": "i"})),
        r"tasks\.parquet: .*'task_index'",
    ),
    "no tasks": (lambda root: (root / TASK_TABLE).unlink(), r"expected a parquet file at .*tasks\.parquet, got none"),
    "tasks cut short": (text(TASK_TABLE, half), r"expected a whole parquet file at .*tasks\.parquet"),
    "tasks are empty": (text(TASK_TABLE, lambda b: b""), r"expected a whole parquet file at .*tasks\.parquet"),
    # meta/episodes
    "no episodes": (lambda root: (root / EPISODES).unlink(), "expected parquet files in meta/episodes, got none"),
    "episodes cut short": (text(EPISODES, half), r"expected a whole parquet file at .*meta/episodes/chunk-000/file-000"),
    "episodes in another order": (table(EPISODES, lambda f: f.iloc[[3, 1, 0, 2]]), RIGHT),
    "hidden files beside": (
        lambda root: (root / EPISODES).with_name("._file-000.parquet").write_bytes(b"\0\5\x16\7"),
        RIGHT,
    ),
    "starts as an index": (table(EPISODES, lambda f: f.set_index(f"videos/{STATIC}/from_timestamp")), RIGHT),
    "tasks under another name": (table(TASK_TABLE, lambda f: f.rename_axis("lang")), RIGHT),
    "two columns of tasks": (table(TASK_TABLE, lambda f: f.rename_axis("a").reset_index().assign(b="x")), "name it 'task'"),
    "episodes in two files": (file_by_file_table(extra={}), RIGHT),
    "episodes in two files of other columns": (file_by_file_table(extra={"operator": "a"}), RIGHT),
    "an episode twice": (
        table(EPISODES, lambda f: f.assign(episode_index=[0, 1, 1, 3])),
        "episode_index 0 to 3, each once, got 1 for",
    ),
    "an episode deleted": (deleted_episode, "expected episode_index 0 to 2, each once, got 2 for episode 1"),
    "an episode deleted, numbered anew": (
        lambda r: deleted_episode(r, renumber=True),
        r"file-000\.parquet, row 6: task_index 1 is 'place', .*says \['wipe'\]",
    ),
    "episodes without length": (table(EPISODES, lambda f: f.drop(columns="length")), r"episodes.*file-000.*columns \['length'\]"),
    "episodes without tasks": (table(EPISODES, lambda f: f.drop(columns="tasks")), r"episodes.*file-000.*columns \['tasks'\]"),
    "episodes without files": (table(EPISODES, lambda f: f.drop(columns="data/file_index")), r"columns \['data/file_index'\]"),
    "episodes without starts": (
        table(EPISODES, lambda f: f.drop(columns=f"videos/{WRIST}/from_timestamp")),
        r"columns \['videos/.*from_timestamp'\]",
    ),
    "a start that is NaN": (
        table(EPISODES, lambda f: f.assign(**{f"videos/{WRIST}/from_timestamp": [0, np.nan, 0, 0.5]})),
        "expected seconds from 0, got nan in row 1",
    ),
    "a start before the video": (
        table(EPISODES, lambda f: f.assign(**{f"videos/{WRIST}/from_timestamp": [0, -0.6, 0, 0.5]})),
        "expected seconds from 0, got -0.6 in row 1",
    ),
    "a length of 0": (
        lambda root: (edit_table(root / EPISODES, lambda f: f.assign(length=[10, 0, 5, 3])),),
        "episode 1 has length 0",
    ),
    "lengths that sum up, of other episodes": (
        table(EPISODES, lambda f: f.assign(length=[5, 5, 5, 3])),
        r"file-000\.parquet, row 5: expected",
    ),
    "a length that is missing": (table(EPISODES, lambda f: f.assign(length=[6, None, 5, 3])), "column 'length'"),
    "a length and a half": (
        table(EPISODES, lambda f: f.assign(length=[6.5, 3.5, 5, 3])),
        "'length': expected one whole number a row",
    ),
    "tasks of an episode missing": (
        table(EPISODES, lambda f: f.assign(tasks=[["pick"], [], ["wipe"], ["open"]])),
        "tasks of episode 1",
    ),
    "tasks as text": (table(EPISODES, lambda f: f.assign(tasks=list(TASKS))), RIGHT),
    "tasks exchanged": (
        table(EPISODES, lambda f: f.assign(tasks=[[t] for t in TASKS[::-1]])),
        "task_index 0 is 'pick', while the episodes table says",
    ),
    "ranges anew in each file": (
        table(EPISODES, lambda f: f.assign(dataset_from_index=[0, 6, 0, 5], dataset_to_index=[6, 10, 5, 8])),
        RIGHT,
    ),
    "no ranges": (table(EPISODES, lambda f: f.drop(columns=["dataset_from_index", "dataset_to_index"])), RIGHT),
    "a file before": (boundary, RIGHT),
    "a file that does not exist": (
        table(EPISODES, lambda f: f.assign(**{"data/file_index": [0, 0, 1, 7]})),
        r"expected a parquet file at .*file-007",
    ),
    "a negative file": (
        table(EPISODES, lambda f: f.assign(**{"data/file_index": [0, 0, 1, -1]})),
        "'data/file_index': expected numbers from 0",
    ),
    # data
    "rows in another order": (reversed_rows, RIGHT),
    "data cut short": (text(DATA.format(0), half), r"expected a whole parquet file at .*data/chunk-000/file-000"),
    "data of zeros": (
        text(DATA.format(1), lambda b: bytes(len(b))),
        r"expected a whole parquet file at .*data/chunk-000/file-001",
    ),
    "a data file missing": (
        lambda root: (root / DATA.format(1)).unlink(),
        r"expected a parquet file at .*file-001\.parquet, got none",
    ),
    "a page of data flipped": (text(DATA.format(0), lambda b: b[:60] + bytes(x ^ 255 for x in b[60:400]) + b[400:]), "file-000"),
    "indices anew in each file": (
        cells(DATA.format(1), "index", lambda v: list(range(len(v)))),
        r"file-001\.parquet, row 0: expected index",
    ),
    "episodes anew in each file": (
        cells(DATA.format(1), "episode_index", lambda v: [0] * 5 + [1] * 3),
        r"file-001\.parquet, row 0: expected",
    ),
    "tasks anew in each file": (
        cells(DATA.format(1), "task_index", lambda v: [0] * len(v)),
        r"file-001\.parquet, row 0: task_index 0 is 'pick'",
    ),
    "a frame twice": (cells(DATA.format(0), "frame_index", lambda v: put(v, 2, 1)), r"file-000\.parquet, row 2: expected index"),
    "a frame past the end": (
        cells(DATA.format(0), "frame_index", lambda v: put(v, 3, 77)),
        r"file-000\.parquet, row 3: expected frame_index",
    ),
    "a task that is unknown": (
        cells(DATA.format(0), "task_index", lambda v: put(v, 3, 9)),
        r"row 3: expected task_index to be one of",
    ),
    "an episode that is unknown": (
        cells(DATA.format(0), "episode_index", lambda v: put(v, 3, 9)),
        r"row 3: expected episode_index to be 0 to 3",
    ),
    "a row that is null": (cells(DATA.format(0), "index", lambda v: put(v, 3, None)), r"column 'index': row 3 holds a null"),
    "indices as floats": (cells(DATA.format(0), "index", lambda v: v, pa.float64()), RIGHT),
    "indices in lists": (cells(DATA.format(0), "episode_index", lambda v: [[x] for x in v], pa.list_(pa.int64())), RIGHT),
    "indices as text": (
        cells(DATA.format(0), "index", lambda v: list(map(str, v)), pa.string()),
        "'index': expected one whole number",
    ),
    "a row too few": (
        lambda root: pq.write_table(pq.read_table(root / DATA.format(0))[:-1], root / DATA.format(0)),
        "expected each row of episode 1",
    ),
    "a row twice": (
        lambda root: pq.write_table(pa.concat_tables([t := pq.read_table(root / DATA.format(0)), t[:1]]), root / DATA.format(0)),
        r"file-000\.parquet, row 10: expected index to be each row once",
    ),
    "no frame_index": (
        lambda root: pq.write_table(pq.read_table(root / DATA.format(0)).drop_columns("frame_index"), root / DATA.format(0)),
        r"file-000\.parquet: expected the columns \['frame_index'\]",
    ),
    "actions twice": (
        lambda root: pq.write_table(
            (t := pq.read_table(root / DATA.format(0))).append_column("action", t["action"]), root / DATA.format(0)
        ),
        r"file-000\.parquet: expected each column once, got \['action'\]",
    ),
    "no actions": (
        lambda root: pq.write_table(pq.read_table(root / DATA.format(0)).drop_columns("action"), root / DATA.format(0)),
        r"file-000\.parquet: expected the columns \['action'\]",
    ),
    "an action too short": (
        cells(DATA.format(0), "action", lambda v: put(v, 2, v[2][:6]), pa.list_(pa.float32())),
        "row 2 has 6 entries, row 0 has 7",
    ),
    "actions of another width": (
        cells(DATA.format(0), "action", lambda v: [x[:6] for x in v], pa.list_(pa.float32())),
        r"info.json promises shape \[7\], a row has 6 values",
    ),
    "an action that is null": (
        cells(DATA.format(0), "action", lambda v: put(v, 2, None), pa.list_(pa.float32())),
        "'action': row 2 is null",
    ),
    "a number that is null": (
        cells(DATA.format(0), "action", lambda v: deep(v, 2, 1, None), pa.list_(pa.float32())),
        "'action': row 2 holds a null",
    ),
    "an action that is NaN": (
        cells(DATA.format(0), "action", lambda v: deep(v, 2, 1, np.nan)),
        "action: .*got nan in row 2, dimension 1",
    ),
    "an action that is infinite": (
        cells(DATA.format(1), "action", lambda v: deep(v, 0, 1, np.inf)),
        "action: .*got inf in row 10, dimension 1",
    ),
    "an action out of range": (cells(DATA.format(1), "action", lambda v: deep(v, 0, 1, 40.0)), "got 40.0 for 'dy' in row 10"),
    "a state that is NaN": (
        cells(DATA.format(0), "observation.state", lambda v: deep(v, 2, 1, np.nan)),
        "observation.state: .*got nan in row 2",
    ),
    "actions as text": (
        cells(DATA.format(0), "action", lambda v: [list(map(str, x)) for x in v], pa.list_(pa.string())),
        "promises float32, the file holds text",
    ),
    "actions as structs": (
        cells(DATA.format(0), "action", lambda v: [{"dx": x[0]} for x in v], pa.struct([("dx", pa.float32())])),
        "'action': its type is struct",
    ),
    "actions as float64": (cells(DATA.format(0), "action", lambda v: v, pa.list_(pa.float64(), 7)), RIGHT),
    "actions of large lists": (cells(DATA.format(0), "action", lambda v: v, pa.large_list(pa.float32())), RIGHT),
    "names in another order": (
        feature("action", names=["gripper", *SPEC.names[:6]]),
        "'gripper' is dimension 0 there and 6 here",
    ),
    "names of a dict in another order": (
        feature("action", names={"motors": ["dy", "dx", *SPEC.names[2:]]}),
        "'dy' is dimension 0 there and 1",
    ),
    "names of the state exchanged": (
        feature("observation.state", names=["y", "x", *SPEC.state_names[2:]]),
        "'y' is dimension 0 there and 1 here",
    ),
    "names beside": (feature("action", names=[*SPEC.names, "done"]), "8 names for 7 dimensions"),
    "names in the right order, otherwise packed": (
        feature("action", names={"arm": list(SPEC.names[:6]), "hand": "gripper"}),
        RIGHT,
    ),
    "one name for all": (feature("action", names=["actions"]), RIGHT),
    "names in other words": (feature("action", names=list("abcdefg")), RIGHT),
    "names left out": (feature("action", names=None), RIGHT),
    "language": (language, RIGHT),
    "timestamps of a wall clock": (
        cells(DATA.format(0), "timestamp", lambda v: [1.7e9 + 0.09 * i + 0.002 * (i % 5) for i in range(len(v))], pa.float64()),
        RIGHT,
    ),
    "timestamps that are NaN": (cells(DATA.format(0), "timestamp", lambda v: [np.nan] * len(v)), RIGHT),
    # videos
    "a video missing": (lambda root: (root / VIDEO.format(WRIST, 1)).unlink(), r"wrist/chunk-000/file-001\.mp4"),
    "a video cut short": (text(VIDEO.format(WRIST, 0), half), r"expected a whole mp4 file at .*wrist/chunk-000/file-000\.mp4"),
    "a video that is empty": (text(VIDEO.format(WRIST, 0), lambda b: b""), r"expected a whole mp4 file at .*file-000\.mp4"),
    "a video that is text": (
        text(VIDEO.format(WRIST, 0), lambda b: b"version https://git-lfs"),
        r"expected a whole mp4 file at .*file-000",
    ),
    "a video that is a folder": (
        lambda root: ((root / VIDEO.format(WRIST, 0)).unlink(), (root / VIDEO.format(WRIST, 0)).mkdir()),
        r"file-000\.mp4",
    ),
    "a video whose bits are flipped": (bits_flipped, r"static/chunk-000/file-000\.mp4"),
    "a frame too few": (video(STATIC, 0, lambda: first_file()[:-1]), r"expected 10 frames in .*file-000\.mp4, got 9"),
    "a frame too many": (
        video(STATIC, 0, lambda: np.concatenate([first_file(), first_file()[:1]])),
        r"expected 10 frames .*got 11",
    ),
    "a frame left out in the middle": (
        video(STATIC, 0, lambda: first_file(), pts=lambda i: i + (i > 4)),
        "no frame is near row 5",
    ),
    "a frame dropped, one too many at the end": (
        video(
            STATIC, 0, lambda: np.concatenate([first_file()[:4], first_file()[5:], first_file()[:1]]), pts=lambda i: i + (i > 3)
        ),
        "expected 10 frames .*got 10: .*no frame is near row 4",
    ),
    "a first frame that is late": (video(STATIC, 0, lambda: first_file(), pts=lambda i: i + 1), "no frame is near row 0|got 10"),
    "a video at 20 Hz": (video(STATIC, 0, lambda: first_file(), rate=20), "at 10 Hz .fps.*run at 20 Hz"),
    "a video at 9.97 Hz": (video(STATIC, 0, lambda: first_file(), rate=Fraction(9970, 1000)), RIGHT),
    "a clock of fine ticks": (
        video(STATIC, 0, lambda: first_file(), pts=lambda i: 9000 * i + 100 * (i % 3), base=Fraction(1, 90000)),
        RIGHT,
    ),
    "frames between frames": (video(STATIC, 0, lambda: np.repeat(first_file(), 2, 0)[:-1], rate=20), RIGHT),
    "frames out of order": (video(STATIC, 0, lambda: first_file(), bf="3", g="50"), RIGHT),
    "a video of another camera's size": (
        video(STATIC, 0, lambda: first_file().repeat(2, 1)),
        r"static/chunk-000/file-000\.mp4: expected images .*got 32 x 16 pixels",
    ),
}

V21 = {
    "as it is": (lambda root: None, RIGHT),
    "tasks in another order": (text("meta/tasks.jsonl", lambda b: b"\n".join(b.splitlines()[::-1])), RIGHT),
    "episodes in another order": (text("meta/episodes.jsonl", lambda b: b"\n".join(b.splitlines()[::-1])), RIGHT),
    "a line separator inside a line": (
        text("meta/episodes.jsonl", lambda b: b.replace(b'"length"', '"note": "a\u2028b\x85", "length"'.encode())),
        RIGHT,
    ),
    "an empty line": (text("meta/episodes.jsonl", lambda b: b.replace(b"\n", b"\n\n")), RIGHT),
    "no tasks": (lambda root: (root / "meta/tasks.jsonl").unlink(), r"expected a file at .*tasks\.jsonl, got none"),
    "tasks are empty": (text("meta/tasks.jsonl", lambda b: b""), r"tasks\.jsonl: expected tasks with a task_index"),
    "a line cut short": (text("meta/episodes.jsonl", lambda b: b[:-12]), r"expected whole JSON at .*episodes\.jsonl, line 4"),
    "a line that is a number": (
        text("meta/episodes.jsonl", lambda b: b + b"7\n"),
        r"episodes\.jsonl, line 5: expected a JSON object",
    ),
    "an episode without length": (
        text("meta/episodes.jsonl", lambda b: b.replace(b'"length"', b'"n"', 1)),
        r"episodes\.jsonl, entry 1",
    ),
    "a length of 0": (text("meta/episodes.jsonl", lambda b: b.replace(b'"length": 4', b'"length": 0')), "episode 1 has length 0"),
    "an episode twice": (
        text("meta/episodes.jsonl", lambda b: b + b.splitlines()[0]),
        "episode_index 0 to 4, each once, got 0 for",
    ),
    "an episode deleted": (
        lambda root: (
            text("meta/episodes.jsonl", lambda b: b"\n".join(b.splitlines()[:1] + b.splitlines()[2:]))(root),
            info(total_episodes=3, total_frames=14)(root),
        ),
        "each once, got 2 for episode 1",
    ),
    "no chunks_size": (without_info("chunks_size"), "expected 'chunks_size' as a whole number above 0, got None"),
    "tasks all zero": (
        cells("data/chunk-000/episode_000002.parquet", "task_index", lambda v: [0] * len(v)),
        r"episode_000002\.parquet, row 0: task",
    ),
    "rows of another episode": (
        lambda root: shutil.copy(root / "data/chunk-000/episode_000000.parquet", root / "data/chunk-000/episode_000001.parquet"),
        r"expected each row of episode [01]",
    ),
    "a PNG cut short": (
        damaged_png(lambda c: {**c, "bytes": half(c["bytes"])}),
        r"episode_000001\.parquet, row 2, column .*: expected a whole image",
    ),
    "a PNG of zeros": (
        damaged_png(lambda c: {**c, "bytes": bytes(99)}),
        r"episode_000001\.parquet, row 2, column .*: expected a whole image",
    ),
    "a PNG elsewhere": (damaged_png(lambda c: {"bytes": None, "path": None}), r"row 2, column .*: expected an image as"),
    "an image that is null": (damaged_png(lambda c: None), r"row 2, column .*: expected an image as"),
    "an image of 16 bits": (
        damaged_png(lambda c: {**c, "bytes": png(np.full((SIZE, SIZE), 4000, np.uint16))}),
        r"row 2, column .*8-bit colours, got mode 'I;16'",
    ),
    "an image of another size": (damaged_png(lambda c: {**c, "bytes": png(np.zeros((8, 8, 3), np.uint8))}), "got 8 x 8 pixels"),
    "an image with alpha": (
        lambda root: cells(
            "data/chunk-000/episode_000001.parquet",
            WRIST,
            lambda v: [
                {"bytes": png(np.dstack([frames_of(4, 1)[WRIST][i], np.full((SIZE, SIZE), 9, np.uint8)])), "path": None}
                for i in range(4)
            ],
        )(root),
        RIGHT,
    ),
    "colours of 16 bits": (
        damaged_png(lambda c: {**c, "bytes": png16(np.full((SIZE, SIZE, 3), 4000, np.uint16))}),
        r"row 2, column .*8-bit colours, got mode 'RGB' of 16 bits",
    ),
    "a grey image": (
        damaged_png(lambda c: {**c, "bytes": png(frames_of(4, 1)[WRIST][2][..., 0])}),
        RIGHT,
    ),
    "an attribute in a path": (info(data_path="{episode_index.real}"), "placeholders .*episode_index.real.*those that exist"),
    "a path of v3": (
        info(data_path="data/{chunk_index:03d}/{file_index:03d}.parquet"),
        "placeholders .*chunk_index.*episode_chunk",
    ),
    "a path that climbs": (info(video_path="../{video_key}{episode_index}"), "'video_path' as a path below the dataset's folder"),
}


def check(root, damage, message, right, monkeypatch):
    """Right samples, or an error of ours raised on purpose; no half-written frames are left."""
    monkeypatch.setenv("RVLM_HOME", str(root.with_name("home")))
    damage(root)
    if message is RIGHT:
        assert_same(samples_of(root), right)
        return
    with pytest.raises(EpisodeError, match=message) as error:
        samples_of(root)
    assert error.traceback[-1].path.is_relative_to(PACKAGE) and error.traceback[-1].statement.lines[0].strip().startswith("raise")
    assert not list(root.with_name("home").glob("frames/*.part"))


@pytest.mark.parametrize("name", V3)
def test_whatever_is_wrong_with_a_dataset_samples_are_right_or_it_is_named(name, sound, right, tmp_path, monkeypatch):
    root = Path(shutil.copytree(sound[0], tmp_path / "demos"))
    check(root, *V3[name], right, monkeypatch)


@pytest.mark.parametrize("name", V21)
def test_whatever_is_wrong_with_an_older_dataset_samples_are_right_or_it_is_named(name, sound, right, tmp_path, monkeypatch):
    root = Path(shutil.copytree(sound[1], tmp_path / "old"))
    check(root, *V21[name], right, monkeypatch)


@pytest.mark.parametrize("version", [0, 1], ids=["v3.0", "v2.1"])
def test_episodes_without_instruction_are_read_with_none_and_counted_once(version, sound, tmp_path):
    """As many of DROID: their task is '' in both tables."""
    root = Path(shutil.copytree(sound[version], tmp_path / "demos"))
    if version:
        for name in ("meta/tasks.jsonl", "meta/episodes.jsonl"):
            text(name, lambda b: b.replace(b'"place"', b'""'))(root)
    else:
        edit_table(root / TASK_TABLE, lambda f: f.rename({"place": ""}))
        edit_table(root / EPISODES, lambda f: f.assign(tasks=[["pick"], [""], ["wipe"], ["open"]]))
    with pytest.warns(UserWarning, match=r"1 of 4 episodes have no instruction .*modify_tasks, or delete_episodes") as told:
        data = EpisodeDataset(root, SPEC)
    assert len(told) == 1
    assert [data.instruction(i) for i in range(4)] == ["pick", "", "wipe", "open"]
    assert Windows(data, 1, 2, [1])[0]["instruction"] == "" and data.episode(1)["instruction"] == ""


MOVED = [SPEC.names[-1], *SPEC.names[:-1]]
SPELT = {
    "upper case": [name.upper() for name in MOVED],
    "blanks": [f" {name}" for name in MOVED],
    "prefix": [f"action.{name}" for name in MOVED],
    "suffix": [f"{name}.pos" for name in MOVED],
    "groups": {"gripper": ["gripper"], "arm": MOVED[1:]},
    "name to place": {name: i for i, name in enumerate(MOVED)},
    "place to name": {str(i): name for i, name in enumerate(MOVED)},
    "nested": [MOVED],
    "a dict within": {"motors": {"names": MOVED}},
    "text": ",".join(MOVED),
}


@pytest.mark.parametrize("names", SPELT.values(), ids=SPELT)
def test_names_in_another_order_are_found_in_any_spelling(names):
    with pytest.raises(EpisodeError, match="'gripper' is dimension 0 there and 6 here"):
        check_order(Path("demos"), "action", names, SPEC.names, SPEC.dataset)


@pytest.mark.parametrize(
    "names, card",
    [
        (["x", "y", "z", "roll", "yaw", "pitch", "gripper"], "dx dy dz droll dpitch dyaw gripper"),  # a displacement's place
        ({"motors": ["x", "y", "z", "rw", "rx", "ry", "rz"]}, "x y z qx qy qz qw"),
        (["x", "y", "z", "pitch", "roll", "yaw"], "x y z rx ry rz"),
        (["main_shoulder_lift", "main_shoulder_pan"], "shoulder_pan shoulder_lift"),
        (["right_x", "left_x"], "left_dx right_dx"),
    ],
)
def test_swapped_dimensions_are_found_under_other_names_of_their_place(names, card):
    with pytest.raises(EpisodeError, match="bring the column into the card's order"):
        check_order(Path("demos"), "action", names, card.split(), "mine")


def test_other_names_of_the_same_places_are_no_contradiction():
    check_order(
        Path("demos"), "action", ["x", "y", "z", "roll", "pitch", "yaw"], ["dx", "dy", "dz", "droll", "dpitch", "dyaw"], "mine"
    )
    check_order(Path("demos"), "state", ["x", "y", "z", "rx", "ry", "rz", "rw"], ["x", "y", "z", "qx", "qy", "qz", "qw"], "mine")
    check_order(Path("demos"), "state", ["main_gripper"], ["gripper"], "mine")


@pytest.mark.parametrize(
    "chosen",
    [np.array([True, False, True, True]), [True, False], [0.0, 1.0], [1.5], "12", ["0", "1"], 2, [[0, 1]], [None]],
    ids=str,
)
def test_episodes_are_chosen_by_whole_numbers_alone(chosen, sound):
    with pytest.raises(EpisodeError, match="expected numbers of episodes"):
        EpisodeDataset(sound[0]).validate_episodes(chosen)


def test_episodes_are_chosen_by_any_collection_of_whole_numbers(sound):
    dataset = EpisodeDataset(sound[0])
    for chosen in ([2, 0, 2], {0, 2}, np.array([0, 2], np.uint8), (i for i in (0, 2)), range(0, 4, 2), pd.Series([0, 2])):
        assert dataset.validate_episodes(chosen).tolist() == [0, 2]
    for odd in (1.5, "1", None, True, 9, -1):
        with pytest.raises(EpisodeError, match="expected an episode from 0 to 3"):
            dataset.instruction(odd)


def test_an_episode_of_several_tasks_has_the_instructions_of_its_rows(sound, tmp_path, monkeypatch):
    """The table names its tasks in whatever order."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    root = Path(shutil.copytree(sound[0], tmp_path / "demos"))
    edit_table(root / EPISODES, lambda f: f.assign(tasks=[["open", "pick"], ["place"], ["wipe"], ["open"]]))
    dataset = EpisodeDataset(root)
    assert dataset.instruction(0) == dataset.episode(0)["instruction"] == Windows(dataset)[0]["instruction"] == "pick"


# --- what is right and stays so ---------------------------------------------------------------------------------------------


def test_links_inside_a_dataset_may_lead_out_of_it(sound, right, tmp_path, monkeypatch):
    """The Hub's own cache is made of links to files elsewhere."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    for path in (p for p in sound[0].rglob("*") if p.is_file()):
        link = tmp_path / "linked" / path.relative_to(sound[0])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert_same(samples_of(tmp_path / "linked"), right)


def test_a_given_card_says_what_the_stored_one_says(sound):
    assert EpisodeDataset(sound[0], "tabletop_franka7").spec == SPEC
    assert EpisodeDataset(sound[0], dataclasses.replace(SPEC, cameras=SPEC.cameras[:1])).cameras == SPEC.cameras[:1]
    with pytest.raises(
        EpisodeError, match=r"stored card vs given card: 1 convention.*action group 0 frame: world against base.*fix rvlm.spec"
    ):
        EpisodeDataset(sound[0], SPEC.replace_group("action", 0, frame="base"))
    with pytest.raises(EpisodeError, match=r"as an ActionSpec .*got dict; ActionSpec.from_card"):
        EpisodeDataset(sound[0], SPEC.to_dict())


def test_a_name_on_the_hub_is_answered_with_what_is_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EpisodeError, match=r"looks like a name on the Hub: hf download lerobot/pusht --repo-type dataset"):
        EpisodeDataset("lerobot/pusht")
    with pytest.raises(EpisodeError, match="there is no such folder; is the path right"):
        EpisodeDataset(tmp_path / "a/b/c")


def test_few_episodes_can_be_trained_on(tmp_path):
    two, one = (record(tmp_path / str(n), LENGTHS[:n], TASKS[:n]) for n in (2, 1))
    assert [len(side) for side in split(EpisodeDataset(two))] == [1, 1]
    with pytest.raises(EpisodeError, match="expected at least 2 episodes, one to train on and one held out, got 1"):
        split(EpisodeDataset(one))


def test_other_columns_keep_their_kinds(sound, tmp_path):
    """Flags, texts, nested numbers and columns without a shape come as they were recorded."""
    root = Path(shutil.copytree(sound[0], tmp_path / "demos"))
    kinds = {"next.done": ("bool", [1]), "note": ("string", [1]), "force": ("float64", [2, 3]), "reward": ("float32", [])}
    edit_info(
        root, lambda i: i["features"].update({k: {"dtype": d, "shape": s, "names": {"a": None}} for k, (d, s) in kinds.items()})
    )
    n = [pq.read_metadata(root / DATA.format(i)).num_rows for i in (0, 1)]
    for i in (0, 1):
        set_cells(root / DATA.format(i), "next.done", [False] * (n[i] - 1) + [True])
        set_cells(root / DATA.format(i), "note", ["抓取", "grüß dich 🙂"] + ["ارفع"] * (n[i] - 2))
        set_cells(
            root / DATA.format(i), "force", np.arange(6 * n[i]).reshape(n[i], 2, 3).tolist(), pa.list_(pa.list_(pa.float64()))
        )
        set_cells(root / DATA.format(i), "reward", [0.5] * n[i], pa.float32())
    dataset = EpisodeDataset(root)
    assert dataset.column("next.done").dtype == bool and dataset.column("next.done").sum() == 2
    assert dataset.column("note")[[0, 1, 10]].tolist() == ["抓取", "grüß dich 🙂", "抓取"]
    assert dataset.column("force").shape == (18, 6) and dataset.column("force")[2].tolist() == list(range(12, 18))
    assert dataset.column("reward").shape == (18, 1) and dataset.episode(2)["note"][0] == "抓取"


def test_language_is_read_as_it_is(sound, tmp_path):
    root = Path(shutil.copytree(sound[0], tmp_path / "demos"))
    language(root)
    events = EpisodeDataset(root).episode(0)["language_events"]
    assert events[0][0]["content"] == "the other one" and events[1] == []


@pytest.mark.parametrize(("camera", "images", "key"), [
    ("wrist", ["observation.images.wrist", "observation.depth.wrist"], "observation.images.wrist"),
    ("wrist", ["observation.depth.wrist", "observation.images.wrist"], "observation.images.wrist"),
    ("top", ["observation.images.rgb.top", "observation.images.depth.top"], "observation.images.rgb.top"),
    ("top", ["cam.top_depth", "cam.top"], "cam.top"),
    ("left.rgb", ["left.rgb", "right.rgb"], "left.rgb"),
    ("images.left.rgb", ["images.left.rgb", "right.rgb"], "images.left.rgb"),
    ("rgb", ["left.rgb", "right.rgb"], None),
    ("top", ["observation.depth.top"], None),
    ("depth.top", ["observation.depth.top"], None),
    ("wrist", ["wristDepth", "DEPTH.wrist", "depth1.wrist", "wrist.mask", "cam.wrist"], "cam.wrist"),
    ("depthai", ["cam.depthai"], "cam.depthai"),
])  # fmt: skip
def test_a_camera_is_found_by_its_name_or_refused(camera, images, key):
    features = {name: {"dtype": "video", "shape": [4, 4, 3]} for name in images}
    if key is not None:
        assert find_camera(Path("demos"), features, camera) == key
        return
    with pytest.raises(EpisodeError, match=f"camera '{camera}'.*({'|'.join(images)})"):
        find_camera(Path("demos"), features, camera)


# --- what is recorded -------------------------------------------------------------------------------------------------------

REFUSED = {
    "an index of the format": (dict(index=np.arange(4)), {}, "other than .*which the format adds itself; got 'index'"),
    "a timestamp": (dict(timestamp=np.arange(4.0)), {}, "got 'timestamp'"),
    "a name that is a path": ({"a/b": np.arange(4)}, {}, "got 'a/b'"),
    "a list": (dict(action=[[0.0] * 7] * 4), {}, "action: expected a numpy array .*got list"),
    "nothing": (dict(note=None), {}, "note: expected a numpy array .*got NoneType"),
    "one number": (dict(force=np.array(3.0)), {}, r"force: expected a numpy array .*shape \(\)"),
    "no number": (dict(force=np.zeros((4, 0))), {}, "force: expected at least one value a frame"),
    "another order of bytes": (dict(force=np.zeros(4, ">f4")), {}, "force: expected .*this machine's order of bytes"),
    "half a letter": ({}, dict(instruction="pick \ud83d"), "lone surrogate"),
    "zeros": ({}, dict(instruction="\0"), "holds a zero character"),
    "no words": ({}, dict(instruction="\u200b "), "holds no word"),
    "an extra of another kind": (
        {},
        dict(extra={"seed": "nine"}),
        "expected 'seed' as a number, as in the episodes before, got text",
    ),
    "a huge extra": ({}, dict(extra={"seed": 2**70}), "expected scalars"),
    "an extra that is a date": ({}, dict(extra={"at": np.datetime64("2026-01-01")}), "expected scalars"),
    "an extra named by a number": ({}, dict(extra={3: 4}), "expected scalars under names .*got 3"),
    "an extra that is a list": ({}, dict(extra={"at": [1]}), "expected scalars"),
    "half a letter as extra": ({}, dict(extra={"at": "\ud83d"}), "expected scalars"),
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    with EpisodeWriter(tmp_path_factory.mktemp("writer") / "demos", SPEC) as writer:
        writer.add_episode(frames_of(4, 0), "pick", {"seed": np.int64(3), "ok": True})
        yield writer
    assert EpisodeDataset(writer.root).episodes["seed"].tolist() == [3]


@pytest.mark.parametrize("name", REFUSED)
def test_unwritable_episodes_are_refused_by_add_episode(name, writer):
    columns, more, message = REFUSED[name]
    with pytest.raises(EpisodeError, match=message) as error:
        writer.add_episode({**frames_of(4, 1), **columns}, **{"instruction": "pick", **more})
    assert error.traceback[-1].path.is_relative_to(PACKAGE)


# --- statistics, tokens and numbers of cards -----------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value", "message"), [
    ("q01", [np.nan] * 7, "expected 'q01' as .* finite numbers"),
    ("q99", [0.0, 1.0], "expected 'q99' as .* finite numbers"),
    ("q01", [99.0] * 7, "expected q01 <= q99"),
    ("passthrough", [7], "expected 'passthrough' from 0 to 6"),
    ("passthrough", [-1], "expected 'passthrough' from 0 to 6"),
])  # fmt: skip
def test_impossible_statistics_are_refused(field, value, message, sound):
    stats = EpisodeDataset(sound[0]).stats()["action"]
    with pytest.raises(SpecMismatch, match=message):
        NormStats.from_dict({**stats.to_dict(), field: value})
    with pytest.raises(SpecMismatch, match="statistics of 7 dimensions"):
        stats.normalize(np.zeros((2, 6)))


def test_tokens_are_made_of_numbers_and_from_ids():
    for wrong in (lambda: ActionTokenizer([False], 0), lambda: ActionTokenizer(SPEC.is_binary).encode(np.full(7, np.nan))):
        with pytest.raises(SpecMismatch, match="expected"):
            wrong()
    for ids in ([256] * 7, [-1] * 7, [1.5] * 7):
        with pytest.raises(SpecMismatch, match="expected token ids from 0 to 255"):
            ActionTokenizer(SPEC.is_binary).decode(np.array(ids))


@pytest.mark.parametrize("number", ["010", "1:30", "1" * 401])
def test_a_number_that_yaml_reads_otherwise_is_named(number, tmp_path):
    source = (CARDS / "tabletop_franka7.md").read_text()
    (tmp_path / "mine.md").write_text(re.sub("rate_hz: .*", f"rate_hz: {number}", source))
    with pytest.raises(CardError, match="rate_hz"):
        ActionSpec.from_card(tmp_path / "mine.md")


# --- several recordings of one robot ----------------------------------------------------------------------------------------


def scaled(root, scale, seed):
    writer = EpisodeWriter(root, SPEC)
    for i in range(3):
        frames = frames_of(6, seed + i)
        frames["action"][:, :6] *= scale
        writer.add_episode(frames, "pick")
    return EpisodeDataset(writer.finalize())


def test_folders_under_one_card_share_statistics_of_all(tmp_path):
    from rvlm.training.stage_data import _embodiments

    sets = [scaled(tmp_path / "small", 0.02, 0), scaled(tmp_path / "large", 1.0, 50)]
    train = [np.array([0, 1]), np.array([1, 2])]
    small, large = _embodiments(sets, train)
    assert small.stats["action"].to_dict() == large.stats["action"].to_dict() and small.stats["action"].count == 24
    both = np.concatenate([sets[0].column("action")[:12], sets[1].column("action")[6:]])
    assert np.allclose(small.stats["action"].q99, np.quantile(both.astype(float), 0.99, axis=0))
    assert np.abs(small.stats["action"].normalize(sets[1].column("action"))).max() < 5


def test_folders_under_one_card_of_other_conventions_are_refused(tmp_path):
    one, two = scaled(tmp_path / "one", 1.0, 0), scaled(tmp_path / "two", 1.0, 50)
    two.spec = SPEC.replace_group("action", 0, frame="base")
    with pytest.raises(SpecMismatch, match=r"one vs .*two: 1 convention\(s\) differ: action group 0 frame: world against base"):
        pooled_stats([(one, np.arange(3)), (two, np.arange(3))])


def test_a_nearly_constant_state_warns(tmp_path):
    frames = frames_of(400, 0)
    frames["observation.state"][:, 3] = np.random.default_rng(0).normal(0, 1e-5, 400)
    frames["observation.state"][::200, 3] = 2.0
    writer = EpisodeWriter(tmp_path / "demos", SPEC)
    writer.add_episode(frames, "pick")
    with pytest.warns(UserWarning, match=r"observation.state: 'roll' reaches 400 in normalised units, as it hardly ever moves"):
        EpisodeDataset(writer.finalize()).stats()
