"""Suite files are complete, and lmms-eval's results become scores on the papers' scale."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from eval.mini import TASKS
from eval.results.item_scores import item_scores
from eval.run import suites
from eval.run.scoring import UNKNOWN, scores
from eval.run.suites import ROOT, Benchmark, Suite, load_suite, suite_names
from llava_todre.errors import TodreError

PUBLISHED = yaml.safe_load((ROOT / "configs" / "paper" / "published.yaml").read_text())


# ------------------------------------------------------------------------------- the files


def test_suites_list_the_papers_benchmarks_in_the_papers_order() -> None:
    for name, columns in {
        "image": PUBLISHED["image_benchmarks"],
        "image_local": PUBLISHED["image_benchmarks"],
        "video": PUBLISHED["video_benchmarks"],
        "video_local": PUBLISHED["video_benchmarks"],
        "ablation": PUBLISHED["ablation_benchmarks"],
        "mini": list(TASKS),
    }.items():
        marks = load_suite(name).benchmarks
        assert [mark.key for mark in marks if mark.averaged] == columns, name
        extra = [mark.key for mark in marks if not mark.averaged]
        assert extra == (["mme_total"] if "mme" in columns else []), name


@pytest.mark.parametrize("name", suite_names())
def test_every_key_of_a_suite_file_has_a_comment(name: str) -> None:
    lines = (suites.SUITES / f"{name}.yaml").read_text().splitlines()
    bare = [line for line in lines if line and "#" not in line and not line.endswith(":")]
    assert bare == []


def test_numbers_of_items_are_those_the_papers_state() -> None:
    sizes = {
        mark.key: sum(mark.samples.values())
        for name in ("image", "video")
        for mark in load_suite(name).benchmarks
    }
    stated = {"mme": 2374, "scienceqa": 6258, "gqa": 12578, "vizwiz": 8000, "vqav2": 107394}
    stated |= {"videomme": 2700, "egoschema": 5031, "mlvu": 2174, "longvideobench": 1337}
    assert {key: sizes[key] for key in stated} == stated


def test_only_pope_and_scienceqa_put_several_tasks_together() -> None:
    marks = [mark for name in ("image", "video") for mark in load_suite(name).benchmarks]
    several = {mark.key: mark.combine for mark in marks if mark.combine != "single"}
    assert several == {"scienceqa": "weighted", "pope": "mean"}


def test_a_derived_suite_differs_only_in_what_it_says() -> None:
    image, local = load_suite("image"), load_suite("image_local")
    differ = [a.key for a, b in zip(image.benchmarks, local.benchmarks, strict=True) if a != b]
    assert differ == ["vizwiz", "vqav2"]
    assert load_suite("ablation").benchmarks == image.benchmarks[:5]
    assert not any(mark.submission for mark in local.benchmarks)
    videos = load_suite("video_local").benchmarks
    assert not any(mark.submission for mark in videos)
    assert {(mark.frames, mark.sampling) for mark in videos} == {(5, "uniform")}


def test_tasks_of_a_suite_are_listed_once() -> None:
    mark = load_suite("image").benchmarks[0]
    assert Suite("twice", (mark, replace(mark, key="again")), None, None).tasks == ("mme",)
    assert load_suite("image").include == ROOT / "configs" / "tasks"


GOOD = """
include: configs/tasks
data: null
defaults: {split: test, metric: m, factor: 1, scale: percent, combine: single, media: image,
  frames: null, sampling: null, submission: null, judge: false, item_metric: null, note: null}
benchmarks:
  one: {tasks: {one_task: 4}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of configs/suites."""
    monkeypatch.setattr(suites, "SUITES", tmp_path)
    load_suite.cache_clear()
    yield tmp_path
    load_suite.cache_clear()


def test_a_suite_is_read_with_its_defaults(folder: Path) -> None:
    (folder / "good.yaml").write_text(GOOD)
    (mark,) = load_suite("good").benchmarks
    assert (mark.key, mark.tasks, mark.samples) == ("one", ("one_task",), {"one_task": 4})
    assert mark.metric == "m"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "scale: percent",
            "scale: per cent",
            "scale must be 'percent' or 'points', got 'per cent'",
        ),
        ("combine: single", "combine: mean", "combine 'mean' does not fit 1 tasks"),
        ("one_task: 4", "one_task: 4, two: 4", "combine 'single' does not fit 2 tasks"),
        ("media: image", "media: video", "do not fit media 'video'"),
        ("frames: null", "frames: 5", "do not fit media 'image'"),
        ("sampling: null", "sampling: uniform", "do not fit media 'image'"),
        ("sampling: null", "sampling: random", "sampling must be 'uniform' or null, got 'random'"),
        ("factor: 1", "factor: 0", "factor must be a number above 0, got 0"),
        ("factor: 1", "factor: true", "factor must be a number above 0, got True"),
        ("judge: false", "judge: 0", "judge must be true or false, got 0"),
        ("split: test", "split: 3", "split must be text, got 3"),
        ("item_metric: null", "item_metric: 3", "item_metric must be text or null, got 3"),
        ("note: null", "note: 3", "note must be text or null, got 3"),
        ("note: null", "note: null, averaged: 1", "averaged must be true or false, got 1"),
        (
            "note: null",
            "note: null, watched_answer: 1",
            "watched_answer must be text or null, got 1",
        ),
        (
            "note: null",
            "note: null, submission_entries: 0",
            "submission_entries must be a whole number, 1",
        ),
        ("metric: m,", "", "key 'metric' is missing"),
        ("note: null", "note: null, nte: 1", "key 'nte' is unknown. Did you mean 'note'"),
        ("{one_task: 4}", "{}", "tasks {} must give a number of items"),
        ("{one_task: 4}", "one_task", "tasks must hold 'key: value' lines"),
        ("one_task: 4", "one_task: 0", "must give a number of items"),
        ("configs/tasks", "configs/none", "include 'configs/none' is not a folder"),
        ("data: null", "data: maxi", "data must be 'mini' or null, got 'maxi'"),
        ("defaults:", "default:", "key 'default' is unknown. Did you mean 'defaults'"),
        ("one: {tasks: {one_task: 4}}", "one: 4", "benchmark 'one' must hold"),
        ("benchmarks:", "benchmarks: [", "is not valid YAML"),
        ("factor: 1", "factor: 1, factor: 2", "key 'factor' is there twice"),
        ("note: null", "note: null, block: 0", "block must be a whole number, 1 or more, got 0"),
        ("data: null", "base: none", "base 'none' is unknown"),
        ("data: null", "only: [two]", "only 'two' is unknown"),
        ("data: null", "only: []", "has no benchmarks"),
    ],
)
def test_mistakes_in_a_suite_file_are_named(folder: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    (folder / "bad.yaml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(TodreError) as raised:
        load_suite("bad")
    assert message in str(raised.value)
    assert "'bad'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_suite_is_told_the_names() -> None:
    with pytest.raises(TodreError, match="suite 'vidoe' is unknown. Did you mean 'video'"):
        load_suite("vidoe")


# ------------------------------------------------------------------------------- own task files

OWN = {
    "vqav2/todre_vqav2_testdev": ("vqav2/vqav2_test", {"test_split"}),
    "mmbench/todre_mmbench_cn_dev_static": (
        "mmbench/mmbench_cn_dev",
        {"doc_to_text", "model_specific_generation_kwargs"},
    ),
    "egoschema/todre_egoschema": ("egoschema/egoschema", {"process_results"}),
    "egoschema/todre_egoschema_subset": ("egoschema/egoschema_subset", {"process_results"}),
    "longvideobench/todre_longvideobench_val_v": (
        "longvideobench/longvideobench_val_v",
        {"process_results"},
    ),
}


@pytest.mark.parametrize("own", OWN)
def test_own_task_files_follow_lmms_evals_but_for_what_they_say(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval")
    decord = ModuleType("decord")  # theirs imports it; it is not installed, nobody maintains it
    vars(decord).update(VideoReader=None, cpu=None)
    monkeypatch.setitem(sys.modules, "decord", decord)
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    name, intended = OWN[own]
    theirs = Path(lmms_eval.tasks.__file__).parent / f"{name}.yaml"
    ours = ROOT / "configs" / "tasks" / f"{own}.yaml"
    loaded = [_plain(load_yaml_config(str(path), mode="full")) for path in (ours, theirs)]
    differ = {
        key
        for key in loaded[0].keys() | loaded[1].keys()
        if loaded[0].get(key) != loaded[1].get(key)
    }
    assert differ - {"task", "metadata", "metric_list", "lmms_eval_specific_kwargs"} == intended
    default = [content["lmms_eval_specific_kwargs"]["default"] for content in loaded]
    assert default[0] == default[1]


def _plain(content: Any) -> Any:
    """Name functions, which are loaded anew for every file."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return content.__qualname__ if callable(content) else content


# ------------------------------------------------------------------------------- scores

MARK = Benchmark(
    key="one",
    tasks=("a",),
    samples={"a": 2},
    split="test",
    metric="acc",
    factor=100,
    scale="percent",
    combine="single",
    media="image",
    frames=None,
    sampling=None,
    submission=None,
    judge=False,
    item_metric="acc",
    note=None,
)
PAIR = replace(MARK, tasks=("a", "b"), samples={"a": 2, "b": 3}, combine="mean")


def _results(values: dict[str, Any], sizes: dict[str, int], whole: int | None = None) -> Any:
    return {
        "results": {task: {"alias": task, "acc,none": value} for task, value in values.items()},
        "n-samples": {
            task: {"original": whole or size, "effective": size} for task, size in sizes.items()
        },
    }


def _samples(**hits: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Records per task, the last item first."""
    return {
        task: [
            {"doc_id": number, "acc": hit, "filtered_resps": "yes"}
            for number, hit in reversed(list(enumerate(values)))
        ]
        for task, values in hits.items()
    }


def _one(mark: Benchmark, results: Any, samples: Any, folder: Path | None = None) -> dict[str, Any]:
    return scores(Suite("s", (mark,), None, None), results, samples, folder)["one"]


def test_a_score_is_on_the_papers_scale_with_its_items() -> None:
    assert _one(MARK, _results({"a": 0.5}, {"a": 2}), _samples(a=[0, 1])) == {
        "task": "a",
        "metric": "acc",
        "score": 50.0,
        "scale": "percent",
        "num_samples": 2,
        "status": "complete",
        "note": None,
        "submission": None,
        "items": [[0, 0.0], [1, 1.0]],
        "groups": None,
        "watched_answer": None,
        "averaged": True,
    }


def test_the_total_of_mme_is_the_sum_of_perception_and_cognition() -> None:
    total = {mark.key: mark for mark in load_suite("image").benchmarks}["mme_total"]
    assert total.metrics == ["mme_perception_score", "mme_cognition_score"] and not total.averaged
    mark = replace(total, key="one", tasks=("a",), samples={"a": 2})
    results = _results({"a": None}, {"a": 2})
    results["results"]["a"] |= {
        "mme_perception_score,none": 1510.7,
        "mme_cognition_score,none": 350,
    }
    found = _one(mark, results, _samples(a=[0, 1]))
    assert found["score"] == pytest.approx(1860.7)
    assert (found["scale"], found["items"], found["averaged"]) == ("points", None, False)
    del results["results"]["a"]["mme_cognition_score,none"]
    with pytest.raises(TodreError, match=r"metric 'mme_perception_score\+mme_cognition"):
        _one(mark, results, _samples(a=[0, 1]))


def test_items_about_the_same_picture_are_told_across_tasks() -> None:
    results = _results({"a": 0.5, "b": 1.0}, {"a": 2, "b": 3})
    samples = _samples(a=[0, 1], b=[1, 1, 1])
    shown = {("a", 0): "x", ("a", 1): "y", ("b", 0): "y", ("b", 1): None, ("b", 2): "x"}

    def groups(pictures: Any) -> Any:
        suite = Suite("s", (PAIR,), None, None)
        return scores(suite, results, samples, None, pictures)["one"]["groups"]

    assert groups(shown) == [0, 1, 1, 2, 0], "an item without a picture is by itself"
    assert groups(shown | {("b", 2): UNKNOWN}) is None
    assert groups(None) is None, "logs of earlier versions do not tell"


def test_the_share_of_a_watched_answer_is_told_beside_the_score() -> None:
    vizwiz = {mark.key: mark for mark in load_suite("image").benchmarks}["vizwiz"]
    assert vizwiz.watched_answer == "unanswerable"
    samples = _samples(a=[0, 1, 1, 0])
    said = ("Unanswerable.", " unanswerable", "unanswerable question", "blue")
    for record, answer in zip(samples["a"], said, strict=True):
        record["filtered_resps"] = [answer]
    found = _one(
        replace(MARK, watched_answer="unanswerable"), _results({"a": 1}, {"a": 4}), samples
    )
    assert found["watched_answer"] == {"answer": "unanswerable", "share": 0.5}


@pytest.mark.parametrize(("combine", "expected"), [("mean", 75.0), ("weighted", 80.0)])
def test_several_tasks_are_one_benchmark(combine: str, expected: float) -> None:
    results = _results({"a": 0.5, "b": 1.0}, {"a": 2, "b": 3})
    found = _one(replace(PAIR, combine=combine), results, _samples(a=[0, 1], b=[1, 1, 1]))
    assert found["score"] == pytest.approx(expected)
    assert (found["task"], found["num_samples"]) == ("a+b", 5)
    assert found["items"] == [[0, 0.0], [1, 1.0], [2, 1.0], [3, 1.0], [4, 1.0]]


Change = Callable[[Any, Any], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, s: r["results"].pop("a"), "task 'a' has no result; tasks with one: none"),
        (lambda r, s: r.pop("n-samples"), "task 'a' has no result"),
        (lambda r, s: r["results"]["a"].pop("acc,none"), "metric 'acc' is missing; found: alias"),
        (lambda r, s: r["results"]["a"].update({"acc,none": float("nan")}), "'acc' is nan"),
        (lambda r, s: r["results"]["a"].update({"acc,none": "high"}), "'acc' is 'high'"),
        (lambda r, s: r["results"]["a"].update({"acc,none": True}), "'acc' is True"),
        (lambda r, s: s.pop("a"), "has 0 sample records of 0 items; expected: 2"),
        (lambda r, s: s["a"].pop(), "has 1 sample records of 1 items; expected: 2"),
        (lambda r, s: s["a"].append(s["a"][0]), "has 3 sample records of 2 items; expected: 2"),
        (lambda r, s: s["a"][1].update(doc_id=1), "has 2 sample records of 1 items; expected: 2"),
        (lambda r, s: s["a"][0].update(acc=1.5), "task 'a', doc_id 1: acc is 1.5"),
        (lambda r, s: s["a"][0].update(acc=float("nan")), "task 'a', doc_id 1: acc is nan"),
        (lambda r, s: [x.pop("acc") for x in s["a"]], "no sample record has 'acc'"),
    ],
)
def test_what_is_missing_or_damaged_is_an_error(change: Change, message: str) -> None:
    results, samples = _results({"a": 0.5}, {"a": 2}), _samples(a=[0, 1])
    change(results, samples)
    with pytest.raises(TodreError) as raised:
        _one(MARK, results, samples)
    assert message in str(raised.value)


def test_notes_tell_limits_sizes_and_empty_answers() -> None:
    samples = _samples(a=[0, 1])
    samples["a"][0]["filtered_resps"] = [" "]
    found = _one(replace(MARK, note="a val split"), _results({"a": 0.5}, {"a": 2}, 7), samples)
    assert found["note"] == (
        "a val split; a: the first 2 of 7 items; a: 7 items on this machine, 2 expected; "
        "a: 1 empty answers"
    )
    assert found["status"] == "complete"


def test_a_metric_without_items_is_skipped_only_where_a_limit_explains_it() -> None:
    mark = replace(MARK, metric="perception", item_metric="perception")
    found = _one(mark, _results({"a": 0.5}, {"a": 2}, 7), _samples(a=[0, 1]))
    assert (found["status"], found["score"], found["items"]) == ("skipped", None, None)
    assert "no item of perception" in found["note"]
    with pytest.raises(TodreError, match="metric 'perception' is missing; found: acc,none, alias"):
        _one(mark, _results({"a": 0.5}, {"a": 2}), _samples(a=[0, 1]))


# ------------------------------------------------------------------------------- submissions

SENT = replace(MARK, submission="answers-*.json", item_metric=None)


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """Submissions of two runs; only the newer has both items."""
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "answers-2025.json").write_text("[1]")
    (tmp_path / "submissions" / "answers-2026.json").write_text("[1, 2]")
    return tmp_path


def test_a_benchmark_with_a_server_has_a_file_and_no_score(sent: Path) -> None:
    found = _one(SENT, _results({"a": None}, {"a": 2}), _samples(a=[0, 1]), sent)
    assert (found["status"], found["score"], found["items"]) == ("submission", None, None)
    assert found["submission"] == str(sent / "submissions" / "answers-2026.json")
    assert "the server must give the score" in found["note"]


def test_a_score_from_the_server_counts(sent: Path) -> None:
    mark = replace(SENT, factor=1)
    found = _one(mark, _results({"a": 41.5}, {"a": 2}), _samples(a=[0, 1]), sent)
    assert (found["status"], found["score"], found["note"]) == ("complete", 41.5, None)
    assert found["submission"]


def test_a_missing_or_incomplete_submission_is_an_error(sent: Path) -> None:
    results, samples = _results({"a": None}, {"a": 2}), _samples(a=[0, 1])
    for folder in (None, sent / "elsewhere"):
        with pytest.raises(TodreError, match="no submission file 'answers-\\*.json' in"):
            _one(SENT, results, samples, folder)
    for text, message in (("[1]", "has 1 entries; expected: 2"), ("[1,", "is not JSON")):
        (sent / "submissions" / "answers-2026.json").write_text(text)
        with pytest.raises(TodreError, match=message):
            _one(SENT, results, samples, sent)


# ------------------------------------------------------------------------------- items


def test_items_are_read_where_the_suite_says() -> None:
    records = [
        {"doc_id": 1, "f1": {"score": 1.0}, "choice": {"pred": 2, "truth": "2"}},
        {"doc_id": 0, "f1": {"score": 0.25}, "choice": {"pred": 3, "truth": "2"}},
        {"doc_id": 2, "of another metric": 1},
    ]
    assert item_scores("f1.score", "t", records) == [(0, 0.25), (1, 1.0)]
    assert item_scores("choice.pred=truth", "t", records) == [(0, 0.0), (1, 1.0)]
    with pytest.raises(TodreError, match="task 't', doc_id 1: choice has no 'truht'"):
        item_scores("choice.pred=truht", "t", records)


def test_a_mmbench_question_is_right_when_all_its_rotations_are() -> None:
    pytest.importorskip("lmms_eval")

    def record(number: int, index: int, answer: str, said: str) -> dict[str, Any]:
        options = {"A": "red", "B": "blue", "C": "nan", "D": "nan", "E": "nan"}
        value = {"index": index, "answer": answer, "prediction": said, **options}
        return {"doc_id": number, "gpt_eval_score": value}

    records = [
        record(0, 7, "A", "A"),
        record(1, 1_000_007, "B", "B"),
        record(2, 8, "A", "A"),
        record(3, 1_000_008, "B", "A"),
        record(4, 9, "B", "(B) blue"),
        record(5, 10, "B", "none"),
    ]
    expected = [(0, 1.0), (2, 0.0), (4, 1.0), (5, 0.0)]
    assert item_scores("circular", "t", list(reversed(records))) == expected
    del records[0]["gpt_eval_score"]
    with pytest.raises(TodreError, match="a sample record has no 'gpt_eval_score'"):
        item_scores("circular", "t", records)


def test_scores_are_json() -> None:
    found = _one(MARK, _results({"a": 0.5}, {"a": 2}), _samples(a=[0, 1]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
