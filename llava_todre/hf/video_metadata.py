"""When the frames of a video are seen, as the processors of transformers want to know it.

Qwen3-VL writes the time of every two frames into the prompt, Qwen2.5-VL turns time into positions.
Left alone, their processors take the frames for neighbours in a video of 24 frames per second.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers.video_utils import VideoMetadata

from llava_todre.errors import TodreError
from llava_todre.request import Request

TIMED = ("qwen2_5_vl", "qwen3_vl")
"""Types of models for which it matters."""
_CLOCK = 1000
"""Ticks per second: what the processors call frames of the file."""


def metadata_of(videos: Sequence[Request], model_type: str) -> list[VideoMetadata] | None:
    """Return what a processor needs to know about videos; None where the model does not read time.

    Raises:
        TodreError: the model reads time and a request does not give it, or not for every frame.
    """
    return [_metadata(video, model_type) for video in videos] if model_type in TIMED else None


def _metadata(video: Request, model_type: str) -> VideoMetadata:
    num_frames, seconds = len(video.images), list(video.seconds)
    if len(seconds) != num_frames or any(
        later < earlier for earlier, later in zip(seconds, seconds[1:], strict=False)
    ):
        raise TodreError(
            f"seconds must be {num_frames} ascending numbers, one per frame, for models of type "
            f"{model_type}, got {seconds} (--fps in a shell)."
        )
    apart = (seconds[-1] - seconds[0]) / (num_frames - 1) if num_frames > 1 else 1.0
    return VideoMetadata(
        # Not of the file: so that processors find the mean distance of the frames that are shown.
        total_num_frames=max(1, round(_CLOCK * apart * num_frames)),
        fps=_CLOCK,
        frames_indices=[round(_CLOCK * second) for second in seconds],
    )
