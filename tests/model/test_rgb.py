"""An image is the same picture whichever way it comes in, and however it is stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from llava_todre.errors import TodreError
from llava_todre.model.images import load_image, open_picture, picture_digest, to_rgb

CASES = Path(__file__).parents[1] / "cases"
ORIENTATION = 0x0112
# Where the top left, top right, bottom left and bottom right of what is stored are shown.
SHOWN = {
    1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac",
}  # fmt: skip
COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (90, 90, 90)}


def quarters(width: int = 32, height: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, height))
    for place, colour in zip(((0, 0), (1, 0), (0, 1), (1, 1)), COLOURS.values(), strict=True):
        x, y = place[0] * width // 2, place[1] * height // 2
        image.paste(colour, (x, y, x + width // 2, y + height // 2))
    return image


def corners(image: Image.Image) -> str:
    width, height = image.size
    places = [(x, y) for y in (2, height - 3) for x in (2, width - 3)]
    pixels = [np.array(image.getpixel(place)) for place in places]
    return "".join(
        min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum()) for pixel in pixels
    )


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_a_photo_is_turned_as_its_exif_says(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / f"photo.{kind}"
    quarters().save(file, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    size = (16, 32) if orientation > 4 else (32, 16)
    with Image.open(file) as opened, Image.open(file) as other:
        ways = [load_image(file), to_rgb(opened), to_rgb(other.convert("RGB")), open_picture(file)]
        digests = {picture_digest(opened), picture_digest(ways[0])}
    for shown in ways:
        assert (shown.size, corners(shown), shown.mode) == (size, SHOWN[orientation], "RGB")
        assert np.array_equal(to_rgb(shown), shown), "turning it again does nothing"
    assert len(digests) == 1


def test_pictures_that_differ_in_orientation_alone_are_two(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    quarters().save(tmp_path / "a.png")
    quarters().save(tmp_path / "b.png", exif=exif)
    assert picture_digest(Image.open(tmp_path / "a.png")) != picture_digest(
        Image.open(tmp_path / "b.png")
    )


@pytest.mark.filterwarnings("ignore:.*EXIF.*:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # 99
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",  # a word
        b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0\x01\0",
    ],
)
def test_an_orientation_that_cannot_be_read_is_none(exif: bytes, tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.jpg", exif=exif)
    assert corners(load_image(tmp_path / "a.jpg")) == "abcd"


def test_a_photo_is_upright_though_the_rest_of_its_exif_is_broken(tmp_path: Path) -> None:
    """Pillow reads this, but cannot write it anew."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x829A] = 0.01
    data = exif.tobytes().replace(b"\x9a\x82\x05\0", b"\x9a\x82\x0c\0")
    quarters().save(tmp_path / "a.jpg", exif=data)
    assert corners(load_image(tmp_path / "a.jpg")) == SHOWN[6]


# ---------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBa", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBX", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (9, 255), (9, 9, 9)),
        ("La", (0, 0), (255, 255, 255)),
        ("La", (9, 255), (9, 9, 9)),
        ("PA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("YCbCr", (50, 128, 128), (50, 50, 50)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 256, (1, 1, 1)),
        ("I;16B", 40000, (156, 156, 156)),
        ("I;16L", 40000, (156, 156, 156)),
        ("I;16N", 40000, (156, 156, 156)),
        ("I", 40000, (156, 156, 156)),
        ("I", 200, (200, 200, 200)),
        ("F", 12.0, (12, 12, 12)),
        ("F", 40000.0, (156, 156, 156)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, value: Any, rgb: tuple[int, int, int]) -> None:
    image = to_rgb(Image.new(mode, (3, 2), value))
    assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (3, 2), rgb)


def test_lab_is_converted_by_its_meaning() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(quarters(), srgb, lab, outputMode="LAB")
    assert isinstance(image, Image.Image) and image.mode == "LAB"
    assert corners(to_rgb(image)) == "abcd"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.0, 0.9]], "none above 1, which would be black"),
        ([[-1000.0, 400.0]], "from -1000 to 400, of which black and white are unknown"),
        ([[-1000, 400]], "from -1000 to 400"),
        ([[0, 70000]], "from 0 to 70000"),
        ([[0.0, np.nan]], "not finite"),
        ([[0.0, np.inf]], "not finite"),
    ],
)
def test_a_range_that_is_not_known_is_an_error(
    values: list[list[float]], message: str, tmp_path: Path
) -> None:
    kind = np.int32 if isinstance(values[0][0], int) else np.float32
    image = Image.fromarray(np.array(values, kind))
    image.save(tmp_path / "scan.tiff")
    for read in (lambda: to_rgb(image), lambda: load_image(tmp_path / "scan.tiff")):
        with pytest.raises(TodreError, match=rf"of mode '[IF]' must .* 0 to 255.* got .*{message}"):
            read()


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (np.uint16, "png"),
        (np.uint16, "tiff"),
        (">u2", "tiff"),
        (np.int32, "tiff"),
        (np.float32, "tiff"),
    ],
)
def test_16_bit_grey_looks_as_its_8_bit_twin(stored: Any, kind: str, tmp_path: Path) -> None:
    scene = np.asarray(load_image(CASES / "orientation6_upright.jpg").convert("L"))
    image = Image.fromarray((scene.astype(np.uint16) * 257).astype(stored))
    image.save(tmp_path / f"grey.{kind}")
    for shown in (to_rgb(image), load_image(tmp_path / f"grey.{kind}")):
        assert np.array_equal(np.asarray(shown)[..., 0], scene)


def _tiff(bits: int, photometric: int, pixels: bytes) -> bytes:
    """Return two grey pixels, uncompressed."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1)]
    tags += [(278, 1), (279, len(pixels))]
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + pixels


@pytest.mark.parametrize(
    ("bits", "photometric", "pixels", "greys"),
    [
        (12, 1, bytes([0xFF, 0xF8, 0x00]), [255, 128]),
        (16, 1, struct.pack("<HH", 65535, 256), [255, 1]),
        (16, 0, struct.pack("<HH", 65535, 256), [0, 254]),  # 0 is white
    ],
)
def test_what_a_tiff_calls_white_is_white(
    bits: int, photometric: int, pixels: bytes, greys: list[int]
) -> None:
    image = Image.open(io.BytesIO(_tiff(bits, photometric, pixels)))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == greys


def test_dark_pictures_of_16_bits_stay_dark(tmp_path: Path) -> None:
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 255, 0))
    assert np.asarray(load_image(tmp_path / "dark.pgm")).max() == 0


def test_a_float_map_is_not_scaled_to_16_bits(tmp_path: Path) -> None:
    (tmp_path / "grey.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 255, 16))
    assert np.asarray(load_image(tmp_path / "grey.pfm"))[0, :, 0].tolist() == [255, 16]


def _png(depth: int, colour: int, pixels: bytes, transparent: bytes) -> bytes:
    """Return two pixels, and which value of them is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


@pytest.mark.parametrize(
    ("depth", "colour", "pixels", "transparent", "second"),
    [
        (8, 0, bytes([5, 90]), struct.pack(">H", 5), 90),
        (16, 0, struct.pack(">HH", 500, 40000), struct.pack(">H", 500), 156),
        (8, 2, bytes([1, 2, 3, 90, 90, 90]), struct.pack(">HHH", 1, 2, 3), 90),
        (16, 2, struct.pack(">6H", 500, 600, 700, 40000, 40000, 40000),
         struct.pack(">HHH", 500, 600, 700), 156),
    ],
)  # fmt: skip
def test_the_transparent_value_of_a_png_is_white(
    depth: int, colour: int, pixels: bytes, transparent: bytes, second: int
) -> None:
    image = Image.open(io.BytesIO(_png(depth, colour, pixels, transparent)))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, second]


@pytest.mark.parametrize("transparency", [0, b"\0\xff"], ids=["index", "bytes"])
def test_palette_with_transparency(transparency: int | bytes, tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "palette.png", transparency=transparency)
    for shown in (
        load_image(tmp_path / "palette.png"),
        to_rgb(Image.open(tmp_path / "palette.png")),
    ):
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((1, 1)) == (255, 0, 0)


def test_cmyk_of_photo_editors_is_not_a_negative(tmp_path: Path) -> None:
    """Adobe stores it inverted; Pillow's writer does as Adobe does, and says so."""
    quarters().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()
    assert corners(load_image(tmp_path / "print.jpg")) == "abcd"


# ---------------------------------------------------------------------- no picture


def _closed(file: Path) -> Image.Image:
    image = Image.open(file)
    image.close()
    return image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: Image.open(io.BytesIO(file.read_bytes()[:2000])), "damaged or unreadable"),
        (_closed, "closed"),
        (lambda file: Image.new("RGB", (0, 5)), r"size must be .* got \(0, 5\)"),
        (lambda file: np.zeros((4, 4, 3), np.uint8), "must be a PIL image, got ndarray"),
    ],
)
def test_what_shows_nothing_is_one_line(make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(TodreError, match=message) as caught:
        to_rgb(make(CASES / "orientation6.jpg"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["orientation6.jpg", "grey16.png", "palette_alpha.png"])
def test_the_cases_are_seen_as_they_should(name: str) -> None:
    upright = np.asarray(load_image(CASES / "orientation6_upright.jpg"), np.int16)
    with Image.open(CASES / name) as opened:
        ways = [np.asarray(load_image(CASES / name)), np.asarray(to_rgb(opened))]
    assert np.array_equal(*ways) and ways[0].mean() == pytest.approx(170, abs=1)
    if name == "orientation6.jpg":
        assert np.abs(ways[0] - upright).mean() < 1
