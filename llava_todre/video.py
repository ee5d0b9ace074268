"""Frames of a video file, evenly spaced over the whole clip, decoded with PyAV."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from llava_todre.errors import TodreError

_KEPT_CLIPS = 8
"""Questions about one clip follow each other."""


class Clip(NamedTuple):
    """Frames of a video."""

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    """When each is seen, from the first frame of the file; empty where the file does not tell."""


_NOTHING = Clip((), ())


@lru_cache(maxsize=_KEPT_CLIPS)
def read_clip(path: str, count: int, version: object = None) -> Clip:
    """Return ``count`` frames from the first to the last; all of them if there are not more.

    Frame i of n is number ``floor(i * (total - 1) / (n - 1))``, counted in the order of display.
    Equal calls give the same objects for a while.

    Args:
        path: the file.
        count: how many frames, at least 1.
        version: anything that changes when the file does.

    Raises:
        TodreError: PyAV is missing, or the file is, or it holds no video that can be decoded.
    """
    del version
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
        # Its own time would not do: a frame may be stored behind a later one it is drawn from.
        before = [start for start, is_start in marks if is_start and start <= time]
        container.seek(before[-1] if before else time, stream=stream)
        frame = next((f for f in container.decode(stream) if (f.pts or 0) >= time), None)
        if frame is None or frame.pts != time:
            return _NOTHING
        frames.append(frame.to_image())
    return Clip(tuple(frames), tuple(seconds))


def _by_number(container: Any, count: int) -> Clip:
    """Decode everything twice, to count the frames and to take some: slow, and always right."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    total = sum(1 for _ in container.decode(stream))
    numbers = spaced(total, count) if total else []
    container.seek(0)
    frames = tuple(
        frame.to_image()
        for number, frame in enumerate(container.decode(stream))
        if number in set(numbers)
    )
    rate = stream.average_rate
    return Clip(frames, tuple(float(number / rate) for number in numbers) if rate else ())
