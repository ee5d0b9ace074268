"""Stands in for lmms-eval: same arguments, files and exit status, in a tenth of a second.

Leading arguments plan what goes wrong: ``--fault NAME`` and ``--only TEXT``, a part of the names
of the runs it happens to, both repeatable; ``--pause SECONDS`` after every item.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import zlib
from itertools import zip_longest
from pathlib import Path

from llava_todre.lmms_plugin.answer_log import AnswerLog

SIZE = 96
STATS = {
    "prompt": "A question?",
    "answer": "yes",
    "visual_tokens": 320,
    "kept_tokens": 80,
    "mean_visual_tokens_per_layer": 81.5,
    "withdrawn_from": None,
    "prefill_flops": 1e9,
    "prefill_flops_unpruned": 4e9,
    "seconds": 0.25,
    "cpu_seconds": 0.5,
    "peak_memory_mib": 100.0,
}

UNREAD = dict.fromkeys([key for key in STATS if key.endswith(("tokens", "layer", "unpruned"))], 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--log_samples", action="store_true")
    for name in "model model_args tasks batch_size include_path output_path seed".split():
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--limit", type=int, default=SIZE)
    options = parser.parse_args()
    planned = zip_longest(options.fault, options.only, fillvalue="")
    fault = next((name for name, only in planned if only in options.output_path), "")
    print("2026-11-21 12:00:00 | INFO     | lmms_eval.__main__:cli_evaluate:516 - Hello")
    try:
        evaluate(options, fault)
    except Exception as error:  # as lmms-eval does: told, then forgotten
        traceback.print_exc()
        print(f"2026-11-21 12:00:01 | ERROR    | lmms_eval.__main__:main:1 - Error: {error}")


def evaluate(options: argparse.Namespace, fault: str) -> None:
    arguments = dict(pair.split("=", 1) for pair in options.model_args.split(","))
    if fault == "no data":
        raise FileNotFoundError("Couldn't find any data file at configs/tasks/mini/data")
    log_dir = Path(arguments["log_dir"])
    log = AnswerLog(log_dir, "fingerprint", 0, {})
    with (log_dir / "pid").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    samples = {}
    for task in options.tasks.split(","):
        finished = log.finished(task, "test")
        samples[task] = []
        for doc_id in range(options.limit):
            if (f"batch{doc_id}", doc_id, 0) not in finished:
                if fault == "raises" and doc_id == 1:
                    raise ValueError(f"image of document {doc_id} of {task} is broken")
                if fault == "killed" and doc_id == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                unread = {"failed": "prompt of 9 tokens is longer than the 8 the model can read."}
                is_unread = fault == "too long" and task.endswith(("exist", "count"))
                time.sleep(options.pause)
                place = {"task": task, "split": "test", "doc_id": doc_id, "repeat": 0}
                shown = {"pictures": f"picture {doc_id // 2}"}
                if fault == "text only" and doc_id == 0:
                    shown = {"pictures": None, "visual_tokens": 0, "kept_tokens": 0}
                    shown |= {"mean_visual_tokens_per_layer": 0.0, "withdrawn_from": None}
                    shown |= {"prefill_flops": 1e6, "prefill_flops_unpruned": 1e6}
                if fault == "old log":
                    shown = {"pictures": None, "cpu_seconds": None}
                told = unread | UNREAD if is_unread else {}
                line = {**place, "batch": f"batch{doc_id}", **STATS, **shown, **told}
                if fault == "old log":
                    del line["pictures"], line["cpu_seconds"]
                log.append([line])
            score = zlib.crc32(f"{task} {doc_id} {arguments['method']}".encode()) % 2
            samples[task].append({"doc_id": doc_id, "exact_match": float(score)})
    write(options, fault, samples)


def write(options: argparse.Namespace, fault: str, samples: dict[str, list[dict]]) -> None:
    first = next(iter(samples))
    original = dict.fromkeys(samples, SIZE)
    if fault == "few":
        samples[first].pop()
    if fault == "odd samples":
        del samples[first][0]["doc_id"]
    if fault == "other data":
        samples[first] = samples[first][:2]
        original[first] = 2
    results = {
        "results": {
            task: {"exact_match,none": sum(s["exact_match"] for s in group) / len(group)}
            for task, group in samples.items()
        },
        "n-samples": {
            task: {"original": original[task], "effective": min(options.limit, original[task])}
            for task in samples
        },
    }
    if fault == "no metric":
        results["results"][first] = {"something_else,none": 1.0}
    if fault == "nan":
        results["results"][first] = {"exact_match,none": float("nan")}
    text = json.dumps(results)
    folder = Path(options.output_path) / "checkpoints__mini"
    folder.mkdir(parents=True)
    for task, group in samples.items():
        if not (fault == "no samples" and task == first):
            lines = "".join(json.dumps(sample) + "\n" for sample in group)
            lines = lines[:-9] if fault == "torn samples" and task == first else lines
            (folder / f"20261121_120000_samples_{task}.jsonl").write_text(lines)
    text = text[: len(text) // 2] if fault == "truncated" else text
    (folder / "20261121_120000_results.json").write_text(text)
    (folder / "submissions").mkdir()  # as MMBench leaves them
    (folder / "submissions" / "mmbench_en_dev_static_results.json").write_text("{}")


if __name__ == "__main__":
    main()
    sys.exit(0)
