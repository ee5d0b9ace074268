"""Pixels must be those of the original code (tests/golden); geometry is checked by slow loops."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_todre.errors import TodreError
from llava_todre.model.images import load_image, process_images
from llava_todre.stage1.anyres import (
    anyres_grid_shape,
    parse_pinpoints,
    select_best_resolution,
    unpad_bounds,
)

GOLDEN = Path(__file__).parent.parent / "golden"
REAL_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CASES = [
    (variant, index, case)
    for variant in ("v15", "v16")
    for index, case in enumerate(json.loads((GOLDEN / f"{variant}_cases.json").read_text()))
]


def _setup(variant):
    folder = GOLDEN / ("llava-v1.6-tiny" if variant == "v16" else "llava-v1.5-tiny")
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    return CLIPImageProcessorPil.from_pretrained(GOLDEN / f"clip-{variant}"), config


@pytest.mark.parametrize(("variant", "index", "case"), CASES)
def test_golden_pixels(variant, index, case):
    processor, config = _setup(variant)
    image = load_image(GOLDEN / case["image"])
    assert list(image.size) == case["size_wh"]
    pixels = process_images([image], processor, config)
    expected = load_file(GOLDEN / f"{variant}_expected.safetensors")[f"{index}.pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_pinpoints_as_string_and_ragged_list():
    processor, config = _setup("v16")
    config.image_grid_pinpoints = str(config.image_grid_pinpoints)
    images = [load_image(GOLDEN / f"v16_{index}.png") for index in (0, 3)]
    pixels = process_images(images, processor, config)
    assert [tuple(item.shape) for item in pixels] == [(5, 3, 56, 56), (4, 3, 56, 56)]
    same = process_images([images[0]] * 2, processor, config)
    assert same.shape == (2, 5, 3, 56, 56)


def test_square_mode_is_the_processor_alone():
    processor, config = _setup("v15")
    image = load_image(GOLDEN / "v15_0.png")
    expected = processor([image], return_tensors="pt")["pixel_values"]
    for mode in (None, "square"):
        config.image_aspect_ratio = mode
        assert torch.equal(process_images([image], processor, config), expected)


def test_grid_shape_is_columns_and_rows():
    assert anyres_grid_shape((1000, 300), REAL_PINPOINTS, 336) == (3, 1)
    assert anyres_grid_shape((300, 1000), REAL_PINPOINTS, 336) == (1, 3)
    assert anyres_grid_shape((640, 480), str(REAL_PINPOINTS), 336) == (2, 2)
    assert anyres_grid_shape((5, 5), [[672, 672]], 336) == (2, 2)


def _slow_best(size, canvases):
    """Most pixels shown; among these, least waste; among these, the first."""
    ranked = []
    for number, (width, height) in enumerate(canvases):
        scale = min(width / size[0], height / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        ranked.append((-shown, width * height - shown, number))
    return tuple(canvases[min(ranked)[2]])


def _slow_bounds(height, width, size):
    """Which positions of an (H, W) grid remain, by removing one ring of padding at a time."""
    rows, columns = list(range(height)), list(range(width))
    if size[0] / size[1] > width / height:
        target, line = int(size[1] * (width / size[0])), rows
    else:
        target, line = int(size[0] * (height / size[1])), columns
    for _ in range((len(line) - target) // 2):
        line.pop(0)
        line.pop()
    return rows, columns


def test_geometry_against_slow_loops():
    draw = random.Random(0)
    sizes = [(748, 352), (1, 1), (1, 4000), (4000, 1), (335, 337), (336, 336)]
    sizes += [(draw.randint(1, 2500), draw.randint(1, 2500)) for _ in range(3000)]
    canvases = parse_pinpoints(REAL_PINPOINTS, 336)
    for size in sizes:
        assert select_best_resolution(size, canvases) == _slow_best(size, canvases)
        columns, rows = anyres_grid_shape(size, REAL_PINPOINTS, 336)
        top, bottom, left, right = unpad_bounds((rows * 24, columns * 24), size)
        kept = _slow_bounds(rows * 24, columns * 24, size)
        assert (list(range(top, bottom)), list(range(left, right))) == kept, size


def test_unpad_truncates_as_the_original():
    """748 * (24 / 352) is 51 less one rounding error: the original keeps 50 rows, HF keeps 52."""
    assert anyres_grid_shape((352, 748), REAL_PINPOINTS, 336) == (1, 3)
    assert unpad_bounds((72, 24), (352, 748)) == (11, 61, 0, 24)
    assert unpad_bounds((24, 72), (748, 352)) == (0, 24, 11, 61)


def test_load_image_errors(tmp_path, monkeypatch):
    whole = (GOLDEN / "v16_2.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in [
        ("none.png", "does not exist"),
        (".", "is a directory"),
        ("half.png", "damaged"),
        ("text.png", "must be one of PNG, .* got another file"),
        ("empty.png", "must be one of PNG, .* got another file"),
    ]:
        with pytest.raises(TodreError, match=message):
            load_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TodreError, match="too many pixels"):
        load_image(GOLDEN / "v16_2.png")


def test_a_picture_that_unfolds_to_a_giant_is_never_unfolded(tmp_path, monkeypatch):
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(TodreError, match="at most 64 million pixels, got 9000 x 8000"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("kind", ["eps", "pdf", "ico"])
def test_only_formats_that_hold_nothing_but_pixels_are_opened(kind, tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "a.png")
    with pytest.raises(TodreError, match=r"'.*a\.png' must be one of PNG, JPEG.* got another file"):
        load_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_never_raise_anything_else(tmp_path):
    """Flip bytes of real files: each loads or gives our error."""
    draw = np.random.default_rng(0)
    sources = {}
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        load_image(GOLDEN / "v16_5.png").save(tmp_path / f"whole.{kind}")
        sources[kind] = (tmp_path / f"whole.{kind}").read_bytes()
    for kind, whole in sources.items():
        for _ in range(60):
            data = np.frombuffer(whole, np.uint8).copy()
            data[draw.integers(0, len(data), 4)] = draw.integers(0, 256, 4)
            path = tmp_path / f"damaged.{kind}"
            path.write_bytes(data[: draw.integers(1, len(data) + 1)].tobytes())
            try:
                assert load_image(path).mode == "RGB"
            except TodreError:
                continue


def test_process_errors():
    processor, config = _setup("v16")
    with pytest.raises(TodreError, match="images must hold at least one"):
        process_images([], processor, config)
    config.image_aspect_ratio = "anyres_max_9"
    with pytest.raises(TodreError, match="must be one of .* got 'anyres_max_9'"):
        process_images([Image.new("RGB", (5, 5))], processor, config)


@pytest.mark.parametrize("bad", [None, [], "(1x1),(6x6)", [[56]], [[56, 57]], [[0, 56]], "[[56"])
def test_pinpoint_errors(bad):
    with pytest.raises(TodreError, match="image_grid_pinpoints .* multiple of the tile size 56"):
        parse_pinpoints(bad, 56)


def test_geometry_errors():
    with pytest.raises(TodreError, match="image size"):
        unpad_bounds((24, 24), (0, 10))
    with pytest.raises(TodreError, match="image size"):
        select_best_resolution((10, 0), [(56, 56)])


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_an_image_that_would_fill_the_memory_is_refused(mode):
    processor, config = _setup("v15")
    config.image_aspect_ratio = mode
    with pytest.raises(TodreError, match="too elongated"):
        process_images([Image.new("RGB", (200_000, 1))], processor, config)
