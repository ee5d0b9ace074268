"""SECURITY.md's promises about the code: no input is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for folder in ("llava_todre", "eval", "configs") for file in (ROOT / folder).rglob("*.py")
)
RUNS_INPUT = {
    *("eval", "exec", "compile"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "dill.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "os.system"),
}


def faults(code: str) -> Iterator[str]:
    """Yield the calls of a file that could run what they read."""
    tree = ast.parse(code)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [*map(ast.unparse, node.bases)] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {each.arg: each.value for each in node.keywords}
        if name == "yaml.load" and {*map(ast.unparse, node.args[1:])} & safe_loaders:
            continue
        if name in RUNS_INPUT or "trust_remote_code" in given or "shell" in given:
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and ast.unparse(given.get("weights_only", node)) != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name.endswith(("np.load", "numpy.load")) and "allow_pickle" in given:
            yield f"line {node.lineno}: {name} with pickles"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(file: Path) -> None:
    assert not list(faults(file.read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_such_a_call_is_found(code: str) -> None:
    assert len(list(faults(code))) == 1
