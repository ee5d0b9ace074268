"""The kept tokens of an answer, drawn on the upload."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from PIL import Image

from llava_todre.stats import ImageStats, PruneStats
from llava_todre.ui.uploads import Upload
from llava_todre.viz import contact_sheet, draw_kept, token_boxes
from llava_todre.viz import kept_picture as kept_of_image

_FRAME_PIXELS = 224
"""Longest side of a small image, and of one frame, when drawn."""
_COLUMNS = 4
# A frame is resized and cropped to one view, as in llava_todre.vlm.
_FRAME = SimpleNamespace(image_aspect_ratio="square")


def preview(upload: Upload) -> Image.Image:
    """Return a small view of an upload: the image, or the frames in rows."""
    if not upload.is_video:
        small = upload.images[0].copy()
        small.thumbnail((800, 800))
        return small
    cells = [(f"frame {i}", _small(frame)) for i, frame in enumerate(upload.images, start=1)]
    return contact_sheet(_rows(cells), f"{len(cells)} frames, evenly spaced")


def kept_picture(upload: Upload, stats: PruneStats, model: Any) -> Image.Image:
    """Return the image, or the frames in rows, with dropped tokens dimmed.

    Args:
        upload: the image or video.
        stats: of the answer.
        model: our class, for its config and the size of its views.
    """
    tile = model.get_vision_tower().config.image_size
    if not upload.is_video:
        (image,) = upload.images
        return kept_of_image(image, stats.images[0], model)
    cells = []
    for index, frame in enumerate(upload.images):
        of_frame = frame_stats(stats.images[0], index)
        boxes = token_boxes(of_frame, frame.size, _FRAME, tile)
        scale = _FRAME_PIXELS / max(frame.size)
        title = f"frame {index + 1}: {len(of_frame.keep_idx)} of {of_frame.num_tokens}"
        cells.append((title, draw_kept(frame, boxes, of_frame, scale)))
    return contact_sheet(_rows(cells), "Visual tokens kept before the decoder")


def frame_stats(video: ImageStats, index: int) -> ImageStats:
    """Return the statistics of one frame, as of a separate image.

    Args:
        video: of the whole video.
        index: 0-based number of the frame.
    """
    per_view = video.side**2
    (places,) = (video.patches // per_view == index).nonzero(as_tuple=True)  # ascending
    kept = (places[:, None] == video.keep_idx[None]).any(dim=1).nonzero()[:, 0]
    return ImageStats(video.patches[places] % per_view, video.side, kept)


def _small(frame: Image.Image) -> Image.Image:
    scale = _FRAME_PIXELS / max(frame.size)
    return frame.resize([max(1, round(side * scale)) for side in frame.size])


def _rows(
    cells: list[tuple[str, Image.Image]],
) -> list[list[tuple[str, Image.Image]]]:
    return [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
