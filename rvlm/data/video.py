"""Encoding and decoding of mp4 videos with PyAV (which includes ffmpeg).

Policies are trained on decoded frames and evaluated on raw ones, and the frames are small, so quality matters more than size:
full chroma and a low quantiser. Measured on moving coloured blocks at 64 px (preset veryfast, a key frame every 10):

    pixel format  crf   PSNR mean (worst frame)   bytes per frame
    yuv444p       8     46.5 dB (44.1)            465
    yuv444p       12    44.2 dB (40.8)            350
    yuv420p       12    31.7 dB (27.3)            364     halved chroma: colours of small objects bleed

yuv444p at crf 8 is used. Each episode starts with a key frame, so that it decodes without its neighbours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image

from rvlm.data.errors import EpisodeError

CODEC, PIX_FMT = "libx264", "yuv444p"
OPTIONS = {"crf": "8", "g": "10", "bf": "0", "preset": "veryfast"}
FETCH_AGAIN = "fetch the file again, or record it again"
COLOUR_MODES = {"RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr"}


class VideoWriter:
    """Write episodes ``(n, h, w, 3)`` uint8 to one mp4 file."""

    def __init__(self, path: Path, fps: float, height: int, width: int) -> None:
        self._container = av.open(str(path), "w")
        self._rate = Fraction(fps).limit_denominator(1000)
        self._stream = self._container.add_stream(CODEC, rate=self._rate, options=OPTIONS)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, PIX_FMT
        self._stream.thread_count = 1
        self.n_frames = 0

    def add(self, frames: np.ndarray) -> None:
        """Append one episode."""
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=PIX_FMT)
            frame.pts, frame.time_base = self.n_frames, 1 / self._rate
            frame.pict_type = PictureType.I if i == 0 else PictureType.NONE
            self._container.mux(self._stream.encode(frame))
            self.n_frames += 1

    def close(self) -> None:
        """Flush the encoder and write the file's index."""
        self._container.mux(self._stream.encode())
        self._container.close()


def concatenate(sources: Sequence[Path], target: Path, fps: float) -> None:
    """Concatenate mp4 files of `VideoWriter`, of one rate and size, without re-encoding."""
    rate, n_frames, stream = Fraction(fps).limit_denominator(1000), 0, None
    with av.open(str(target), "w") as out:
        for source in sources:
            with av.open(str(source)) as part:
                stream = stream or out.add_stream_from_template(part.streams.video[0])
                for packet in (p for p in part.demux(part.streams.video[0]) if p.dts is not None):
                    packet.pts = packet.dts = n_frames  # without B-frames, decoding order is presentation order
                    packet.time_base, packet.stream = 1 / rate, stream
                    out.mux(packet)
                    n_frames += 1


def frame_times(path: Path) -> tuple[np.ndarray, Fraction]:
    """Presentation times of a video's frames, sorted, in ticks ``(n,)`` int64; and the duration of one tick [s].

    From packets, without decoding.
    """
    with _opened(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets or any(p.pts is None for p in packets) or not stream.time_base:
            raise EpisodeError(f"{path}: expected a time with each video frame, got {len(packets)} frames; {FETCH_AGAIN}")
        return np.sort(np.array([p.pts for p in packets], np.int64)), Fraction(stream.time_base)


def decode_frames(path: Path, ticks: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(i, image)`` for the frames at ``ticks`` (sorted), images ``(h, w, 3)`` uint8.

    Raises:
        EpisodeError: a frame cannot be decoded, or the images are not 8-bit colours.
    """
    index = {tick: i for i, tick in enumerate(ticks.tolist())}
    for start in dict.fromkeys((int(ticks[0]), None)):  # from the beginning if the file's index is wrong
        for i, image in _decode_from(path, start, int(ticks[-1]), index):
            del index[int(ticks[i])]
            yield i, image
        if not index:
            return
    raise EpisodeError(
        f"{path}: {len(index)} of {len(ticks)} frames can't be decoded, the first at {min(index)} ticks; {FETCH_AGAIN}"
    )


def _decode_from(path: Path, start: int | None, last: int, index: dict[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    reformatter = VideoReformatter()  # one for all frames, as each sets up its own colour conversion
    with _opened(path) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts in index and not frame.is_corrupt:
                yield index[frame.pts], _colours(path, frame, reformatter)
            if frame.pts is not None and frame.pts >= last:
                return


def _colours(path: Path, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    parts = frame.format.components
    if len(parts) == 1 and parts[0].bits > 8:
        raise EpisodeError(
            f"{path}: expected colours, got greys of {parts[0].bits} bits ({frame.format.name}): a depth map? mark it as "
            "'is_depth_map' in info.json, or convert it to 8-bit colours"
        )
    return reformatter.reformat(frame, format="rgb24").to_ndarray()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video file and its stream; an unreadable file is an `EpisodeError` that names it."""
    try:
        with av.open(str(path)) as container:
            yield container, container.streams.video[0]
    except (av.FFmpegError, IndexError, UnicodeError) as error:
        have = ", ".join(sorted(p.name for p in path.parent.glob("*.mp4"))) or "no mp4 file"
        raise EpisodeError(f"expected a whole mp4 file at {path}, got: {error}; beside it: {have}; {FETCH_AGAIN}") from error


def decode_image(cell: Any, where: str) -> np.ndarray:
    """An image embedded in parquet as ``{bytes, path}`` -> ``(h, w, 3)`` uint8."""
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(data, bytes):
        raise EpisodeError(
            f"{where}: expected an image as {{bytes, path}} with its bytes, got {str(cell)[:80]}; convert it again"
        )
    try:
        image = Image.open(io.BytesIO(data))
        is_deep = ";16" in str(image.tile)  # only the high byte would be used
        image.load()
    except Exception as error:  # OSError, SyntaxError, struct.error, ..., depending on the format
        raise EpisodeError(f"{where}: expected a whole image, got: {error}; {FETCH_AGAIN}") from error
    if image.mode not in COLOUR_MODES or is_deep:
        raise EpisodeError(
            f"{where}: expected an image of 8-bit colours, got mode {image.mode!r}{' of 16 bits' * is_deep}: a depth map? mark "
            "the feature as 'is_depth_map' in info.json, or convert it to 8-bit colours"
        )
    return np.asarray(image.convert("RGB"))
