"""The wheel in an environment of its own, used from another folder: what pip installs works.

Only third-party packages are borrowed from the environment of the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.mini import fixtures, held_out

ROOT = Path(__file__).parents[1]
MINI = ROOT / "checkpoints" / "mini"
MOST_LINES = 18_400
"""Of Python in the wheel: it holds the library, nothing that needs a checkout."""
LIBRARY = """\
import contextlib, importlib.util, io, re, sys
from pathlib import Path

import llava_todre
from llava_todre.cli import main

assert str(Path(llava_todre.__file__)).startswith(sys.prefix), llava_todre.__file__
assert not any(map(importlib.util.find_spec, ("eval", "scripts"))), "nothing of the checkout"


def todre(*arguments, status=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(list(arguments)) == status, err.getvalue()
    return out.getvalue() + err.getvalue()


def folder(name):
    return re.search(f"^{name}: (.*)$", todre("list"), re.MULTILINE)[1]


methods = Path(folder("method files"))
assert sys.prefix in str(methods) and len(list(methods.glob("*.yaml"))) == len(llava_todre.PRUNERS)
asked = ("--image", "scene_0.png", "--question", "What does the sign say?")
for method in ("todre", str(methods / "fastv.yaml")):
    said = todre("generate", "--model", "mini", *asked, "--method", method)
    assert "visual tokens kept" in said, said
assert "checkout" in todre("demo", status=1)
assert "run from a checkout or give --model" in todre("demo", "--ui", status=1)
assert "AutoModelForImageTextToText" in todre("convert", "--model", "mini", "--out", "stock")

# README: our own class, and a stock model with a method attached
from llava_todre import ask, load_pretrained_model

tokenizer, model, image_processor, context_len = load_pretrained_model("mini")
model.set_pruner("todre", retain_ratio=0.10)
answer = ask(model, tokenizer, "scene_0.png", "What does the sign say?")
assert answer.stats.kept_tokens == 32, answer.stats

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("stock")
processor = AutoProcessor.from_pretrained("stock")
image = {"type": "image", "image": Image.open("scene_0.png")}
content = [image, {"type": "text", "text": asked[3]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with llava_todre.prune(model, method="todre", retain_ratio=0.1):
    output = model.generate(**inputs, max_new_tokens=8)
text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
assert text.strip() == answer.text, (text, answer.text)
print("all of it works")
"""
TASK = "todre_mmbench_cn_dev_static"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it from the sdist of a copy, without what earlier builds left in a checkout."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("llava_todre", "configs", "eval", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    sdist = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", sdist], cwd=copy, check=True, capture_output=True)
    (packed,) = copy.parent.glob("llava_todre-*.tar.gz")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", copy.parent)
    subprocess.run([sys.executable, "-m", "pip", "wheel", packed, *options], check=True)
    (found,) = copy.parent.glob("llava_todre-*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path) -> SimpleNamespace:
    """Install it into an empty environment; ``run`` runs a program there, in another folder."""
    env, elsewhere = wheel.parent / "env", wheel.parent / "elsewhere"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    specs = (importlib.util.find_spec(name) for name in ("torch", "transformers", "lmms_eval"))
    borrowed = {str(Path(str(spec.origin)).parents[1]) for spec in specs if spec}
    assert str(ROOT) not in borrowed
    (site,) = env.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    shutil.copytree(MINI, elsewhere / "mini")
    shutil.copy(MINI / "examples" / "scene_0.png", elsewhere)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    clean |= {"HF_DATASETS_OFFLINE": "1"}

    def run(program: str, *arguments: str) -> str:
        command = [env / "bin" / program, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    return SimpleNamespace(run=run, folder=elsewhere, site=site)


def test_it_holds_the_library_its_methods_and_tasks_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        code = [archive.read(name).decode() for name in names if name.endswith(".py")]
    source = {file.relative_to(ROOT) for file in (ROOT / "llava_todre").rglob("*.py")}
    source.add(Path("llava_todre/py.typed"))
    configs = {
        "llava_todre" / file.relative_to(ROOT)
        for kind in ("methods", "tasks")
        for file in (ROOT / "configs" / kind).rglob("*")
        if file.is_file() and not {"mini", "__pycache__"} & set(file.parts)
    }
    assert set(map(Path, names)) == source | configs
    assert not [name for name in names if re.search("mini|train|demo|fixture", name)]
    assert sum(text.count("\n") for text in code) < MOST_LINES


def test_commands_methods_and_api(installed: SimpleNamespace) -> None:
    assert "all of it works" in installed.run("python", "-c", LIBRARY)


def test_the_command_is_there(installed: SimpleNamespace) -> None:
    assert installed.run("todre", "--version").strip()
    for command in ("demo", "ui"):
        assert "--port" in installed.run("todre", command, "--help")


def test_lmms_eval_finds_the_model_and_its_tasks(installed: SimpleNamespace) -> None:
    pytest.importorskip("lmms_eval")
    for repository, config, split, rows, types in fixtures._mmbench(held_out(1)):
        fixtures._write_split(installed.folder / repository, config, split, rows, types)
    package = installed.site / "llava_todre" / "configs"
    method = package / "methods" / "todre.yaml"
    options = ["--model_args", f"pretrained=mini,method={method}", "--gen_kwargs=max_new_tokens=4"]
    options += ["--tasks", TASK, "--include_path", str(package / "tasks"), "--output_path", "out"]
    installed.run("python", "-m", "lmms_eval", "--model", "llava_todre", *options)
    (file,) = (installed.folder / "out").rglob("*_results.json")
    assert set(json.loads(file.read_text())["results"]) == {TASK}


def test_an_editable_install_is_the_whole_checkout(wheel: Path) -> None:
    build = "from setuptools import build_meta; build_meta.build_editable('../editable')"
    (wheel.parent / "editable").mkdir()
    source = wheel.parent / "source"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (found,) = (wheel.parent / "editable").glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        (names,) = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert archive.read(names).decode().strip() == str(source), "eval and scripts are found"
