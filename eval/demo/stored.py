"""Finished runs in the demo's folder: whether they are whole and still count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from eval.demo.measure import MEANS
from eval.demo.plan import Run
from eval.mini import TASKS, TEST_SEED
from llava_todre.source import digests, what_changed


def fingerprint(model_path: Path, num_images: int) -> dict[str, str]:
    """Return what a stored run depends on besides its own settings."""
    files = [file for file in model_path.rglob("*") if file.suffix not in (".png", ".md")]
    weights = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        weights.update(file.read_bytes())
    needed = digests("eval.demo.measure", "llava_todre.model.load", alone="eval.demo.run")
    return {
        "code": hashlib.sha256(json.dumps(needed).encode()).hexdigest()[:16],
        "model": weights.hexdigest()[:16],
        "pictures": f"{num_images} of seed {TEST_SEED}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def unused(out: Path, version: dict[str, str], runs: Sequence[Run]) -> str:
    """Return which stored runs are not used, and why; nothing where all are, or there is none."""
    reasons = []
    for run in runs:
        try:
            stored = json.loads((out / "runs" / f"{run.name}.json").read_text())["version"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        if stored != version:
            changed = what_changed(stored, version) if isinstance(stored, dict) else "not recorded"
            reasons.append(changed)
    if not reasons:
        return ""
    why = "; ".join(dict.fromkeys(reasons))
    return (
        f"{len(reasons)} finished runs in {out} are not used and are repeated, because what made "
        f"them has changed: {why}."
    )


def finished(
    file: Path, version: dict[str, str], run: Run, num_images: int
) -> dict[str, Any] | None:
    """Return the stored result of a run, unless it is absent, damaged or of something else."""
    try:
        result: Any = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(result, dict):
        return None
    same = result.get("version") == version and result.get("run") == asdict(run)
    return result if same and _is_whole(result, num_images) else None


def _is_whole(result: dict[str, Any], num_images: int) -> bool:
    """Return whether a stored run has an answer to every question, and its means."""
    means = (result.get(key) for key in MEANS)
    return all(isinstance(mean, (int, float)) for mean in means) and all(
        isinstance(result.get(part), dict)
        and isinstance(result[part].get(task), list)
        and len(result[part][task]) == num_images
        for part in ("hits", "answers")
        for task in TASKS
    )
