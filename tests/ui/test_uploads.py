"""What may be sent, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_todre import TodreError
from llava_todre.ui.uploads import LIMITS, Limits, read_upload

SMALL = Limits(image_bytes=4000, pixels=100 * 100, frame_pixels=64 * 64, seconds=2.0, frames=12)


def clip(file: Path, num_frames: int, side: int = 48, rate: int = 8) -> Path:
    av = pytest.importorskip("av", reason="PyAV is not installed (make setup)")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for shade in np.linspace(0, 255, num_frames).astype(np.uint8):
            pixels = np.full((side, side, 3), shade)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_an_image_of_each_format_is_read_as_rgb(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / name)
    upload = read_upload(tmp_path / name, 4)
    assert not upload.is_video and upload.images[0].mode == "RGB"
    assert upload.images[0].size == (30, 20)


def test_what_a_file_holds_counts_and_not_its_name(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert not read_upload(tmp_path / "a.mp4", 4).is_video
    clip(tmp_path / "b.mp4", 3).rename(tmp_path / "b.png")
    assert read_upload(tmp_path / "b.png", 4).is_video


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_upload(tmp_path / "a.jpg", 4).images[0].size == (20, 30)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_frames_of_a_video_are_spread_over_it(name: str, tmp_path: Path) -> None:
    upload = read_upload(clip(tmp_path / name, 9), 3)
    shades = [np.asarray(frame).mean() for frame in upload.images]
    assert upload.is_video and len(shades) == 3
    assert shades == pytest.approx([0, 127, 255], abs=12)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "file 'a.png' must be an image"),
        ("a.png", b"<svg></svg>" * 9, r"file 'a.png' must be an image \(PNG, JPEG"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "got something else"),
        ("a.mp4", b"#EXTM3U\n/etc/passwd\n", "got something else"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got something else"),
        ("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(99), "video 'a.mp4' is damaged"),
        ("a.webm", b"\x1a\x45\xdf\xa3" + bytes(99), "video 'a.webm' is damaged"),
    ],
)
def test_what_is_neither_is_refused_by_its_name_alone(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (make setup)")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TodreError, match=message) as refused:
        read_upload(tmp_path / name, 4)
    assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_a_truncated_image_is_called_damaged(name: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TodreError, match=f"'{name}'") as refused:
        read_upload(tmp_path / name, 4)
    assert str(tmp_path) not in str(refused.value)


def test_limits_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (101, 100)).save(tmp_path / "wide.png")
    with pytest.raises(TodreError, match=r"at most 0\.01 million pixels, got 101 x 100"):
        read_upload(tmp_path / "wide.png", 4, SMALL)
    (tmp_path / "heavy.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4000))
    with pytest.raises(TodreError, match="'heavy.png' must have .* MiB as an image, got 0.0 MiB"):
        read_upload(tmp_path / "heavy.png", 4, SMALL)
    for file, text in [
        (clip(tmp_path / "big.mp4", 2, side=80), "million pixels, got 80 x 80"),
        (clip(tmp_path / "long.mp4", 10, rate=2), "must have at most 2 seconds and"),
        (clip(tmp_path / "many.mp4", 16, rate=16), "and 12 frames"),
    ]:
        with pytest.raises(TodreError, match=text):
            read_upload(file, 4, SMALL)
    video = clip(tmp_path / "heavy.mp4", 2)
    few = dataclasses.replace(LIMITS, video_bytes=100)
    with pytest.raises(TodreError, match="MiB as a video, got"):
        read_upload(video, 4, few)


def test_a_picture_that_unfolds_to_a_giant_is_never_unfolded(tmp_path: Path) -> None:
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    with pytest.raises(TodreError, match="at most 64 million pixels, got 9000 x 8000"):
        read_upload(tmp_path / "bomb.png", 4)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed (make setup)")
    file = tmp_path / "song.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(TodreError, match="'song.mp4' must have images, got only sound"):
        read_upload(file, 4)
