"""Frames of a video file, evenly spaced over the whole clip, decoded with PyAV.

Frames are as a player shows them: turned and mirrored as the file's display matrix says, and with
square pixels.
"""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llava_todre.errors import TodreError
from llava_todre.files import check_regular

_KEPT_CLIPS = 8
"""Questions about one clip follow each other."""


class Clip(NamedTuple):
    """Frames of a video."""

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    """When each is seen, from the first frame of the file; empty where the file does not tell."""


_NOTHING = Clip((), ())
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""What to do for the signs of a, b, c, d, where (x, y) is shown at (ax + cy, bx + dy)."""
_MOST_ELONGATED = 10
"""Pixels further from a square are a fault of the file."""


@lru_cache(maxsize=_KEPT_CLIPS)
def read_clip(path: str, count: int, version: object = None) -> Clip:
    """Return ``count`` frames from the first to the last; all of them if there are not more.

    Frame i of n is number ``floor(i * (total - 1) / (n - 1))``, counted in the order of display.
    Equal calls give the same objects for a while.

    Args:
        path: the file; ``~`` is the home directory.
        count: how many frames, at least 1.
        version: anything that changes when the file does.

    Raises:
        TodreError: PyAV is missing, or the file is, or it is a pipe or a device, or holds no video
            that can be decoded; or ``count`` is no whole number above 0.
    """
    del version
    if not isinstance(count, int) or count < 1:
        raise TodreError(f"count of frames must be a whole number above 0, got {count!r}.")
    if not isinstance(path, (str, os.PathLike)):
        raise TodreError(f"video must be a path, got {type(path).__name__}.")
    path = os.path.expanduser(path)
    if not os.path.exists(path):  # FFmpeg would take an address for what it is
        raise TodreError(f"video {path!r} does not exist; give a file.")
    check_regular(path, "video")
    try:
        import av
    except ImportError:
        raise TodreError("a video needs PyAV: pip install 'llava-todre[video]'.") from None
    try:
        with av.open(path) as container:
            clip = _by_time(container, count) if container.streams.video else _NOTHING
        if not clip.frames:
            with av.open(path) as container:
                clip = _by_number(container, count) if container.streams.video else _NOTHING
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TodreError(f"video {path!r} cannot be read: {reason}.") from None
    if not clip.frames:
        raise TodreError(f"video {path!r} holds no frame; give a video file.")
    return clip


def is_video_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as videos do: MP4, MOV, WebM, MKV or AVI."""
    with Path(path).open("rb") as file:
        start = file.read(16)
    if start[:4] == b"RIFF":
        return start[8:12] == b"AVI "
    old_quicktime = start[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip")
    return start[4:8] == b"ftyp" or old_quicktime or start[:4] == b"\x1a\x45\xdf\xa3"


def pixel_aspect(stream: Any) -> Fraction:
    """Return width / height of the pixels of a video stream as they are stored; 1 if unknown."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if 1 / _MOST_ELONGATED <= aspect <= _MOST_ELONGATED else Fraction(1)


def spaced(total: int, count: int) -> list[int]:
    """Return ``count`` of the numbers 0 to ``total - 1``, evenly spaced; all if not more."""
    steps = min(count, total) - 1
    return [step * (total - 1) // steps for step in range(steps + 1)] if steps > 0 else [0]


def _by_time(container: Any, count: int) -> Clip:
    """Seek to each frame; returns none when the file's times do not say where a frame is."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # Packets are read, not decoded: their times are those of the frames, in order of decoding.
    packets = ((packet.pts, packet.is_keyframe) for packet in container.demux(stream))
    marks = sorted((time, is_start) for time, is_start in packets if time is not None)
    times = [time for time, _ in marks]
    frames, seconds = [], []
    for number in spaced(len(times), count) if times else ():
        time = times[number]
        seconds.append(float((time - times[0]) * stream.time_base))
        # Its own time would not do: a frame may be stored after a later one it is drawn from.
        before = [start for start, is_start in marks if is_start and start <= time]
        container.seek(before[-1] if before else time, stream=stream)
        frame = next((f for f in container.decode(stream) if (f.pts or 0) >= time), None)
        if frame is None or frame.pts != time:
            return _NOTHING
        frames.append(_as_shown(frame, stream))
    return Clip(tuple(frames), tuple(seconds))


def _by_number(container: Any, count: int) -> Clip:
    """Decode everything twice, to count the frames and to take some: slow, and always right."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    total = sum(1 for _ in container.decode(stream))
    numbers = spaced(total, count) if total else []
    container.seek(0)
    frames = tuple(
        _as_shown(frame, stream)
        for number, frame in enumerate(container.decode(stream))
        if number in set(numbers)
    )
    rate = stream.average_rate
    return Clip(frames, tuple(float(number / rate) for number in numbers) if rate else ())


def _as_shown(frame: Any, stream: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    width = max(1, round(image.width * pixel_aspect(stream)))
    if width != image.width:
        image = image.resize((width, image.height))
    turn = _TURNS.get(_axes(frame))
    return image if turn is None else image.transpose(turn)


def _axes(frame: Any) -> tuple[int, int, int, int]:
    """Return a, b, c, d of the nearest quarter turn, mirrored or not, of a frame's display matrix.

    The matrix is three rows of three 32-bit numbers: (a, b, u), (c, d, v), (x, y, w).
    """
    matrix = next((d for d in frame.side_data if d.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    is_upright = abs(a) + abs(d) >= abs(b) + abs(c)
    signs = [(value > 0) - (value < 0) for value in (a, b, c, d)]
    return (signs[0], 0, 0, signs[3]) if is_upright else (0, signs[1], signs[2], 0)
