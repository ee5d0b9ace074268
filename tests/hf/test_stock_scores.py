"""The stored runs of the converted bundled model, against those of our own class."""

from __future__ import annotations

from eval.pages.models import score_pairs

PAIRS = score_pairs()


def test_the_unpruned_model_and_both_budgets_were_run_on_all_items():
    asked = {
        (run["config"]["method"], run["config"]["options"]["retain_ratio"]) for run, _ in PAIRS
    }
    assert asked == {("vanilla", 1.0), ("todre", 0.25), ("todre", 0.1)}
    for stock, ours in PAIRS:
        assert stock["config"]["model"]["backend"] == "transformers"
        assert ours["config"]["model"]["backend"] == "auto", "which takes our class"
        assert stock["status"] == ours["status"] == "complete" and not stock["git_dirty"]
        assert [mark["num_samples"] for mark in stock["benchmarks"].values()] == [96] * 9


def test_both_classes_score_every_item_alike_with_as_many_tokens():
    for stock, ours in PAIRS:
        assert stock["benchmarks"].keys() == ours["benchmarks"].keys()
        for key, mark in stock["benchmarks"].items():
            assert mark["items"] == ours["benchmarks"][key]["items"]
        for key in ("visual_tokens", "kept_tokens", "mean_visual_tokens_per_layer"):
            assert stock["tokens"][key] == ours["tokens"][key]
        assert stock["tokens"]["withdrawn_share"] == ours["tokens"]["withdrawn_share"]
