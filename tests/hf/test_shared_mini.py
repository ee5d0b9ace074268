"""The bundled model as a stock model: shared answers to many questions are those of fresh calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.mini.heldout import held_out
from llava_todre.cli import main
from llava_todre.hf.load import load_stock_model
from llava_todre.hf.stock import StockModel
from llava_todre.vlm import ImageCache, Request

MINI = Path(__file__).parents[2] / "checkpoints" / "mini"
METHODS = {
    "vanilla": {},
    "todre": {"retain_ratio": 0.1},
    "todre, withdrawing": {"retain_ratio": 0.25, "tau": 1.0},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StockModel:
    out = tmp_path_factory.mktemp("hf") / "mini"
    assert main(["convert", "--model", str(MINI), "--out", str(out)]) == 0
    return load_stock_model(str(out))


def check(stock: StockModel, num_images: int, per_image: int) -> int:
    """Compare shared answers with fresh ones; returns the number of questions."""
    memory, count = ImageCache(), 0
    for sample in held_out(num_images, questions_per_task=3):
        requests = [Request(each.text, [sample.image]) for each in sample.questions[:per_image]]
        count += len(requests)
        shared = stock.answer(requests, max_new_tokens=8, image_cache=memory)
        for request, ours in zip(requests, shared, strict=True):
            (fresh,) = stock.answer([request], max_new_tokens=8)
            assert ours.text == fresh.text, request.question
            layers = ours.stats.visual_tokens_per_layer
            assert layers == fresh.stats.visual_tokens_per_layer
    assert memory.prefixes.hits == count - num_images
    return count


@pytest.mark.parametrize("name", METHODS)
def test_shared_answers_are_those_of_fresh_calls(stock: StockModel, name: str) -> None:
    stock.set_pruner(name.split(",")[0], **METHODS[name])
    assert check(stock, 1, 6) == 6


@pytest.mark.slow
def test_216_questions_are_answered_as_in_fresh_calls(stock: StockModel) -> None:
    stock.set_pruner("todre", retain_ratio=0.1)
    assert check(stock, 12, 18) == 216
