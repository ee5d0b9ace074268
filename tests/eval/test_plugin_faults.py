"""The model of lmms-eval where something is odd: seeds by hand, its cache, prompts, item counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.answer_log import read_answers
from llava_todre.lmms_plugin.arguments import build_pruner, item_counts
from llava_todre.vlm import OwnModel
from tests.eval.test_lmms_plugin import (  # noqa: F401 (fixtures)
    ANSWER,
    MINI,
    build,
    clip,
    documents,
    requests_for,
    samples,
    shared_model,
)

response_cache = pytest.importorskip("lmms_eval.caching.response_cache")


# ---------------------------------------------------------------------- seeds


def test_the_seed_of_lmms_eval_reaches_methods_that_draw(documents, monkeypatch) -> None:  # noqa: F811
    kept: list[list[int]] = []

    def noting(*asked: Any, **settings: Any) -> Any:
        given = ANSWER(*asked, **settings)
        kept.append(given[0].stats.images[0].keep_idx.tolist())
        return given

    monkeypatch.setattr(OwnModel, "answer", noting)
    for seed in (7, 8, 7):
        torch.manual_seed(seed)  # as lmms-eval does before it makes the model
        lm = build(documents, method="random")
        assert lm.seed == seed
        lm.generate_until(requests_for(documents, [0]))
    assert kept[0] == kept[2] != kept[1]


def test_a_seed_that_is_given_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: random\nseed: 4\n")
    assert build_pruner("random", {}, 3, (), 9)[1] == 3
    assert build_pruner(str(file), {}, 3, (), 9)[1] == 3
    assert build_pruner(str(file), {}, None, (), 9)[1] == 4
    assert build_pruner("random", {}, None, (), 9)[1] == 9


# ---------------------------------------------------------------------- lmms-eval's cache


def stored_answers(folder: Path, requests: list[Any], lm: Any, arguments: str) -> tuple[Any, int]:
    """Ask through lmms-eval's cache; returns the answers, and how many it had."""
    cache = response_cache.ResponseCache.create(
        str(folder), model="llava_todre", model_args=arguments
    )
    given = cache.execute(lm, "generate_until", requests)
    hits = cache._hits
    cache.finalize(success=True)
    return given, hits


def test_the_cache_of_lmms_eval_knows_a_method_file_by_what_it_says(
    documents,  # noqa: F811
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.yaml"
    arguments = f"pretrained={MINI},method={file}"
    hits = []
    for text in ("retain_ratio: 0.5", "retain_ratio: 0.5", "retain_ratio: 0.02"):
        file.write_text(f"method: todre\n{text}\n")
        lm = build(documents, method=str(file))
        requests = requests_for(documents, [0, 4, 5])
        given, found = stored_answers(tmp_path / "cache", requests, lm, arguments)
        assert given == lm.generate_until(requests)
        hits.append(found)
    assert hits == [0, 3, 0]


@pytest.mark.parametrize("change", ["weights", "seed"])
def test_other_weights_or_seeds_behind_the_same_words_are_not_in_the_cache(
    documents,  # noqa: F811
    tmp_path: Path,
    change: str,
) -> None:
    arguments = f"pretrained={MINI},method=random"
    requests = requests_for(documents, [0])
    torch.manual_seed(1)
    lm = build(documents, method="random")
    assert stored_answers(tmp_path, requests, lm, arguments)[1] == 0
    assert stored_answers(tmp_path, requests, lm, arguments)[1] == 1
    weight = lm.model.lm_head.weight.data
    before = weight[0, 0].item()
    try:
        if change == "weights":
            weight[0, 0] += 1
        torch.manual_seed(2 if change == "seed" else 1)
        other = build(documents, method="random")
        assert stored_answers(tmp_path, requests, other, arguments)[1] == 0
    finally:
        weight[0, 0] = before


def test_other_models_are_looked_up_as_ever(documents, tmp_path: Path) -> None:  # noqa: F811
    build(documents)
    cache = response_cache.ResponseCache.create(str(tmp_path), model="llava", model_args="a=1")
    assert cache.model_fingerprint == 'llava|{"a":1}'
    cache.finalize(success=True)


# ---------------------------------------------------------------------- prompts that are too long


def test_a_prompt_the_model_cannot_read_fails_alone(documents, tmp_path, monkeypatch) -> None:  # noqa: F811
    arguments = {"method": "vanilla", "batch_size": 3, "log_dir": str(tmp_path)}
    asked = [0, 1, 2]  # one picture, none, two
    expected = build(documents, method="vanilla").generate_until(requests_for(documents, asked))
    lm = build(documents, **arguments)
    monkeypatch.setattr(lm.model.config, "max_position_embeddings", 500)  # 320 tokens a picture
    assert lm.generate_until(requests_for(documents, asked)) == [*expected[:2], ""]
    lines = read_answers(tmp_path)
    assert [line.get("failed", "")[:10] for line in lines] == ["", "", "prompt of "]
    assert "longer than the 500 the model can read" in lines[2]["failed"]
    assert lines[2]["kept_tokens"] == lines[2]["prefill_flops"] == 0
    assert lines[0]["kept_tokens"] > 0
    monkeypatch.setattr(OwnModel, "answer", lambda *_, **__: 1 / 0)
    assert lm.generate_until(requests_for(documents, asked)) == [*expected[:2], ""], "from the log"


def test_other_errors_still_end_the_run(documents, monkeypatch) -> None:  # noqa: F811
    def broken(*_: Any, **__: Any) -> Any:
        raise TodreError("something else")

    monkeypatch.setattr(OwnModel, "answer", broken)
    with pytest.raises(TodreError, match="something else"):
        build(documents).generate_until(requests_for(documents, [0]))


# ---------------------------------------------------------------------- item counts


def test_other_numbers_of_items_than_told_end_the_run_before_the_first_answer(
    documents,  # noqa: F811
    monkeypatch,
) -> None:
    twice = requests_for(documents, [0, 1]) * 2  # a task may ask several times about a document
    assert len(build(documents, num_items="shapes:2").generate_until(twice)) == 4
    monkeypatch.setattr(OwnModel, "answer", lambda *_, **__: 1 / 0)
    for told, said in (
        ("shapes:3;", "task 'shapes' must have 3 items as in the suite, got 2"),
        ("shapes:2;colours:9", "task 'colours' must have 9 items .* got 0"),
    ):
        with pytest.raises(TodreError, match=said):
            build(documents, num_items=told).generate_until(requests_for(documents, [0, 1]))


def test_item_counts_are_written_as_lmms_eval_hands_them_on() -> None:
    assert item_counts("a:96;b_c:3;") == {"a": 96, "b_c": 3}
    for wrong in ("a", "a:", "a:x", "a:0", 96):
        with pytest.raises(TodreError, match="num_items"):
            item_counts(wrong)
