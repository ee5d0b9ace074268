"""What test_team.py asks of the plug-in, in each of two processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.mini import held_out
from llava_todre.lmms_plugin import model as plugin

ROOT = Path(__file__).parents[2]
MINI = str(ROOT / "checkpoints" / "mini")
ARGUMENTS = {"pretrained": MINI, "batch_size": 2, "retain_ratio": 0.3, "seed": 0}
TASKS, SPLIT, DOCUMENTS = ("scenes", "others"), "test", 5


def build(**arguments: Any) -> plugin.LlavaTodre:
    """Return the model and its documents: the same pictures in two tasks, other questions."""
    lm = plugin.LlavaTodre(**ARGUMENTS, **arguments)
    samples = held_out(DOCUMENTS)
    lm.task_dict = {task: {SPLIT: samples} for task in TASKS}
    return lm


def requests(doc_ids: list[int], padding: int = 0, tasks: tuple[str, ...] = TASKS) -> list[Any]:
    """Return a share of the requests as lmms-eval deals them out, task by task."""
    asked = []
    samples = held_out(DOCUMENTS)
    for index, task in enumerate(tasks):
        for doc_id in doc_ids:
            question = samples[doc_id].questions[index].text
            arguments = (question, {"until": ["\n"]}, visuals, doc_id, task, SPLIT)
            asked.append(SimpleNamespace(args=arguments, metadata={}))
    more = [SimpleNamespace(args=asked[-1].args, metadata={"__padding_only__": True})] * padding
    return asked + more


def visuals(sample: Any) -> list[Any]:
    return [sample.image]


def main(folder: Path) -> None:
    lm = build(tp_plan="auto", log_dir=str(folder))
    rank = torch.distributed.get_rank()
    asked: list[list[str]] = []
    compute = plugin.LlavaTodre._compute

    def noting(self: Any, batch: Any, look: Any, *rest: Any) -> Any:
        asked[-1].append(look.name)
        return compute(self, batch, look, *rest)

    plugin.LlavaTodre._compute = noting  # type: ignore[method-assign]
    given = []
    # The first task alone, as before an interruption; then all; then all again.
    own, padding = ([0, 2, 4], 0) if rank == 0 else ([1, 3], 1)
    for tasks in (TASKS[:1], TASKS, TASKS):
        asked.append([])
        given.append(lm.generate_until(requests(own, padding * len(tasks), tasks)))
    (folder / f"rank{rank}.json").write_text(json.dumps({"given": given, "asked": asked}))

    def broken(self: Any, *rest: Any) -> Any:
        if rank == 1:
            raise RuntimeError("process 1 is planted to fail")
        return compute(self, *rest)

    plugin.LlavaTodre._compute = broken  # type: ignore[method-assign]
    lm._log, lm.log_dir = None, None
    try:
        lm.generate_until(requests(own, padding))
    except Exception:
        return  # with exit status 0, as lmms-eval does
    (folder / f"survived{rank}").touch()
