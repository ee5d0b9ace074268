"""Frames are as a player shows them: turned, mirrored, with square pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_todre.errors import TodreError
from llava_todre.ui.uploads import Limits, read_upload
from llava_todre.video import Clip, read_clip

av = pytest.importorskip("av", reason="PyAV is not installed (make setup)")
CASES = Path(__file__).parent / "cases"
SHADES = {"a": 20, "b": 90, "c": 160, "d": 230}
# (a, b, c, d): x is shown at ax + cy, y at bx + dy; then where each corner of what is stored goes.
MATRICES = {
    (1, 0, 0, 1): "abcd",
    (-1, 0, 0, 1): "badc",
    (-1, 0, 0, -1): "dcba",
    (1, 0, 0, -1): "cdab",
    (0, 1, 1, 0): "acbd",
    (0, 1, -1, 0): "cadb",
    (0, -1, -1, 0): "dbca",
    (0, -1, 1, 0): "bdac",
    (0.98, 0.17, -0.17, 0.98): "abcd",  # ten degrees: the nearest quarter turn
    (0, 0, 0, 0): "abcd",
}


def write(path: Path, aspect: Fraction | None = None, size: tuple[int, int] = (96, 64)) -> Path:
    """Write three frames of four grey quarters."""
    width, height = size
    rows = [np.repeat([SHADES[left], SHADES[right]], width // 2) for left, right in ("ab", "cd")]
    grey = np.repeat(np.stack(rows), height // 2, axis=0).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(3):
            pixels = np.stack([grey] * 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[float, ...]) -> Path:
    """Write another display matrix into the header of the track."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (round(65536 * value) for value in matrix)
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def corners(image: Any) -> str:
    pixels = np.asarray(image)[..., 0].astype(int)
    return "".join(
        min(SHADES, key=lambda name: abs(SHADES[name] - pixels[y, x])) for y in (8, -8)
        for x in (8, -8)
    )  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_turned_as_the_display_matrix_says(
    matrix: tuple[float, ...], tmp_path: Path
) -> None:
    path = turn(write(tmp_path / "clip.mp4"), matrix)
    size = (64, 96) if matrix[0] == 0 != matrix[1] else (96, 64)
    ways = [read_clip(str(path), 2).frames, read_upload(path, 2).images]
    for frames in ways:
        assert [frame.size for frame in frames] == [size] * 2
        assert {corners(frame) for frame in frames} == {MATRICES[matrix]}


def test_a_clip_that_is_decoded_from_the_start_is_turned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = turn(write(tmp_path / "clip.mp4"), (0, 1, -1, 0))
    monkeypatch.setattr("llava_todre.video._by_time", lambda container, count: Clip((), ()))
    assert {corners(frame) for frame in read_clip(str(path), 2).frames} == {"cadb"}


def test_the_case_equals_its_upright_twin() -> None:
    stored = read_clip(str(CASES / "display_matrix_90.mp4"), 4).frames
    upright = read_clip(str(CASES / "display_matrix_90_upright.mp4"), 4).frames
    for one, other in zip(stored, upright, strict=True):
        assert one.size == other.size == (224, 320)
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other)).mean() < 1.5


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (None, (96, 64)),
        (Fraction(1), (96, 64)),
        (Fraction(2), (192, 64)),
        (Fraction(1, 2), (48, 64)),
        (Fraction(10, 11), (87, 64)),
        (Fraction(200), (96, 64)),  # no pixel is as wide
    ],
)
def test_pixels_become_square(
    aspect: Fraction | None, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "clip.mp4", aspect)
    assert [frame.size for frame in read_clip(str(path), 2).frames] == [size] * 2
    turned = turn(path, (0, 1, -1, 0))
    (frame,) = read_upload(turned, 1).images
    assert frame.size == size[::-1] and corners(frame) == "cadb"


def test_the_limit_of_a_visitor_counts_the_pixels_that_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", Fraction(2))
    assert read_upload(path, 1, Limits(frame_pixels=192 * 64)).is_video
    with pytest.raises(TodreError, match="million pixels, got 192 x 64"):
        read_upload(path, 1, Limits(frame_pixels=192 * 64 - 1))


@pytest.mark.parametrize("count", [0, -1, 1.5, "4", None])
def test_a_clip_has_a_whole_number_of_frames_above_0(count: Any) -> None:
    with pytest.raises(
        TodreError, match=f"count of frames must be a whole number above 0, got {count!r}"
    ):
        read_clip(str(CASES / "display_matrix_90.mp4"), count)


@pytest.mark.parametrize(
    "path", ["missing.mp4", "a\0b", "http://127.0.0.1:1/a.mp4", "concat:a.mp4|b.mp4", "data:,x"]
)
def test_nothing_but_a_file_is_opened(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("av.open", refuse)
    with pytest.raises(TodreError, match="does not exist; give a file"):
        read_clip(path, 2)


def test_a_clip_has_a_path() -> None:
    with pytest.raises(TodreError, match="must be a path, got NoneType"):
        read_clip(None, 2)  # type: ignore[arg-type]


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(CASES))
    assert len(read_clip("~/display_matrix_90.mp4", 3).frames) == 3
