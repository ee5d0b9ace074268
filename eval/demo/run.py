"""``todre demo``: what pruning costs in accuracy and saves in work, on the bundled model.

Every (method, ratio, draw) is one run over the same held-out questions. A finished run is a file
and is not repeated, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.demo.measure import evaluate, time_prefill
from eval.demo.plan import plan
from eval.demo.rows import rows_of
from eval.demo.sheets import draw_sheets
from eval.demo.stored import fingerprint, finished, unused
from eval.mini import TASKS, TEST_SEED, Sample, held_out
from eval.mini.heldout import check_num_images
from eval.results.bootstrap import LEVEL, RESAMPLES
from eval.tables.demo import as_markdown
from llava_todre.errors import TodreError
from llava_todre.files import write_whole
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.load import load_pretrained_model
from llava_todre.provenance import provenance
from llava_todre.pruners import Pruner
from llava_todre.vlm import Answer, Request, answer


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

    version = fingerprint(path, num_images)
    if not fresh and (line := unused(out, version, runs)):
        tqdm.write(line, file=sys.stderr)
    scored = []
    with tqdm(total=len(runs) * num_images, unit="image", desc="demo") as progress:
        for run in runs:
            progress.set_postfix_str(run.name)
            file = out / "runs" / f"{run.name}.json"
            result = None if fresh else finished(file, version, run, num_images)
            if result is None:
                result = {"version": version, "run": asdict(run)}
                result |= evaluate(run, samples, ask, model, progress)
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
        "rows": rows_of(scored, time_prefill(runs, samples, ask)),
        "runs": scored,
        "status": "complete",
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **provenance(),
    }
    write_whole(out / "results.json", json.dumps(results, indent=1))
    write_whole(out / "table.md", as_markdown(results))
    draw_sheets(runs, samples, ask, model, out)
    return results
