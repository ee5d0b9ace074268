"""Figures of live runs: attention equals the oracle's, pictures show exactly what was kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.figures import decoding, framework, kept, layers, scenes, video
from eval.figures.attention import ratios, received
from eval.figures.files import as_json, stored
from eval.figures.pictures import counts, frame_of, simplified, views_of
from eval.figures.registry import FIGURES
from eval.figures.sources import Sources
from eval.mini import held_out
from llava_todre.pruners import LayerView, Observed
from llava_todre.spans import TokenType, is_visual

COMMITTED = Path(__file__).parents[2] / "docs" / "figures"
LIVE = [name for name, spec in FIGURES.items() if spec.live]


# -------------------------------------------------------------------------- attention


@torch.inference_mode()
def test_observed_attention_is_that_of_the_eager_model(tiny_llava: Callable[..., Any]) -> None:
    model = tiny_llava("eager")
    pixels = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 7, 9, -200, 11, 13, 17, 19, 23]])  # the last two were generated
    seen: list[tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = []

    def look(view: LayerView) -> None:
        seen.append((ratios(view), received(view, 2), view.kinds))

    model.set_pruner(Observed(look=look))
    given = {"images": [pixels], "image_sizes": [(112, 112)]}
    model(input_ids=ids, **given)
    model.set_pruner("vanilla")
    maps = model(input_ids=ids, **given, output_attentions=True).attentions
    assert len(seen) == len(maps) == 8
    for (shares, taken, kinds), attention in zip(seen, maps, strict=True):
        rows = attention[0].mean(dim=0)  # (N, N)
        visual, text = is_visual(kinds), kinds == TokenType.TEXT
        for name, chosen in {"after_image": text, "all": ~visual}.items():
            expected = rows[chosen][:, visual].sum(1).mean(), rows[visual][:, chosen].sum(1).mean()
            assert shares[name] == pytest.approx([float(each) for each in expected], abs=1e-5)
        assert shares["after_image"][1] == 0 < shares["all"][1]
        last = rows[-2:].mean(dim=0)
        assert taken["generated"] == pytest.approx(float(last[-2:].sum()), abs=1e-5)
        assert taken["question"] == pytest.approx(
            float(last[text].sum() - last[-2:].sum()), abs=1e-5
        )
        assert taken["visual"] == pytest.approx(float(last[visual].sum()), abs=1e-5)
        assert sum(taken.values()) == pytest.approx(1, abs=1e-5)


def test_the_last_token_of_an_answer_is_not_fed_back() -> None:
    row = torch.tensor([7, 8, 9])
    assert decoding._fed_back(row, None).tolist() == [7, 8]
    assert decoding._fed_back(row, 9).tolist() == [7, 8]
    assert decoding._fed_back(torch.tensor([7, 2, 0, 0]), [2, 3]).tolist() == [7]


def test_attention_of_the_bundled_model_falls_with_depth() -> None:
    data = layers.gather(Sources(samples=1))
    for series in data["panels"].values():
        text = [layer["mean"] for layer in series["after_image to visual"]]
        assert len(text) == 10 and min(text[:5]) > 0.3 and max(text[7:]) < 0.1
        assert all(layer["p90"] == 0 for layer in series["visual to after_image"])
        assert all(
            layer["p10"] <= layer["mean"] <= layer["p90"] for layer in series["all to visual"]
        )
    assert data["probe_layers"] == [8] and "9 held-out questions on 1 picture," in data["note"]


def test_shares_of_generated_tokens_sum_to_one() -> None:
    tasks = decoding.gather(Sources(samples=1))["tasks"]
    assert len(tasks) == 9
    for kinds in tasks.values():
        for parts in zip(*kinds.values(), strict=True):
            assert sum(part["mean"] for part in parts) == pytest.approx(1, abs=1e-4)


# -------------------------------------------------------------------------- pictures


def place() -> dict[str, Any]:
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[224, 224]],
        "tile": 112,
        "side": 8,
        "patches": list(range(320)),
    }


def test_only_kept_tokens_are_bright_in_thumbnail_and_crops() -> None:
    image = Image.new("RGB", (224, 224), "white")
    small, large = views_of(image, place(), [9, 64 + 8, 256 + 63])
    assert large is not None and (small.size, large.size) == ((112, 112), (224, 224))
    thumbnail = np.zeros((8, 8), bool)
    thumbnail[1, 1] = True
    crops = np.zeros((16, 16), bool)
    crops[1, 0] = crops[15, 15] = True  # second row of the first crop; last token of the last
    for picture, expected in ((small, thumbnail), (large, crops)):
        bright = np.asarray(picture.convert("L")).reshape(len(expected), 14, len(expected), 14)
        assert ((bright == 255).all((1, 3)) == expected).all()
        assert ((bright < 128).all((1, 3)) == ~expected).all()
    assert counts(place(), [9, 72, 319]) == (1, 64, 2, 256)
    bright = np.asarray(frame_of(small.convert("L").convert("RGB"), 8, []))
    assert bright.max() < 128


def test_a_simplified_picture_keeps_the_colours_of_its_shapes() -> None:
    sample = held_out(3)[2]
    before, after = np.asarray(sample.image).astype(int), np.asarray(simplified(sample.image))
    for item in sample.objects:
        box = np.s_[item.top : item.top + item.size, item.left : item.left + item.size]
        inside = sample.foreground[box]
        apart = np.abs(np.median(before[box][inside], 0) - np.median(after[box][inside], 0))
        assert apart.max() < 32, item


@pytest.mark.parametrize("module", [kept, scenes, video])
def test_methods_keep_their_share_and_answers_are_judged(module: Any) -> None:
    data = module.gather(Sources())
    rows = data.get("rows") or [column["cells"] for column in data["columns"]]
    cells = [each for row in rows for each in (row if isinstance(row, list) else [row])]
    total = max(len(each["keep_idx"]) for each in [*cells, data.get("unpruned", cells[0])])
    shares = {round(len(each["keep_idx"]) / total, 1) for each in cells}
    assert shares <= {0.1, 0.2, 1.0} and 0.1 in shares
    for each in cells:
        assert each["keep_idx"] == sorted({*each["keep_idx"]})
        if "expected" in data:
            assert each["right"] == (each["answer"] == data["expected"])
    assert any(each["right"] for each in cells)


def test_the_framework_shows_what_both_stages_did() -> None:
    data = framework.gather(Sources())
    assert data["pivot"] in data["keep_idx"] and data["pivot"] < 64, "of the thumbnail"
    assert len(data["keep_idx"]) == 32
    (probe,) = data["probes"]
    assert probe["layer"] == 8 and probe["dropped"] == data["visual_per_layer"][8]
    assert data["visual_per_layer"][9] == 0 and data["shares"][8] < data["tau"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_committed_live_figures_are_what_the_model_does_now(name: str) -> None:
    now = json.loads(as_json(FIGURES[name].gather(Sources())))
    _same(now, stored(name, COMMITTED))


def _same(now: Any, before: Any) -> None:
    """Compare numbers up to what another machine's arithmetic changes."""
    if isinstance(now, dict):
        assert list(now) == list(before)
        for key in now:
            _same(now[key], before[key])
    elif isinstance(now, list):
        assert len(now) == len(before)
        for each, other in zip(now, before, strict=True):
            _same(each, other)
    else:
        assert now == (pytest.approx(before, abs=1e-3) if isinstance(now, float) else before)
