"""Frames to mp4 and back, through PyAV (which brings its own ffmpeg).

Policies are trained on decoded frames and evaluated on raw ones, and the frames are small, so fidelity comes before size:
full chroma and a low quantiser. Measured on moving coloured blocks at 64 px (preset veryfast, a key frame every 10):

    pixel format  crf   PSNR mean (worst frame)   bytes a frame
    yuv444p       8     46.5 dB (44.1)            465
    yuv444p       12    44.2 dB (40.8)            350
    yuv420p       12    31.7 dB (27.3)            364     halved chroma: small coloured things bleed

yuv444p at crf 8 is used. Each episode starts with a key frame, so that reading one does not decode its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType

CODEC, PIX_FMT = "libx264", "yuv444p"
OPTIONS = {"crf": "8", "g": "10", "bf": "0", "preset": "veryfast"}


class EpisodeError(ValueError):
    """Recorded data is broken, or isn't what was asked for; says what was expected, what came, and the mend."""


class VideoWriter:
    """One mp4 file that takes episodes ``(n, h, w, 3)`` uint8, one after the other."""

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
        """Flush the encoder and write the index, without which the file can't be read."""
        self._container.mux(self._stream.encode())
        self._container.close()


def concatenate(sources: Sequence[Path], target: Path, fps: float) -> None:
    """One mp4 file of the frames of several that `VideoWriter` wrote at this rate and one size, in order and as they are."""
    rate, n_frames, stream = Fraction(fps).limit_denominator(1000), 0, None
    with av.open(str(target), "w") as out:
        for source in sources:
            with av.open(str(source)) as part:
                stream = stream or out.add_stream_from_template(part.streams.video[0])
                for packet in (p for p in part.demux(part.streams.video[0]) if p.dts is not None):
                    packet.pts = packet.dts = n_frames  # without B-frames they are decoded in the order that they are shown in
                    packet.time_base, packet.stream = 1 / rate, stream
                    out.mux(packet)
                    n_frames += 1


def read_frames(path: Path, start: int, length: int, fps: float) -> np.ndarray:
    """Frames ``start`` to ``start + length`` of an mp4 file, decoded to ``(length, h, w, 3)`` uint8.

    Raises:
        EpisodeError: the file is not readable, or holds fewer frames than asked for.
    """
    frames = []
    for index, image in iterate_frames(path, start, fps):
        if index >= start + length:
            break
        frames.append(image)
    if len(frames) != length:
        raise EpisodeError(
            f"expected {length} frames from frame {start} in {path}, got {len(frames)}; "
            "the video and the parquet tables disagree: record the episode again, or fetch the file again"
        )
    return np.stack(frames)


def iterate_frames(path: Path, start: int, fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(index, image)`` from frame ``start`` to the end of the file; each image is ``(h, w, 3)`` uint8."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames_per_tick = Fraction(stream.time_base or 0) * Fraction(fps)
            if start:
                container.seek(int(start / frames_per_tick), stream=stream)
            for frame in container.decode(stream):
                index = round((frame.pts or 0) * frames_per_tick)
                if index >= start:
                    yield index, frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        have = ", ".join(sorted(p.name for p in path.parent.glob("*.mp4"))) or "no mp4 file"
        raise EpisodeError(
            f"expected a whole mp4 file at {path}, got: {error}; beside it: {have}; fetch the file again, or record it again"
        ) from error
