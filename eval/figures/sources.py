"""What figures are made from: stored results, or live runs of a model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import ROOT
from eval.mini import TEST_SEED
from eval.results.files import checked_bench, checked_demo
from eval.results.schema import read_json
from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.settings import whole

Data = dict[str, Any]
"""What a figure shows: plain numbers, lists and text, as they are in its JSON."""
RESULTS = ROOT / "docs" / "results"
NOT_EVIDENCE = "not evidence about 7B models"
_DIGITS = 5


@dataclass(frozen=True)
class Sources:
    """Where a figure takes its numbers from; by default those that are committed."""

    model: str | None = None
    """A checkpoint for live runs; the bundled one when None."""
    samples: int | None = None
    """Held-out pictures of a live run; each figure has its own default."""
    methods: Path = RESULTS / "methods_mini.json"
    """``results.json`` of a demo."""
    runs: Path = RESULTS / "reproduce_mini"
    """Folder with the JSONs of runs."""
    bench: Path = RESULTS / "bench_cpu.json"
    """Result of the bench."""

    def __post_init__(self) -> None:
        """Check the number of pictures."""
        if self.samples is not None:
            whole("samples", self.samples, 1)

    def pictures(self, default: int) -> int:
        """Return how many held-out pictures a live run looks at."""
        return self.samples or default

    def demo(self) -> Data:
        """Return the results of a demo.

        Raises:
            TodreError: the file cannot be read, or is something else.
        """
        found = _read(self.methods, "methods", {"rows", "tasks"}, "results.json of a demo")
        return checked_demo(found, self.methods)

    def benched(self) -> Data:
        """Return a result of the bench."""
        found = _read(self.bench, "bench", {"methods", "decoder"}, "a result of `eval bench`")
        return checked_bench(found, self.bench)

    def whose(self) -> str:
        """Return which model a live run was of, for the note below a figure."""
        if self.model is None:
            return f"Bundled mini model ({NOT_EVIDENCE})"
        return f"Model {Path(self.model).name}"


def _read(file: Path, key: str, parts: set[str], allowed: str) -> Data:
    found = read_json(file)
    if not (isinstance(found, dict) and parts <= set(found)):
        raise TodreError(f"{key} {str(file)!r} does not fit; allowed: {allowed}.")
    return dict(found)


@functools.lru_cache(maxsize=1)
def opened(model: str | None) -> tuple[Any, LlavaLlamaForCausalLM]:
    """Return tokenizer and model; figures drawn in one call share them."""
    tokenizer, loaded, _, _ = load_pretrained_model(model or bundled_checkpoint())
    return tokenizer, loaded


def held_out_note(sources: Sources, pictures: int, questions: int) -> str:
    """Return what a live run looked at."""
    return (
        f"{sources.whose()}, {questions} held-out questions on {pictures}"
        f" picture{'s' if pictures > 1 else ''}, seed {TEST_SEED}."
    )


def made_by(stored: Data) -> str:
    """Return the provenance of a stored result: device, torch, commit."""
    versions = stored.get("versions", {})
    dirty = " with local changes" if stored.get("git_dirty") else ""
    return (
        f"{stored.get('device')}; torch {versions.get('torch')}, transformers"
        f" {versions.get('transformers')}; commit {str(stored.get('git_commit'))[:10]}{dirty}."
    )


def rounded(value: Any) -> Any:
    """Return the same with every float cut to the digits that a figure can show."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def middle(values: Sequence[float]) -> dict[str, float]:
    """Return mean, 10th and 90th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"mean": sum(ordered) / len(ordered), "p10": at(0.1), "p90": at(0.9)}
