"""The bench measures what it says, on sizes that take no time."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.bench import command, methods, stock, timing
from eval.bench import dims as sizes
from eval.bench import overhead as parts
from eval.bench import targets as bars
from eval.bench import throughput as loads
from eval.bench.answers import (
    QUESTION_TOKENS,
    STAGES,
    SYSTEM_TOKENS,
    answer,
    questions,
    random_image,
)
from eval.bench.dims import SIZES, Size, build
from llava_todre import TodreError
from llava_todre.flops import DecoderShape, TowerShape, decoder_prefill_flops
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import IMAGE_TOKEN_INDEX
from llava_todre.pruners import create_pruner
from llava_todre.selection import greedy_diverse

TINY = Size(
    DecoderShape(layers=4, width=64, mlp_width=128, heads=4, kv_heads=4, vocab=128),
    TowerShape(layers=2, width=32, mlp_width=64, image_size=56, patch_size=14),
    tower_heads=2,
)
PATCHES = 5 * 16


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LlavaLlamaForCausalLM:
    """A tiny model, which is also what the sizes ``cpu`` and ``7b`` now mean."""
    monkeypatch.setitem(SIZES, "cpu", TINY)
    monkeypatch.setitem(SIZES, "7b", replace(TINY, needs_gpu=True))
    monkeypatch.setattr(parts, "SELECTIONS", ((48, 16, 5),))
    monkeypatch.setattr(command, "PROBED", (PATCHES, 8))
    monkeypatch.setattr(command, "target_device", lambda *_: torch.device("cpu"))
    return build(TINY, torch.device("cpu"), torch.float32, "sdpa")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """Run the command; returns the JSON of its last line, and all before it."""
    assert main(["bench", "--repeats", "2", "--new-tokens", "3", *arguments]) == 0
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return json.loads(last), text


# ------------------------------------------------------------------------------ the command


def test_everything_is_measured_judged_printed_and_stored(
    tiny: LlavaLlamaForCausalLM, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "a" / "bench.json"
    result, text = run(capsys, "--out", str(out), "--ratios", "0.1", "--compare", "todre", "vtw")
    assert json.loads(out.read_text()) == result
    assert [row["label"] for row in result["methods"]] == ["vanilla", "todre 10%", "vtw 10%"]
    vanilla, todre, _ = result["methods"]
    assert (vanilla["kept_tokens"], todre["kept_tokens"]) == (PATCHES, PATCHES // 10)
    for row in result["methods"]:
        stages = {name: value["median"] for name, value in row["stages_ms"].items()}
        assert set(stages) == {*STAGES, "other"} and min(stages.values()) >= 0
        assert 0 < row["first_token_ms"]["median"] < row["total_ms"]["median"]
        assert row["kv_cache_bytes"] == row["prompt_kv_bytes"]
    assert todre["limit"]["prefill"] > todre["limit"]["first_token"] > 1
    assert todre["limit"]["decode"] > 1
    verdicts = {bar["what"]: bar["verdict"] for bar in result["bars"]}
    assert verdicts.pop("prefill speed-up at 10 % / what FLOPs allow, 7B on a GPU") == (
        "not measured"
    )
    assert len(verdicts) == 9 and set(verdicts.values()) <= {"pass", "unclear", "miss"}
    for title in (
        "Time of an answer",
        "Loads",
        "stock LLaVA-NeXT",
        "Selection",
        "What pruning adds",
        "Bars",
    ):
        assert title in text
    for key in ("device", "versions", "git_commit", "torch_threads"):
        assert key in result


def test_without_a_gpu_a_large_size_has_flops_and_no_times(
    tiny: LlavaLlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    result, text = run(capsys, "--size", "7b", "--compare", "fastv", "--ratios", "0.5")
    timed, _ = run(capsys, "--size", "cpu", "--compare", "fastv", "--ratios", "0.5")
    for counted, real in zip(result["methods"], timed["methods"], strict=True):
        assert not counted["measured"] and "total_ms" not in counted
        for key in ("prompt_tokens_per_layer", "flops", "kept_tokens"):
            assert counted[key] == real[key], "counted on a model of no width"
    assert {bar["verdict"] for bar in result["bars"]} == {"not measured"}
    assert "not measured" in text and "Time of an answer" not in text


def test_a_real_checkpoint_is_measured_by_the_same_command(
    tiny: LlavaLlamaForCausalLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(path: str, **kwargs: Any) -> tuple[Any, LlavaLlamaForCausalLM, Any, int]:
        asked.append((path, kwargs["protocol"], kwargs["dtype"], kwargs["attn_implementation"]))
        return None, tiny, None, 0

    monkeypatch.setattr(command, "load_pretrained_model", load)
    result, text = run(capsys, "--checkpoint", "some/model", "--table3", "--attention", "eager")
    assert asked == [("some/model", "paper", torch.float32, "eager")]
    assert result["checkpoint"] == "some/model" and result["size"] == "checkpoint"
    assert all(row["measured"] for row in result["methods"]) and "some/model" in text


def test_a_dry_run_names_what_would_be_measured(
    tiny: LlavaLlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--dry-run", "--size", "7b", "--table3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all("FLOPs only" in line for line in lines)
    assert main(["bench", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(": timed" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats 0 is out of range"),
        (["--new-tokens", "2"], "new-tokens 2 is out of range"),
        (["--threads", "0"], "threads 0 is out of range"),
        (["--compare", "toder"], "toder"),
        (["--ratios", "1.5"], "0 < retain_ratio <= 1, got 1.5"),
        (["--dtype", "float8"], "float8"),
        (["--attention", "flash_attention_2"], "flash_attention_2"),
    ],
)
def test_a_wrong_option_is_one_line(
    tiny: LlavaLlamaForCausalLM,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["bench", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ------------------------------------------------------------------------------ its parts


def test_runs_take_turns_and_every_other_turn_is_backwards() -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[], int]:
        return lambda: order.append(name) or len(order)

    results = timing.in_turns({"a": note("a"), "b": note("b")}, repeats=2)
    assert "".join(order) == "ab" + "ba" + "ab"
    assert results == {"a": [4, 5], "b": [3, 6]}, "the first turn warms up"
    order.clear()
    timing.in_turns({"a": note("a"), "b": note("b")}, repeats=1, warm=True)
    assert len(order) == 2


def test_percentiles_are_of_the_ratios_turn_by_turn() -> None:
    got = timing.ratios([2.0, 6.0, 12.0], [1.0, 2.0, 3.0])
    middle = {"median": 3.0, "p20": 2.4, "p80": 3.6, "count": 3}
    assert got == pytest.approx(middle | {"low": 2.0, "high": 4.0})
    one = timing.percentiles([5.0])
    assert set(one.values()) == {5.0, 1}


def test_the_interval_of_a_median_holds_it_in_95_of_100_cases() -> None:
    """By ranks: of 20 values the 6th from either end, as tables of the sign test have it."""
    found = timing.percentiles([float(value) for value in range(1, 21)])
    assert (found["low"], found["high"]) == (6.0, 15.0)
    draw = random.Random(3)
    held = 0
    for _ in range(500):
        found = timing.percentiles([draw.expovariate(1.0) for _ in range(24)])
        held += found["low"] <= math.log(2) <= found["high"]
    assert held / 500 > 0.93


def test_computing_time_is_not_waiting() -> None:
    with timing.one_thread():
        assert torch.get_num_threads() == 1
        waited = timing.computing(lambda: time.sleep(0.05))
        worked = timing.computing(lambda: [number**2 for number in range(200_000)])
    assert timing.seconds(lambda: time.sleep(0.05)) >= 0.05 > 10 * waited
    assert worked > waited


def test_prompts_share_their_first_words_and_end_together(tiny: LlavaLlamaForCausalLM) -> None:
    ids, mask = questions(tiny, [3, 7])
    assert mask.sum(1).tolist() == [SYSTEM_TOKENS + 4, SYSTEM_TOKENS + 8]
    assert (ids == IMAGE_TOKEN_INDEX).sum(1).tolist() == [1, 1]
    assert torch.equal(ids[0, 4 : 4 + SYSTEM_TOKENS], ids[1, :SYSTEM_TOKENS])
    assert not torch.equal(ids[0, -3:], ids[1, -3:])


def test_an_answer_has_the_length_asked_for_and_its_stages_add_up(
    tiny: LlavaLlamaForCausalLM,
) -> None:
    ids, mask = questions(tiny, [QUESTION_TOKENS])
    tiny.generation_config.eos_token_id = list(range(1, 128))  # it would stop at once
    steps: list[int] = []
    tiny.lm_head.register_forward_hook(lambda *_: steps.append(1))
    timed = answer(tiny, [random_image(tiny, 0)], ids, mask, 5)
    assert len(steps) == 5
    assert sum(timed.stages_ms.values()) == pytest.approx(timed.total_ms)
    assert timed.first_token_ms is not None and timed.token_ms is not None
    assert timed.first_token_ms + 4 * timed.token_ms <= timed.total_ms
    assert tiny.last_stats[0].visual_tokens == PATCHES


def test_sizes_have_the_dimensions_they_are_named_after() -> None:
    for name, size in SIZES.items():
        views, tower = 5, size.tower
        assert views * tower.patches == 2880, name
    decoder = SIZES["7b"].decoder
    model = build(sizes.thin(SIZES["7b"]), torch.device("cpu"), torch.float32, "sdpa")
    assert model.config.num_hidden_layers == decoder.layers == 32
    assert methods.tower_shape(model).layers == SIZES["7b"].tower.layers == 23
    shares = []
    for size in (SIZES["cpu"], SIZES["7b"]):
        layers = [2945] * size.decoder.layers
        flops = methods.counted(size.decoder, size.tower, 5, layers, 8, 4, True)["flops"]
        shares.append(flops["vision"] / flops["prefill"])
    assert shares[0] == pytest.approx(shares[1], rel=0.1), "the CPU size keeps the tower's share"
    probed = create_pruner("todre").probe_layers(SIZES["cpu"].decoder.layers)
    assert max(probed) < SIZES["cpu"].decoder.layers - 1, "withdrawal saves at least a layer"


def test_the_limit_counts_what_the_attention_computes(tiny: LlavaLlamaForCausalLM) -> None:
    shape = tiny.decoder_shape
    for skips in (True, False):
        full, less = (
            methods.counted(shape, TINY.tower, 5, [count] * 4, 3, 4, skips) for count in (146, 74)
        )
        wanted = [decoder_prefill_flops(shape, [n] * 4, causal=skips) for n in (146, 74)]
        got = methods._limits(less, full)["prefill"]
        assert got == pytest.approx(wanted[0] / wanted[1])


def test_the_plain_loop_picks_what_the_kernel_picks(draw: torch.Generator) -> None:
    features = torch.randn(60, 12, generator=draw)
    assert torch.equal(parts.plain_greedy(features, 20), greedy_diverse(features, 20, 0, "max_sum"))


def test_probes_are_made_at_every_layer_from_the_middle_on_and_withdraw_nothing(
    tiny: LlavaLlamaForCausalLM,
) -> None:
    rows = parts.probe(tiny, {PATCHES: 2, 8: 2})
    assert [row["probes"] for row in rows] == [2, 2]
    assert all(row["inside"]["median"] > 0 for row in rows)


def test_attached_but_off_gives_the_logits_of_the_untouched_model(
    tiny: LlavaLlamaForCausalLM,
) -> None:
    plain = parts.untouched(tiny)
    assert type(plain.model).__name__ == "LlamaModel"
    assert plain.model.layers is tiny.model.layers and plain.lm_head is tiny.lm_head
    assert parts.attached_but_off(tiny, 8, repeats=2)["same_logits"]


def test_the_row_of_cls_is_a_part_of_the_tower(tiny: LlavaLlamaForCausalLM) -> None:
    got = parts.cls_row(tiny, repeats=3)
    assert got["views"] == 5 and 0 < got["inside"]["median"] < 1


def test_loads_are_rates_over_the_unpruned_model_one_by_one(
    tiny: LlavaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    original = loads.answer

    def spy(
        model: LlavaLlamaForCausalLM, pictures: Any, ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked.append((type(model.pruner).__name__, len(ids), len(pictures)))
        return original(model, pictures, ids, *args, **kwargs)

    monkeypatch.setattr(loads, "answer", spy)
    got = loads.loads(tiny, repeats=1)
    assert set(asked) == {("Vanilla", 1, 1), ("Todre", 18, 1), ("Todre", 8, 8)}
    rates = {name: value["median"] for name, value in got["samples_per_s"].items()}
    assert got["batched"]["median"] == pytest.approx(rates["batch"] / rates["one by one"])


def test_a_stock_model_has_the_same_loads(
    tiny: LlavaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, bool]] = []
    original = stock.StockModel.answer

    def spy(model: Any, requests: Any, **kwargs: Any) -> Any:
        asked.append(
            (type(model.pruner).__name__, len(requests), kwargs["image_cache"] is not None)
        )
        answers = original(model, requests, **kwargs)
        assert {len(each.stats.images) for each in answers} == {1}
        return answers

    monkeypatch.setattr(stock.StockModel, "answer", spy)
    got = stock.stock_loads(tiny, repeats=1)
    assert set(asked) == {("Vanilla", 1, False), ("Todre", 18, True)}
    rates = {name: value["median"] for name, value in got["samples_per_s"].items()}
    expected = rates["per picture"] / rates["one by one"]
    assert got["per_picture"]["median"] == pytest.approx(expected)


# ------------------------------------------------------------------------------ the goals


def result(size: str = "cpu", on_gpu: bool = False, **values: float) -> dict[str, Any]:
    """Return what the bars read, all of it good unless given otherwise."""
    given = {"of_limit": 0.9, "selection": 0.01, "inside": 0.01, "added": 0.005, "rate": 7.0}
    given |= values
    part = {"inside": {"median": given["inside"]}, "added": {"median": given["added"]}}
    todre = {"method": "todre", "options": {"retain_ratio": 0.1}, "measured": True}
    todre |= {"prefill_of_limit": {"median": given["of_limit"]}}
    todre |= {"selection_of_prefill": {"median": given["selection"]}}
    rate = {"median": given["rate"]}
    return {
        "decoder": SIZES[size].decoder.as_dict(),
        "on_gpu": on_gpu,
        "methods": [todre],
        "probe": [part, part],
        "cls_row": part,
        "loads": {"per_picture": rate, "batched": rate},
        "stock_loads": {"per_picture": rate},
        "attached_but_off": part,
    }


def verdicts(given: dict[str, Any]) -> list[str]:
    return [bar["verdict"] for bar in bars.judged(given)]


def test_every_goal_can_be_met_and_missed() -> None:
    assert verdicts(result()) == ["not measured", *["pass"] * 9]
    assert verdicts(result("7b", True)) == ["pass", "not measured", *["pass"] * 8]
    bad = {"of_limit": 0.79, "selection": 0.021, "inside": 0.031, "added": 0.031, "rate": 3.9}
    assert verdicts(result(**bad)) == ["not measured", *["miss"] * 9]
    assert verdicts(result("7b", True, of_limit=0.84))[0] == "miss"
    assert verdicts(result("7b"))[:2] == ["not measured"] * 2, "a 7B decoder, but no GPU"
    assert verdicts(result("13b", True))[:2] == ["not measured"] * 2
    nothing = {"decoder": {}, "on_gpu": False, "methods": []}
    assert verdicts(nothing) == ["not measured"] * 10


def test_a_miss_that_noise_may_explain_is_unclear() -> None:
    def verdict(median: float, low: float, high: float, index: int = 8) -> str:
        given = result()
        found = {"median": median, "low": low, "high": high}
        given["attached_but_off"] = {"added": found}
        given["loads"] = {"per_picture": found, "batched": found}
        return verdicts(given)[index]

    assert verdict(0.009, -0.05, 0.05) == "pass"
    assert verdict(0.046, 0.008, 0.08) == "unclear", "a machine with other work"
    assert verdict(0.046, 0.030, 0.08) == "miss", "certain"
    assert (
        verdict(5.5, 5.0, 6.1, index=6) == "unclear" and verdict(5.5, 5.0, 5.9, index=6) == "miss"
    )


def test_on_a_gpu_a_part_is_judged_by_what_it_adds_to_the_whole() -> None:
    assert verdicts(result(inside=0.5))[3:6] == ["miss"] * 3
    assert verdicts(result("7b", True, inside=0.5))[3:6] == ["pass"] * 3


def test_an_unknown_method_in_the_comparison_is_an_error() -> None:
    with pytest.raises(TodreError, match="toder"):
        methods.contenders(["toder"], [0.1])
