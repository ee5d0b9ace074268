"""The command line: reports, and one clear line for every mistake."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_todre import TodreError, vlm
from llava_todre.cli import main
from llava_todre.flops import DecoderShape, decoder_prefill_flops
from llava_todre.pruners import PRUNERS
from llava_todre.report import _prefill

GOLDEN = Path(__file__).parent / "golden"
MODEL = str(GOLDEN / "llava-v1.6-tiny")
IMAGE = str(GOLDEN / "v16_0.png")


def generate(*extra: str, model: str = MODEL, image: str = IMAGE, question: str = "what") -> int:
    fixed = ["generate", "--model", model, "--image", image, "--question", question]
    return main([*fixed, "--max-new-tokens", "2", *extra])


def test_text_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "kept.png"
    assert generate("--retain-ratio", "0.25", "--picture", str(picture)) == 0
    out = capsys.readouterr().out
    assert "16 of 64 visual tokens kept (25.0%)" in out
    assert "probe      after layer 7" in out and "withdrawn  never" in out
    mean = re.search(r"^per layer  ([\d.]+) visual tokens, newlines included", out, re.MULTILINE)
    share = re.search(r"^prefill    ([\d.]+)% of the FLOPs of the unpruned", out, re.MULTILINE)
    assert mean and 16.5 < float(mean[1]) <= 24 and share and 30 < float(share[1]) < 70
    assert Image.open(picture).width > 200


def test_json_report_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--method", "todre_v1", "--option", "tau=1.0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["withdrawn_from"] == 5
    assert report["probes"][0]["layer"] == 4
    assert report["kept_tokens"] == len(report["keep_idx"][0]) == 6
    assert report["visual_tokens_per_layer"][4] > 0 == report["visual_tokens_per_layer"][5]


@pytest.mark.parametrize("method", ["todre_v1", "fastv"])
def test_flops_are_those_of_the_layers_and_of_a_run_without_pruning(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*extra: str) -> dict[str, Any]:
        assert generate(*extra, "--json") == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    pruned = report("--method", method, "--retain-ratio", "0.1")
    unpruned = report("--method", "vanilla")
    sizes = json.loads((Path(MODEL) / "config.json").read_text())
    shape = DecoderShape(
        *(sizes[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")),
        *(sizes[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size")),
    )
    for each in (pruned, unpruned):
        layers = [each["text_tokens"] + count for count in each["visual_tokens_per_layer"]]
        assert each["prefill_flops"] - each["probe_flops"] == decoder_prefill_flops(shape, layers)
        mean = sum(each["visual_tokens_per_layer"]) / shape.layers
        assert each["mean_visual_tokens"] == pytest.approx(mean)
    assert pruned["probe_flops"] > unpruned["probe_flops"] == 0
    assert pruned["prefill_flops"] < 0.7 * unpruned["prefill_flops"]
    assert pruned["prefill_flops_unpruned"] == unpruned["prefill_flops"]
    assert unpruned["prefill_flops_unpruned"] == unpruned["prefill_flops"]


def test_paper_protocol_keeps_five_views_without_newlines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate("--protocol", "paper", "--json", "--retain-ratio", "1") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["visual_tokens"] == 5 * 16
    assert report["newline_tokens"] == 0


def test_every_method_file_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "load_pretrained_model", functools.cache(vlm.load_pretrained_model))
    for file in sorted((Path(__file__).parents[1] / "configs" / "methods").glob("*.yaml")):
        assert generate("--method", str(file)) == 0, file
    assert "vanilla" in capsys.readouterr().out


def test_a_combination_has_no_method_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "random+vtw"]) == 1
    assert "method 'random+vtw' is unknown" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "prunes", "text", "paper"]
    assert len(PRUNERS) >= 20
    for line, (name, method) in zip(lines, PRUNERS.items(), strict=False):
        shown, place, text, paper = re.split(r" {2,}", line)
        assert (shown, paper) == (name, method.about.paper)
        assert place in ("before", "inside", "both") or name == "vanilla"
        assert text in ("yes", "no")
    blank, _, combination, _, *folders = lines[len(PRUNERS) :]
    assert blank == "" and combination == "A+B: Stage 1 of A, decoder stage of B."
    methods, tasks = (Path(line.partition(": ")[2]) for line in folders)
    assert (methods / "todre.yaml").is_file() and (tasks / "mmbench" / "utils.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra": ["--method", "tudre"]}, "Did you mean 'todre'?"),
        ({"extra": ["--retain-ratio", "0"]}, "0 < retain_ratio <= 1, got 0.0"),
        ({"extra": ["--retain-ratio", "1.5"]}, "0 < retain_ratio <= 1, got 1.5"),
        ({"extra": ["--option", "retain_ratio=.nan"]}, "0 < retain_ratio <= 1, got nan"),
        ({"extra": ["--retain-tokens", "0"]}, "retain_tokens >= 1, or null, got 0"),
        ({"extra": ["--option", "tua=0.1"]}, "Did you mean 'tau'?"),
        ({"extra": ["--option", "tau=x"]}, "tau must be a number, 0 <= tau <= 1, got 'x'"),
        ({"extra": ["--option", "probe_depths=0.5"]}, "probe_depths must be a list of numbers"),
        ({"extra": ["--option", "tau"]}, "must be of the form KEY=VALUE, got 'tau'"),
        ({"extra": ["--option", "tau=["]}, "not valid YAML"),
        ({"extra": ["--option", "cls_layer=a"]}, "cls_layer must be a whole number, got 'a'"),
        ({"extra": ["--option", "cls_layer=99"]}, "vision layer of cls_attention must be from"),
        (
            {"extra": ["--method", "random", "--option", "seed=x"]},
            "seed must be a whole number",
        ),
        ({"extra": ["--method", "missing.yaml"]}, "method file 'missing.yaml' cannot be read"),
        ({"extra": ["--template", "vicuna"]}, "Did you mean 'vicuna_v1'?"),
        ({"extra": ["--protocol", "papr"]}, "Did you mean 'paper'?"),
        ({"extra": ["--dtype", "float23"]}, "float32"),
        ({"extra": ["--attn-implementation", "flash"]}, "flash_attention_2"),
        ({"extra": ["--max-new-tokens", "0"]}, "max_new_tokens 0 is out of range"),
        ({"extra": ["--picture", "no_such_folder/kept.png"]}, "picture"),
        ({"question": " "}, "question"),
        ({"question": "<image> or <image>?"}, "2"),
        ({"image": "nope.png"}, "image 'nope.png' does not exist"),
        ({"image": str(GOLDEN)}, "is a directory"),
        ({"image": str(GOLDEN / "README.md")}, "must be one of PNG"),
        ({"model": "no_such_folder/x"}, "no_such_folder/x"),
        ({"model": str(GOLDEN / "clip-v16")}, "not of a LLaVA checkpoint"),
    ],
)
def test_each_mistake_gets_one_line_and_no_traceback(
    arguments: dict[str, str | list[str]],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    extra = arguments.pop("extra", [])
    assert generate(*extra, **arguments) == 1  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("todre:")]
    assert len(lines) == 1
    assert message in lines[0]


def copy_of_model(folder: Path) -> Path:
    shutil.copytree(GOLDEN, folder / "golden", ignore=shutil.ignore_patterns("*.png", "*_exp*"))
    return folder / "golden" / "llava-v1.6-tiny"


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = tmp_path / "half.png"
    truncated.write_bytes(Path(IMAGE).read_bytes()[:5000])
    assert generate(image=str(truncated)) == 1
    assert "damaged" in capsys.readouterr().err

    model = copy_of_model(tmp_path)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert generate(model=str(model)) == 1
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["vanilla", "random", "todre"])
@pytest.mark.parametrize("damaged", ["mm_projector.2.bias", "layers.2.mlp.down_proj.weight"])
def test_nan_weights_are_an_error_not_an_empty_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, damaged: str
) -> None:
    model = copy_of_model(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{damaged}"].view(-1)[0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert generate("--method", method, model=str(model)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "todre:" in line]
    assert "must be finite" in line


def test_debug_shows_where_it_happened() -> None:
    wrong = ["generate", "--model", MODEL, "--image", "nope.png", "--question", "what"]
    for asked in (["--debug", *wrong], [*wrong, "--debug"]):
        with pytest.raises(TodreError, match=r"nope\.png"):
            main(asked)


def test_what_nobody_foresaw_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_todre.vlm.OwnModel.answer", lambda *a, **k: 1 / 0)
    assert generate() == 1
    assert "ZeroDivisionError: division by zero (--debug shows where)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--nope", "1"], "--nope"),
        (["--retain-ratio", "much"], "much"),
        (["--max-new-tokens", "1.5"], "1.5"),
    ],
)
def test_bad_usage_is_one_line_and_exits_with_2(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(*wrong)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--model", MODEL])
    assert "image" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_decoders(bits: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    reports = []
    for extra in ([], [f"--load-{bits}"]):
        assert generate(*extra, "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))
    # The tower is as it was, and with it what Stage 1 keeps.
    assert reports[0]["keep_idx"] == reports[1]["keep_idx"]
    assert reports[0]["probes"] != reports[1]["probes"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--load-8bit", "--load-4bit"], "load_8bit and load_4bit were both given"),
        (["--model-base", str(GOLDEN / "llava-v1.5-tiny")], "leave model_base out"),
    ],
)
def test_options_of_loading(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*extra) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_flops_that_are_not_known_are_not_told() -> None:
    told = {"prefill_flops": None, "prefill_flops_unpruned": None, "probe_flops": None}
    assert _prefill(told) == "FLOPs of this decoder are not known"
    told = {"prefill_flops": 50.0, "prefill_flops_unpruned": 100.0, "probe_flops": 0.01}
    assert _prefill(told).endswith("prefill (50 of 100)")
    assert _prefill(told | {"probe_flops": 1}).endswith(
        "of 100, 2.0% of it for the method's probes)"
    )
