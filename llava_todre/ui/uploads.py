"""Reading uploads: one image, or one short video; anything else is a clear error.

The format is read from the first bytes, never from the name. That also excludes formats that make
decoders open other files or addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_todre.errors import TodreError
from llava_todre.files import check_regular
from llava_todre.model.images import MAX_FILE_PIXELS, decode_image
from llava_todre.model.sources import MAX_BYTES
from llava_todre.video import is_video_file, pixel_aspect, read_clip

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
VIDEO_FORMATS = ("MP4", "MOV", "WebM", "MKV", "AVI")
_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The largest upload that is read."""

    image_bytes: int = MAX_BYTES
    video_bytes: int = 100 * _MIB
    pixels: int = MAX_FILE_PIXELS
    """Of an image."""
    frame_pixels: int = 4096 * 2304
    """Of each frame of a video."""
    seconds: float = 120.0
    frames: int = 7_500
    """Stored in a video; fewer are shown to the model."""
    total_bytes: int = 1024 * _MIB
    """Of all uploads that are kept at one time, whoever sent them."""


LIMITS = Limits()


@dataclass(frozen=True)
class Upload:
    """One image, or the frames of one video."""

    images: Sequence[Image.Image]
    """RGB, upright; frames in order."""
    is_video: bool = False
    seconds: Sequence[float] = ()
    """Time stamp of each frame; empty where not known."""


def read_upload(path: str | Path, num_frames: int, limits: Limits = LIMITS) -> Upload:
    """Return what a file holds.

    Args:
        path: the file; messages give its last part only.
        num_frames: how many frames of a video, evenly spaced; all if there are not more.
        limits: what is refused.

    Raises:
        TodreError: too large, of another kind, damaged or empty.
    """
    path = Path(path)
    check_regular(path, "file")
    try:
        size, is_video = path.stat().st_size, is_video_file(path)
    except OSError as error:
        raise TodreError(f"file {path.name!r} cannot be read: {error.strerror}.") from None
    if size == 0:
        raise TodreError(f"file {path.name!r} must be {_EXPECTED}, got an empty file.")
    most = limits.video_bytes if is_video else limits.image_bytes
    if size > most:
        kind = "a video" if is_video else "an image"
        raise TodreError(
            f"file {path.name!r} must have at most {most / _MIB:g} MiB as {kind}, got "
            f"{size / _MIB:.1f} MiB."
        )
    if not is_video:
        return Upload([_read_image(path, limits)])
    _check_video(path, limits)
    try:
        # Uncached: visitors' videos are large, and used once or twice.
        clip = read_clip.__wrapped__(str(path), num_frames)
        return Upload(clip.frames, is_video=True, seconds=clip.seconds)
    except TodreError as error:
        raise TodreError(str(error).replace(str(path), path.name)) from None


_EXPECTED = f"an image ({', '.join(IMAGE_FORMATS)}) or a short video ({', '.join(VIDEO_FORMATS)})"


def _read_image(path: Path, limits: Limits) -> Image.Image:
    try:
        return decode_image(path, repr(path.name), IMAGE_FORMATS, limits.pixels)
    except Image.UnidentifiedImageError:
        raise TodreError(f"file {path.name!r} must be {_EXPECTED}, got something else.") from None


def _check_video(path: Path, limits: Limits) -> None:
    """Check the packets of a video without decoding any."""
    try:
        import av
    except ImportError:
        raise TodreError("a video needs PyAV: pip install 'llava-todre[video]'.") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise TodreError(f"video {path.name!r} must have images, got only sound or text.")
            stream = container.streams.video[0]
            width = round(stream.codec_context.width * pixel_aspect(stream))
            height = stream.codec_context.height
            if width * height > limits.frame_pixels:
                raise TodreError(
                    f"video {path.name!r} must have frames of at most "
                    f"{limits.frame_pixels / 1e6:.1f} million pixels, got {width} x {height}."
                )
            count, first, last = 0, None, 0.0
            for packet in container.demux(stream):
                count += packet.size > 0
                if packet.pts is not None:
                    time = float(packet.pts * packet.time_base)
                    first, last = time if first is None else first, max(time, last)
                if count > limits.frames or last - (first or 0.0) > limits.seconds:
                    raise TodreError(
                        f"video {path.name!r} must have at most {limits.seconds:g} seconds and "
                        f"{limits.frames} frames, got more."
                    )
            if count == 0:
                raise TodreError(f"video {path.name!r} must have at least one frame, got none.")
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TodreError(f"video {path.name!r} is damaged: {reason}.") from None
