"""``todre demo``: what pruning costs in accuracy and saves in work, on the bundled model.

Every (method, ratio, draw) is one run over the same held-out questions. A finished run is a file
and is not repeated, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from llava_todre.errors import TodreError
from llava_todre.files import write_whole
from llava_todre.intervals import LEVEL, RESAMPLES, intervals, relative_average
from llava_todre.mini import TASKS, TEST_SEED, Sample, held_out
from llava_todre.mini.heldout import check_num_images
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.provenance import provenance
from llava_todre.pruners import PRUNERS, Pruner, create_pruner
from llava_todre.request import Answer, Request
from llava_todre.source import digests, what_changed
from llava_todre.table import as_markdown
from llava_todre.viz import contact_sheet, kept_picture
from llava_todre.vlm import answer
from llava_todre.work import prefill_work

RANDOM_DRAWS = 3
TIMED_PROMPTS = 24
PICTURED_SCENES = 3
ROW_OF_PICTURES = 5
"""Pictures side by side, when there are more than fit on one sheet."""
_ONE_SHEET = 7
_MAX_NEW_TOKENS = 8
_PICTURE_SCALE = 2
_MEANS = ("kept_tokens", "mean_visual_tokens_per_layer", "withdrawn_share", "prefill_flops")
"""What a stored run holds the means of."""


@dataclass(frozen=True)
class Run:
    """One pass over the questions."""

    method: str
    """A name of the registry, or two of them joined as A+B."""
    retain_ratio: float
    draw: int = 0
    """Which draw of a random method."""

    @property
    def is_random(self) -> bool:
        """Whether its Stage 1 draws tokens by chance."""
        return self.method.partition("+")[0] == "random"

    @property
    def name(self) -> str:
        """A name fit for a file."""
        draw = f"_draw{self.draw}" if self.is_random else ""
        return re.sub(r"[^\w.]", "-", f"{self.method}_{self.retain_ratio!r}{draw}")

    def pruner(self, image_index: int) -> Pruner:
        """Return the method for one image; a random method draws afresh for each."""
        key = "before.seed" if "+" in self.method else "seed"
        knobs = {key: 10_000 * self.draw + image_index} if self.is_random else {}
        return create_pruner(self.method, retain_ratio=self.retain_ratio, **knobs)


def plan(methods: Sequence[str], ratios: Sequence[float]) -> list[Run]:
    """Return the runs: the unpruned model first, then every method at every ratio.

    Among ``methods``, "all" stands for the whole registry.
    """
    named = [name for method in methods for name in (PRUNERS if method == "all" else [method])]
    runs = [Run("vanilla", 1.0)]
    # Stage 2 alone has no budget of its own.
    runs += [Run(name, 1.0) for name in dict.fromkeys(named) if name.startswith("vanilla+")]
    for ratio in dict.fromkeys(ratios):
        for method in dict.fromkeys(named):
            if not method.startswith("vanilla"):
                draws = RANDOM_DRAWS if Run(method, ratio).is_random else 1
                runs += [Run(method, ratio, draw) for draw in range(draws)]
    for run in runs:
        run.pruner(0)  # so that a wrong name or ratio is reported before anything is computed
    return runs


def run_demo(
    model_path: str | None,
    methods: Sequence[str],
    ratios: Sequence[float],
    num_images: int,
    out: Path,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run the comparison; write results, table and pictures to ``out`` and return the results.

    Args:
        model_path: a checkpoint folder; the bundled one when None.
        methods: names of methods, A+B combinations, or "all"; the unpruned model always comes
            first.
        ratios: shares of the patch tokens to keep.
        num_images: held-out pictures, with one question of every task each.
        out: folder for everything that is written.
        fresh: do not use finished runs of an earlier call.
    """
    check_num_images(num_images)
    runs = plan(methods, ratios)
    path = Path(model_path) if model_path else bundled_checkpoint()
    tokenizer, model, _, _ = load_pretrained_model(path)
    samples = held_out(num_images)
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TodreError(f"out {str(out)!r} cannot be a folder: {error.strerror}.") from None

    def ask(
        sample: Sample, questions: Sequence[int], pruner: Pruner, **kwargs: Any
    ) -> list[Answer]:
        model.set_pruner(pruner)
        requests = [Request(sample.questions[i].text, [sample.image]) for i in questions]
        return answer(model, tokenizer, requests, **kwargs)

    version = _fingerprint(path, num_images)
    if not fresh and (line := _unused(out, version, runs)):
        tqdm.write(line, file=sys.stderr)
    scored = []
    with tqdm(total=len(runs) * num_images, unit="image", desc="demo") as progress:
        for run in runs:
            progress.set_postfix_str(run.name)
            file = out / "runs" / f"{run.name}.json"
            result = None if fresh else _finished(file, version, run, num_images)
            if result is None:
                result = {"version": version, "run": asdict(run)}
                result |= _evaluate(run, samples, ask, model, progress)
                write_whole(file, json.dumps(result))
            else:
                progress.update(num_images)
            scored.append(result)
    results = {
        "what": "todre demo on the bundled mini model; shows mechanism, not evidence on 7B models",
        "model": path.name,
        "num_images": num_images,
        "questions": num_images * len(samples[0].questions),
        "seed": TEST_SEED,
        "tasks": list(TASKS),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "images, paired"},
        "rows": _rows(scored, _time_prefill(runs, samples, ask)),
        "runs": scored,
        "status": "complete",
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **provenance(),
    }
    write_whole(out / "results.json", json.dumps(results, indent=1))
    write_whole(out / "table.md", as_markdown(results))
    _draw(runs, samples, ask, model, out)
    return results


_Ask = Callable[..., list[Answer]]


def _evaluate(
    run: Run, samples: Sequence[Sample], ask: _Ask, model: LlavaLlamaForCausalLM, progress: Any
) -> dict[str, Any]:
    """Ask every question of every sample.

    Returns:
        Answers and hits per task, in the order of the samples, and means of the statistics.
    """
    hits: dict[str, list[int]] = {task: [] for task in TASKS}
    said: dict[str, list[str]] = {task: [] for task in TASKS}
    tokens, layer_tokens, flops, withdrawn = [], [], [], []
    for index, sample in enumerate(samples):
        everything = range(len(sample.questions))
        answers = ask(sample, everything, run.pruner(index), max_new_tokens=_MAX_NEW_TOKENS)
        for question, given in zip(sample.questions, answers, strict=True):
            hits[question.task].append(int(_same(given.text, question.answer)))
            said[question.task].append(given.text)
            stats = given.stats
            tokens.append(stats.kept_tokens)
            layer_tokens.append(stats.mean_visual_tokens)
            withdrawn.append(stats.withdrawn_from is not None)
            work = prefill_work(model, stats)
            assert work is not None, "our own class is a Llama"
            flops.append(work.flops)
        progress.update(1)
    return {
        "hits": hits,
        "answers": said,
        "kept_tokens": statistics.fmean(tokens),
        "mean_visual_tokens_per_layer": statistics.fmean(layer_tokens),
        "withdrawn_share": statistics.fmean(withdrawn),
        "prefill_flops": statistics.fmean(flops),
    }


def _same(given: str, expected: str) -> bool:
    return given.strip().lower() == expected.strip().lower()


def _time_prefill(
    runs: Sequence[Run], samples: Sequence[Sample], ask: _Ask
) -> dict[str, dict[str, dict[str, float]]]:
    """Return speed-ups over the unpruned model by run name.

    The runs take turns on every prompt (batch 1, one question per image, after a warm-up), so
    that the machine's mood hits all alike; each ratio is the median over the prompts.
    """
    timed = [run for run in runs if run.draw == 0]
    ratios: dict[str, dict[str, list[float]]] = {
        run.name: {"prefill": [], "first_token": []} for run in timed
    }
    for index in range(-2, min(TIMED_PROMPTS, len(samples))):
        sample = samples[max(index, 0)]
        spent: dict[str, dict[str, float]] = {}
        for run in timed:
            question = [max(index, 0) % len(sample.questions)]
            stages = ask(sample, question, run.pruner(0), max_new_tokens=1, timed=True)[0].stages_ms
            first = stages["vision"] + stages["selection"] + stages["prefill"]
            spent[run.name] = {"prefill": stages["prefill"], "first_token": first}
        for name, stages in spent.items():
            for stage in stages if index >= 0 else ():
                ratios[name][stage].append(spent[timed[0].name][stage] / stages[stage])
    return {
        name: {stage: _percentiles(values) for stage, values in stages.items()}
        for name, stages in ratios.items()
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=5) if len(values) > 1 else list(values) * 4
    return {
        "median": statistics.median(values),
        "p20": cuts[0],
        "p80": cuts[3],
        "count": len(values),
    }


def _rows(
    scored: Sequence[dict[str, Any]], speed: dict[str, dict[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """Return one row per (method, ratio), draws averaged, relative to the first row."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in scored:
        run = result["run"]
        groups.setdefault((run["method"], run["retain_ratio"]), []).append(result)
    rows: list[dict[str, Any]] = []
    for (method, ratio), results in groups.items():
        accuracy = {
            task: statistics.fmean(hit for result in results for hit in result["hits"][task])
            for task in TASKS
        }
        full = rows[0]["accuracy"] if rows else accuracy
        relative = relative_average(np.array([*accuracy.values()]), np.array([*full.values()]))
        spread = intervals([result["hits"] for result in results], scored[0]["hits"])
        mean = {
            key: statistics.fmean(result[key] for result in results)
            for key in results[0]
            if key not in ("hits", "answers", "run", "version")
        }
        rows.append(
            {
                "method": method,
                "retain_ratio": ratio,
                "draws": len(results),
                "accuracy": accuracy,
                "average": statistics.fmean(accuracy.values()),
                "average_interval": list(spread["average"]),
                "relative_average": float(relative),
                "relative_interval": list(spread["relative"]),
                **mean,
                "flops_share": mean["prefill_flops"] / (rows or [mean])[0]["prefill_flops"],
                "prefill_speedup": speed[Run(method, ratio).name]["prefill"],
                "first_token_speedup": speed[Run(method, ratio).name]["first_token"],
            }
        )
    return rows


def _draw(
    runs: Sequence[Run],
    samples: Sequence[Sample],
    ask: _Ask,
    model: LlavaLlamaForCausalLM,
    out: Path,
) -> None:
    """Draw the kept tokens of the first scenes, a row per ratio and a column per method.

    With more methods than fit into a row, each ratio gets a sheet of its own.
    """
    ratios = sorted({run.retain_ratio for run in runs if run.method != "vanilla"}, reverse=True)
    for scene, sample in enumerate(samples[:PICTURED_SCENES]):
        question = sample.questions[scene % len(sample.questions)]
        place = [sample.questions.index(question)]
        rows: list[list[tuple[str, Image.Image]]] = []
        for ratio in ratios or [1.0]:
            rows.append([])
            for run in runs:
                if run.draw > 0 or (run.method != "vanilla" and run.retain_ratio != ratio):
                    continue
                given = ask(sample, place, run.pruner(scene), max_new_tokens=_MAX_NEW_TOKENS)[0]
                stats = given.stats.images[0]
                tokens = f"{len(stats.keep_idx)} in, {given.stats.mean_visual_tokens:.0f} per layer"
                picture = kept_picture(sample.image, stats, model, _PICTURE_SCALE)
                rows[-1].append((f"{run.method}, {tokens}: {given.text}", picture))
        caption = f"{question.text}  ({question.answer})"
        if max(map(len, rows)) <= _ONE_SHEET:
            contact_sheet(rows, caption).save(out / f"kept_{scene}.png")
            continue
        for ratio, cells in zip(ratios, rows, strict=True):
            sheet = contact_sheet(_wrapped(cells), f"{caption}  retain_ratio {ratio:g}")
            sheet.save(out / f"kept_{scene}_{ratio!r}.png")


def _wrapped(cells: list[tuple[str, Image.Image]]) -> list[list[tuple[str, Image.Image]]]:
    """Return the cells in rows of about the same length."""
    num_rows = math.ceil(len(cells) / ROW_OF_PICTURES)
    width = math.ceil(len(cells) / num_rows)
    return [cells[start : start + width] for start in range(0, len(cells), width)]


def _fingerprint(model_path: Path, num_images: int) -> dict[str, str]:
    """Return what a stored run depends on besides its own settings."""
    files = [file for file in model_path.rglob("*") if file.suffix not in (".png", ".md")]
    weights = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        weights.update(file.read_bytes())
    needed = digests("vlm", "mini", "model.load", "pruners", "work", alone="demo")
    return {
        "code": hashlib.sha256(json.dumps(needed).encode()).hexdigest()[:16],
        "model": weights.hexdigest()[:16],
        "pictures": f"{num_images} of seed {TEST_SEED}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _unused(out: Path, version: dict[str, str], runs: Sequence[Run]) -> str:
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


def _finished(
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
    means = (result.get(key) for key in _MEANS)
    return all(isinstance(mean, (int, float)) for mean in means) and all(
        isinstance(result.get(part), dict)
        and isinstance(result[part].get(task), list)
        and len(result[part][task]) == num_images
        for part in ("hits", "answers")
        for task in TASKS
    )
