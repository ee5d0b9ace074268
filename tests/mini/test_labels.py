"""The tower's labels agree with the scene they were made from."""

import numpy as np
import pytest
import torch

from eval.mini.render import Renderer
from eval.mini.scenes import IMAGE_LAYOUT, TILE_LAYOUT, SeedFamily, sample_scene, stream
from eval.mini.shapes import COLOURS, SHAPES
from scripts.mini_training.labels import HEAD_SIZES, IGNORE, NUM_PAIRS, tile_labels
from scripts.mini_training.views import pixel_values, views


def drawn(layout, count):
    rng = stream(SeedFamily.VALIDATION, 11)
    renderer = Renderer(rng, 2)
    scenes = [sample_scene(rng, layout) for _ in range(count)]
    images, ids = zip(*(renderer.render(rng, scene) for scene in scenes), strict=True)
    return scenes, np.stack(images), np.stack(ids)


@pytest.mark.parametrize("layout,num_views", [(IMAGE_LAYOUT, 5), (TILE_LAYOUT, 1)])
def test_labels_name_what_is_there(layout, num_views):
    scenes, images, ids = drawn(layout, 6)
    labels = tile_labels(ids, scenes)
    assert pixel_values(images).shape == (6 * num_views, 3, 112, 112)
    assert list(labels.dense) == list(HEAD_SIZES)
    for name, classes in HEAD_SIZES.items():
        label = labels.dense[name]
        assert label.shape == (6 * num_views, 64)
        assert label.max() < classes and label.min() >= IGNORE
    for i, scene in enumerate(scenes):
        whole = i * num_views
        pairs = labels.cls[whole, :NUM_PAIRS].nonzero().flatten().tolist()
        expected = {
            COLOURS.index(o.colour) * len(SHAPES) + SHAPES.index(o.shape) for o in scene.objects
        }
        assert set(pairs) == expected
        for item in scene.objects:
            x, y = item.centre
            patch = int(y * 8 / scene.side) * 8 + int(x * 8 / scene.side)
            assert labels.dense["centre"][whole, patch] == 1
            shape = labels.dense["shape"][whole, patch]
            assert shape in (SHAPES.index(item.shape) + 1, IGNORE, 0)
        if scene.sign is not None:
            said = labels.cls[whole : whole + num_views, NUM_PAIRS + 1 :].nan_to_num().sum(0)
            digits = said.view(3, 10)
            assert [int(row.argmax()) for row in digits] == list(scene.sign.digits)
            assert digits.sum() == 3


def test_views_are_thumbnail_and_crops():
    _, images, _ = drawn(IMAGE_LAYOUT, 2)
    tiles = views(images)
    np.testing.assert_array_equal(tiles[1, 2], images[1, :112, 112:])
    np.testing.assert_array_equal(tiles[1, 3], images[1, 112:, :112])
    blocks = images[0].reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert np.abs(tiles[0, 0] - blocks).mean() < 6
    assert torch.isfinite(pixel_values(images)).all()
