"""One line of the answer log: an item, its answer, and what it cost.

A line has these keys:

    task, split, doc_id, repeat     the item; repeat counts questions about one document, from 0
    batch                           hash of everything answered together with it, images included
    prompt, gen_kwargs, answer      input and output, as lmms-eval has them
    failed                          only where the model cannot read the prompt: why; the answer is
                                    empty then, and all counts are 0
    visual_tokens, kept_tokens      patch tokens before pruning, and those the decoder got
    mean_visual_tokens_per_layer    patch and newline tokens, mean over decoder layers
    withdrawn_from                  first decoder layer without visual tokens, or null
    prefill_flops, prefill_flops_unpruned
                                    null where the decoder's FLOPs are not known; the first with
                                    the cost of the method's probes
    seconds                         of the batch, waiting for its images included, per item; the
                                    first question about an image pays for what all of them share
    cpu_seconds                     the same in processor time of this process, which other work on
                                    the machine changes less
    peak_memory_mib                 of the process so far, on GPUs if it uses any
    pictures                        hash of the images or the video, or null: items about the same
                                    ones are no independent draws
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from llava_todre.lmms_plugin.answer_log import Line
from llava_todre.lmms_plugin.requests import Item, cut
from llava_todre.request import VLM, Answer
from llava_todre.work import prefill_work


def clocks() -> dict[str, float]:
    """Return the time now, and the processor time of this process so far."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def of_item(item: Item) -> Line:
    """Return what a line says about the item itself."""
    keys = ("task", "split", "doc_id", "repeat", "prompt")
    return {key: getattr(item, key) for key in keys} | {"gen_kwargs": dict(item.gen_kwargs)}


def of_answer(answer: Answer, until: Iterable[str], vlm: VLM) -> Line:
    """Return what a line says about an answer.

    Args:
        answer: of the model.
        until: strings that end an answer.
        vlm: the model, for its FLOPs.
    """
    stats, work = answer.stats, prefill_work(vlm, answer.stats)
    return {
        "answer": cut(answer.text, until),
        "visual_tokens": stats.visual_tokens,
        "kept_tokens": stats.kept_tokens,
        "mean_visual_tokens_per_layer": stats.mean_visual_tokens,
        "withdrawn_from": stats.withdrawn_from,
        "prefill_flops": work and work.flops,
        "prefill_flops_unpruned": work and work.unpruned_flops,
    }


def of_failure(reason: str) -> Line:
    """Return what a line says where the model cannot read the prompt."""
    counts = ("visual_tokens", "kept_tokens", "mean_visual_tokens_per_layer")
    zeros = dict.fromkeys((*counts, "prefill_flops", "prefill_flops_unpruned"), 0)
    return {"answer": "", "failed": reason, **zeros, "withdrawn_from": None}
