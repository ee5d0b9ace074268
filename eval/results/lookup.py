"""Stored runs, and which of them did what a row of a table asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.results.files import StoredRun
from eval.results.known_models import key_of, known_models
from llava_todre.errors import TodreError
from llava_todre.pruners import Pruner, create_pruner
from llava_todre.pruners.base import layers_at
from llava_todre.pruners.combined import Combined
from llava_todre.pruners.controls import Vanilla
from llava_todre.pruners.todre import Todre

UNREADABLE = (TodreError, TypeError, ValueError, OverflowError)
"""What :func:`identity` raises about options of another version, or that were damaged."""
_STAGE_TWO = ("probe_depths", "tau", "text_set")


def model_key(run: StoredRun) -> str:
    """Return the key of a run's model: a known one, stated or by the name of its checkpoint."""
    model = run["config"]["model"]
    pretrained = str(model.get("pretrained", "")).rstrip("/")
    stated = str(model.get("key") or Path(pretrained).name)
    return stated if stated in known_models() else key_of(pretrained) or stated


def identity(method: str, options: Mapping[str, Any], num_layers: int | None) -> object:
    """Return what a method with these options does; equal for two spellings of the same thing.

    ``todre+vanilla`` equals ``todre`` without probes, ``vanilla+todre`` equals ``todre`` that keeps
    every token, presets equal their values spelled out, and a seed does not count.

    Args:
        method: a name of the registry, or A+B.
        options: as in a run's JSON.
        num_layers: decoder layers, by which depths are compared; as they are when None.
    """
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    pruner = create_pruner(method, **given)
    if isinstance(pruner, Combined):
        return _stage_one(pruner.before), _stage_two(pruner.inside, num_layers)
    return _stage_one(pruner), _stage_two(pruner, num_layers)


def _stage_one(pruner: Pruner) -> object:
    full = pruner.retain_ratio == 1.0 and pruner.retain_tokens is None
    if full or isinstance(pruner, Vanilla):
        return None
    return _settings(pruner, without=_STAGE_TWO if isinstance(pruner, Todre) else ())


def _stage_two(pruner: Pruner, num_layers: int | None) -> object:
    if isinstance(pruner, Todre):
        depths = pruner.probe_depths
        where = layers_at(depths, num_layers) if num_layers else tuple(sorted(depths))
        return (where, pruner.tau, pruner.text_set, pruner.newlines) if where else None
    acts = type(pruner).at_layer is not Pruner.at_layer
    return _settings(pruner) if acts else None


def _settings(pruner: Pruner, without: Sequence[str] = ()) -> object:
    name = "Todre" if isinstance(pruner, Todre) else type(pruner).__name__
    options = dataclasses.asdict(pruner)
    return name, *((key, options[key]) for key in options if key not in (*without, "seed"))


def ran(run: StoredRun) -> tuple[str, Mapping[str, Any]]:
    """Return method and options of a run."""
    return run["config"]["method"], run["config"].get("options") or {}


def concerns(run: StoredRun, benchmark: str) -> bool:
    """Return whether a run has, or failed before it had, a benchmark."""
    listed = run["benchmarks"] or run["config"].get("benchmarks")
    return benchmark in listed if listed else run["status"] != "complete"


def rank_of(run: StoredRun, benchmark: str = "") -> tuple[bool, bool, int, bool, str, str]:
    """Return how gladly a run is shown: finished, no limit or a high one, with a score, newest."""
    limit = run["config"].get("limit")
    scored = run["benchmarks"].get(benchmark, {}).get("status") == "complete"
    finished = run["status"] == "complete"
    when = str(run.get("time_utc"))
    return finished, limit is None, limit or 0, scored, when, str(run["name"])
