"""The models of configs/models: how they are run, and facts about them, from their YAML files.

A fact about a model is in its file and nowhere else (:data:`FACTS`); other keys are settings
of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from eval import ROOT
from llava_todre.errors import TodreError
from llava_todre.files import read_mapping

FOLDER = ROOT / "configs" / "models"
FACTS = ("num_layers", "decoder")
"""Keys that say what a model is; they are no settings and in no result."""


def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Return the content of every file by its name, as it is now.

    Raises:
        TodreError: a file cannot be read, or a fact in it is wrong.
    """
    states = [(file, file.stat()) for file in sorted(FOLDER.glob("*.yaml"))]
    return _read(tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@lru_cache(maxsize=1)
def _read(files: tuple[tuple[Path, int, int], ...]) -> Mapping[str, Mapping[str, Any]]:
    found = {file.stem: read_mapping(file, "config") for file, *_ in files}
    for key, content in found.items():
        layers = content.get("num_layers", 1)
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise TodreError(f"model {key!r}: num_layers must be 1 or more, got {layers!r}.")
    return found


def settings_of(key: str) -> dict[str, Any]:
    """Return the settings with which a known model is run."""
    return {name: value for name, value in known_models()[key].items() if name not in FACTS}


def num_layers_of(key: str) -> int | None:
    """Return the number of decoder layers; None where no file says it."""
    layers: int | None = known_models().get(key, {}).get("num_layers")
    return layers


def key_of(pretrained: str) -> str | None:
    """Return the name of the file of a checkpoint, or of a copy of it; None where there is none.

    Args:
        pretrained: folder or hub id, whose last part counts; a converted checkpoint's ends in -hf.
    """
    last = Path(pretrained).name.removesuffix("-hf")
    return next(
        (key for key, model in known_models().items() if Path(model["pretrained"]).name == last),
        None,
    )
