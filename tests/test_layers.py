"""The house has floors: a module imports only from lower floors, or from its own room."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_todre"
FLOORS = [
    ["errors", "version", "selection_triton", "renamed"],
    ["files", "command", "load_options"],
    [
        "selection",
        "relevance",
        "flops",
        "spans",
        "stats",
        "provenance",
        "video",
        "finite",
        "source",
        "locking",
    ],
    ["pruners", "work"],
    ["catalogue", "settings", "stage1", "stage2"],
    ["model"],
    ["image_cache"],
    ["request"],
    ["hf", "report", "viz"],
    ["vlm", "generate"],
    ["lmms_plugin"],
    ["ui"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CORE = {
    *("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy"),
    *("PIL", "yaml", "jsonargparse", "tqdm"),
    *("jinja2", "packaging"),  # which those above need themselves
}
# lmms-eval imports it, and finds its base there.
_OF_LMMS_EVAL = ("llava_todre.lmms_plugin.model",)
MACHINE_PATH = re.compile(r"(?<![\w.~>])(/(home|root|work|mnt|Users|scratch)/|[A-Z]:\\)")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Return the full names of what a module imports; of our own, the modules themselves."""
    found = set()
    for node in nodes or ast.walk(syntax(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return found


def own_imports(module: str) -> set[str]:
    return imports(module) & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[1]


ROOMS = [module for module in MODULES if module != "llava_todre"]


@pytest.mark.parametrize("module", ROOMS)
def test_every_module_imports_from_lower_floors_only(module):
    assert room(module) in FLOOR_OF, "a new room: say in FLOORS above where it stands"
    for other in own_imports(module):
        assert other != "llava_todre", f"{module} imports the front door"
        same_room = room(other) == room(module)
        assert same_room or FLOOR_OF[room(other)] < FLOOR_OF[room(module)], other


def test_no_two_modules_import_each_other():
    graph = {module: own_imports(module) - {module} for module in MODULES}
    for package in graph:  # a package's __init__ may gather its files
        if MODULES[package].name == "__init__.py":
            graph[package] = {m for m in graph[package] if not m.startswith(package + ".")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def imports_of_files(folder: Path) -> set[str]:
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py")]
    assert trees
    return {name for tree in trees for name in imports(str(folder), ast.walk(tree))}


def test_the_library_needs_no_checkout():
    """The demo, which the command line looks for by name, is the one exception."""
    found = imports_of_files(PACKAGE)
    assert not [name for name in found if name.split(".")[0] in ("eval", "scripts", "tests")]


def test_the_trainer_knows_nothing_of_the_pruning_model():
    found = imports_of_files(ROOT / "scripts" / "mini_training") | imports_of_files(
        ROOT / "eval" / "mini"
    )
    outside = {name for name in found if name.startswith(("llava_todre", "eval.", "scripts."))}
    outside = {n for n in outside if not n.startswith(("eval.mini", "scripts.mini_training"))}
    assert outside == {"llava_todre.errors", "llava_todre.model.prompt"}


CACHE_CLASSES = re.compile(r"\w+Cache$|(Dynamic|Static)\w*Layer$")
CACHE_PARTS = {"get_seq_length", "get_mask_sizes", "is_sliding", "key_cache", "value_cache"}
PARTS_OF_A_CACHE = {"layers", "update", "reorder_cache", "batch_repeat_interleave", "crop", "state"}


def cache_internals(text: str) -> list[str]:
    """Return what a module takes from transformers' KV caches; their base as a type is no harm."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("transformers"):
            found += [alias.name for alias in node.names if CACHE_CLASSES.match(alias.name)]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            of_a_cache = owner.endswith("cache") and node.attr in PARTS_OF_A_CACHE
            in_output = "past_key_values" in (node.attr, owner.rpartition(".")[2])
            if node.attr in CACHE_PARTS or of_a_cache or in_output:
                found.append(f"{owner}.{node.attr}")
    return found


def test_the_kv_cache_is_the_affair_of_stage_2():
    outside = [path for path in MODULES.values() if "stage2" not in path.parts]
    found = {
        str(path.relative_to(ROOT)): cache_internals(path.read_text())
        for path in [*outside, *(ROOT / "eval").rglob("*.py")]
    }
    assert len(found) > 100 and not {path: parts for path, parts in found.items() if parts}


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.cache_utils import Cache, DynamicCache",
        "from transformers import StaticCache",
        "length = past_key_values.get_seq_length()",
        "keys = output.past_key_values.layers[3].keys",
        "self._cache.layers[3].keys = keys",
        "past_key_values.state = state",
        "any(cache.is_sliding)",
        "cache.update(keys, values, 0)",
        "cache = output.past_key_values",
    ],
)
def test_what_belongs_in_stage_2_is_seen(line):
    assert cache_internals(line)


def test_stages_do_not_know_each_other():
    rooms = {"stage1": "stage2", "stage2": "stage1"}
    for module in ROOMS:
        other = rooms.get(room(module))
        assert other not in {room(imported) for imported in own_imports(module)}, module


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    at_the_top = (node for node in syntax(module).body if not isinstance(node, ast.FunctionDef))
    packages = {name.split(".")[0] for name in imports(module, at_the_top)}
    if module in _OF_LMMS_EVAL:
        packages -= {"lmms_eval"}
    if module == "llava_todre.selection_triton":  # imported by `selection` alone, on a GPU
        packages -= {"triton"}
    assert packages <= CORE | {"llava_todre"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", MODULES)
def test_the_environment_changes_nothing(module):
    for node in ast.walk(syntax(module)):
        name = getattr(node, "attr", getattr(node, "id", None))
        assert name not in {"environ", "environb", "getenv", "putenv"}, module


def test_no_path_of_one_machine_is_written_down():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "eval").rglob("*.py"), *(ROOT / "scripts").rglob("*")]
    files += [*(ROOT / "configs").rglob("*.yaml"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    texts = {path: path.read_text() for path in files if path.is_file() and path.suffix != ".pyc"}
    assert not [str(path) for path, text in texts.items() if MACHINE_PATH.search(text)]
