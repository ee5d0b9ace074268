"""The command line refuses what it cannot use: one line, no traceback, no hang, no answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from refusals import BOMB, DEEP, refused

from llava_todre.cli import main

GOLDEN = Path(__file__).parent / "golden"
MODEL = str(GOLDEN / "llava-v1.6-tiny")
IMAGE = str(GOLDEN / "v16_0.png")

# ------------------------------------------------------------------------------ options, by value

GENERATE: dict[str, list[str]] = {
    "--retain-ratio": ["0", "-0.1", "1.5", "nan", "inf", "-inf", "abc", "1e999", "0,1", "", "1j"],
    "--retain-tokens": ["0", "-1", "1.5", "abc", "nan", "", "0x", "1e3"],
    "--max-new-tokens": ["0", "-1", "1.5", "abc", "nan", ""],
    "--dtype": ["int8", "float23", "complex64", "bool", "", "torch.float32;", "FLOAT"],
    "--device-map": ["cuda:99", "nowhere", "cpu:x", "{}", "meta:7"],
    "--attn-implementation": ["flash", "sdp", "", "flex", "paged|x"],
    "--backend": ["x", "", "vllm2", "LLaVA"],
    "--protocol": ["x", "", "papr", "Paper"],
    "--template": ["vicuna", "", "v2", "plain "],
    "--method": [
        "tudre", "", "+", "todre+", "+todre", "todre+todre+todre", "todre + vtw", "A+B", "no.yaml",
        "vanilla ", "Todre", "todre,random", "../todre", "todre+vanillla",
    ],
    "--option": [
        "tau", "tau=x", "tau=[", "=1", "tua=0.1", "tau=.nan", "tau=.inf", "tau=-1", "tau=2",
        "tau=null", "tau={}", "tau=2026-13-45", "tau=true", "cls_layer=a", "cls_layer=99",
        "cls_layer=.nan", "cls_layer=[1]", "probe_depths=0.5", "probe_depths=[2]",
        "probe_depths=[a]", "probe_depths=[0]", "probe_depths=[.nan]", "probe_depths={}",
        "retain_ratio=.nan", "retain_tokens=1.0", "seed=x", "before.tau=1", "tau=" + "9" * 6000,
        "tau=" + DEEP,
    ],
    "--image": [
        "nope.png", "", ".", str(GOLDEN), str(GOLDEN / "README.md"), "/dev/null", "/dev/zero",
        "data:image/png;base64,AAAA", "data:image/png;base64,%%%", "data:,", "data:text/html,x",
        "http://127.0.0.1:9/x.png", "ftp://127.0.0.1/x.png", "file:///etc/passwd", "~nobody/x.png",
        "a" * 5000, "x\ny.png",
    ],
    "--question": ["", " ", "\n", "<image>", "<image> and <image>?", "<image><image><image>"],
    "--picture": ["no_such_folder/kept.png", ".", "kept.unknown", "", "/dev/full/x.png"],
    "--fps": ["0", "-1", "nan", "inf", "abc", "2"],
    "--config": ["nope.yaml", ".", MODEL],
    "--clip-text": ["no_such_folder/clip", "", str(GOLDEN)],
    "--model": ["no_such_folder/x", "", ".", str(GOLDEN), str(GOLDEN / "clip-v16"), IMAGE,
                "/dev/null", "a" * 5000, "../" * 40 + "x", "owner/name/extra"],
    "--no-such-option": ["1"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hub ids are looked up nowhere; what is written by mistake lands in a folder of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def generate(changes: dict[str, str]) -> list[str]:
    given = {"--model": MODEL, "--image": IMAGE, "--question": "what", "--max-new-tokens": "2"}
    return ["generate", *(f"{key}={value}" for key, value in (given | changes).items())]


def cases(table: dict[str, list[str]]) -> list[Any]:
    pairs = [(key, value) for key, values in table.items() for value in values]
    return [pytest.param(key, value, id=f"{key}={value[:20]!r}") for key, value in pairs]


@pytest.mark.parametrize(("key", "value"), cases(GENERATE))
def test_generate(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(main, generate({key: value}), capsys)


COMMANDS: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["generat"],
    "demo: ratio 0": ["demo", "--ratios", "0"],
    "demo: ratio above 1": ["demo", "--ratios", "0.5", "1.5"],
    "demo: ratio nan": ["demo", "--ratios", "nan"],
    "demo: ratio is a word": ["demo", "--ratios", "abc"],
    "demo: no images": ["demo", "--num-images", "0"],
    "demo: negative images": ["demo", "--num-images", "-4"],
    "demo: far too many images": ["demo", "--num-images", "1000000000000"],
    "demo: unknown method": ["demo", "--methods", "tudre"],
    "demo: empty method": ["demo", "--methods", ""],
    "demo: missing model": ["demo", "--model", "no_such_folder/x"],
    "demo: out is a file": ["demo", "--num-images", "1", "--out", IMAGE],
    "demo: page option": ["demo", "--port", "1234"],
    "ui: port too large": ["ui", "--port", "70000"],
    "ui: negative port": ["ui", "--port", "-1"],
    "ui: port is a word": ["ui", "--port", "abc"],
    "ui: host empty": ["ui", "--host", ""],
    "ui: host unknown": ["ui", "--host", "no such host"],
    "demo: page, comparison option": ["demo", "--ui", "--ratios", "0.3"],
    "convert: no out": ["convert", "--model", MODEL],
    "convert: out empty": ["convert", "--model", MODEL, "--out", ""],
    "convert: out is a file": ["convert", "--model", MODEL, "--out", IMAGE],
    "convert: out is not empty": ["convert", "--model", MODEL, "--out", str(GOLDEN)],
    "convert: out cannot be": ["convert", "--model", MODEL, "--out", "/dev/null/x"],
    "convert: template": ["convert", "--model", MODEL, "--out", "new", "--template", "vicuna"],
    "convert: dtype": ["convert", "--model", MODEL, "--out", "new", "--dtype", "int4"],
    "convert: model": ["convert", "--model", "no_such_folder/x", "--out", "new"],
    "list: argument": ["list", "--all"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(main, arguments, capsys)
    assert not Path("new").exists()


# ------------------------------------------------------------------------------------ image files


IMAGES: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("not an image"),
    "too many pixels": lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"),
    "fifo": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere.png"),
    "link to itself": lambda path: path.symlink_to(path.name),
}
"""What else is no image: ``model/test_images.py`` and ``model/test_rgb.py``."""


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES.keys())
def test_image_files(
    make: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "image.png")
    refused(main, generate({"--image": "image.png"}), capsys)


# --------------------------------------------------------------------------- YAML that users write

YAMLS: dict[str, str] = {
    "a number": "3",
    "alias bomb": BOMB,
    "unknown method": "method: tudre",
    "method is a list": "method: [todre]",
    "unknown option": "method: todre\ntua: 0.1",
    "value of wrong type": "method: todre\ntau: {a: 1}",
    "ratio is a date": "method: todre\nretain_ratio: 2026-11-28",
    "no method": "tau: 0.1",
}
"""What no YAML file may hold: ``test_files.py``."""


@pytest.mark.parametrize("content", YAMLS.values(), ids=YAMLS.keys())
def test_method_files(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(content)
    line = refused(main, generate({"--method": "mine.yaml"}), capsys)
    assert "mine.yaml" in line


# -------------------------------------------------------------------------------- config.json

CONFIGS: dict[str, list[Any]] = {
    "hidden_size": [10**12, [64]],
    "num_attention_heads": [3],
    "max_position_embeddings": [0, "4096"],
    "mm_hidden_size": [7],
    "mm_projector_type": ["resampler", None],
    "mm_vision_select_layer": [99],
    "mm_vision_tower": ["no_such_folder/tower", None],
    "image_grid_pinpoints": ["x", [], [[57, 57]], "[" * 3000, [[56, 10**9]]],
    "rope_scaling": [{"type": "no_such"}],
    "model_type": ["no_such", 3],
    "quantization_config": [{"quant_method": "no_such"}, {"quant_method": "awq", "bits": 4}],
}
"""All keys, with the words of each refusal: ``model/test_config_check.py``."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose config.json may be overwritten."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("llava-v1.6-tiny", "clip-v16"):
        shutil.copytree(GOLDEN / name, folder / name)
    return folder / "llava-v1.6-tiny"


def config_cases() -> list[Any]:
    pairs = [(key, value) for key, values in CONFIGS.items() for value in values]
    return [pytest.param(key, value, id=f"{key}={str(value)[:20]}") for key, value in pairs]


@pytest.mark.parametrize(("key", "value"), config_cases())
def test_config_values(
    key: str, value: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads((GOLDEN / "llava-v1.6-tiny" / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(good | {key: value}))
    refused(main, generate({"--model": str(checkpoint)}), capsys)


FILES: dict[str, str | bytes | None] = {
    "missing": None,
    "empty": "",
    "null": "null",
    "list": "[]",
    "half": '{"model_type": ',
    "binary": bytes(range(256)),
    "nested too deep": '{"a": ' + DEEP,
    "long number": '{"hidden_size": ' + "9" * 6000 + "}",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_checkpoint_files(
    name: str,
    content: str | bytes | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for part in ("llava-v1.6-tiny", "clip-v16"):
        shutil.copytree(GOLDEN / part, tmp_path / part)
    file = tmp_path / "llava-v1.6-tiny" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(main, generate({"--model": str(file.parent)}), capsys)
