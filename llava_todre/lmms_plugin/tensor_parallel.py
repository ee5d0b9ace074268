"""Processes that hold one model together (tensor parallelism), and so must all be asked the same.

lmms-eval deals the items out among its processes, as it does where each holds a whole model. The
team puts the shares together again: every process asks its part of the model about every item, in
the same order, and hands back the answers to its own share. So lmms-eval scores and writes as ever.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from llava_todre.lmms_plugin.requests import Item, Key


class Team:
    """The processes of one model; a process with a whole model is a team of its own."""

    def __init__(self, size: int, rank: int) -> None:
        """Say how many they are, and which of them this is.

        Args:
            size: 1, or the number of all processes there are.
            rank: number of this process; with a size of 1 it does not matter.
        """
        self.size = size
        self.writes = size == 1 or rank == 0
        """Whether this process keeps the log for all."""

    def items(self, own: Mapping[Key, Item]) -> dict[Key, Item]:
        """Return the items of all, ordered as one process would have them: by task, then document.

        Args:
            own: the share of this process; lmms-eval gives each some item of every task.
        """
        if self.size == 1:
            return dict(own)
        visuals = {item.task: item.doc_to_visual for item in own.values()}
        told: list[list[tuple[Key, str, dict[str, Any]]]] = [[]] * self.size
        torch.distributed.all_gather_object(
            told, [(item.key, item.prompt, item.gen_kwargs) for item in own.values()]
        )
        items: dict[Key, Item] = {}
        for key, prompt, gen_kwargs in (line for share in told for line in share):
            items.setdefault(key, Item(*key, prompt, gen_kwargs, visuals[key[0]]))
        tasks = list(dict.fromkeys(item.task for item in items.values()))
        ordered = sorted(items.values(), key=lambda item: (tasks.index(item.task), item.key))
        return {item.key: item for item in ordered}

    def agreed(self, value: Any) -> Any:
        """Return the value that the first process has."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End this process when what is inside fails, upon which torchrun ends the others.

        lmms-eval would print the error and exit with 0, while the others wait for an answer.
        """
        try:
            yield
        except Exception:
            if self.size == 1:
                raise
            traceback.print_exc()
            raise SystemExit(1) from None
