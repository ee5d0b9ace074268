"""The class that lmms-eval runs."""

from __future__ import annotations

import inspect
import logging
import resource
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_todre.errors import TodreError, unknown
from llava_todre.flops import decoder_prefill_flops
from llava_todre.generate import Answer, Request, answer
from llava_todre.lmms_plugin.arguments import (
    build_pruner,
    draws,
    item_seed,
    text,
    whole,
    with_seed,
)
from llava_todre.lmms_plugin.fingerprint import fingerprint
from llava_todre.lmms_plugin.items import (
    Item,
    Shown,
    batch_name,
    batches_of,
    cut,
    generation,
    items_of,
    shared,
    shown_of,
)
from llava_todre.lmms_plugin.log import AnswerLog, Line
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.placement import spreads
from llava_todre.model.prompt import conv_templates
from llava_todre.stats import PruneStats

logger = logging.getLogger(__name__)

_RANKS = ("NO", "MULTI_CPU", "MULTI_GPU")


class LlavaTodre(lmms):
    """LLaVA-1.5 or LLaVA-NeXT with one pruning method, for tasks that generate text."""

    is_simple = True

    def __init__(
        self,
        pretrained: Any = None,
        revision: Any = None,
        dtype: str = "auto",
        device: Any = None,
        device_map: Any = None,
        attn_implementation: str = "sdpa",
        protocol: str = "native",
        template: str = "vicuna_v1",
        method: str = "todre",
        clip_text: Any = None,
        max_frames: Any = 5,
        batch_size: Any = 1,
        max_new_tokens: Any = 1024,
        log_dir: Any = None,
        seed: Any = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: a folder or hub id, in the original layout or that of llava-hf.
            revision: branch, tag or commit on the hub.
            dtype: auto, float32, float16 or bfloat16.
            device: auto, cpu, cuda, cuda:1, ...; with several processes only its kind counts,
                and each process takes the GPU of its local rank.
            device_map: instead of ``device``; auto spreads one model over all GPUs.
            attn_implementation: eager, sdpa or flash_attention_2.
            protocol: native, or paper.
            template: conversation template.
            method: a name from ``todre list``, A+B, or a YAML file of ``configs/methods``.
            clip_text: folder or hub id of the CLIP model, for methods that need its text tower.
            max_frames: frames of a video, evenly spaced over the clip.
            batch_size: items answered together; methods that draw at random answer one by one.
            max_new_tokens: longest answer where the task does not say.
            log_dir: folder for the answers of an interrupted run; None keeps none.
            seed: of methods that draw at random, and of sampled answers; 0 unless the method's
                file says otherwise. Every item draws for itself.
            options: options of the method.

        Raises:
            TodreError: one line saying which argument is wrong, and what is allowed.
        """
        super().__init__()
        if pretrained is None:
            raise TodreError("pretrained is missing; give a folder or a hub id.")
        if template not in conv_templates:
            raise unknown("template", template, conv_templates)
        own = [key for key in inspect.signature(LlavaTodre).parameters if key != "options"]
        name = text("method", method) or "todre"
        self.pruner, self.seed = build_pruner(name, options, seed, own)
        self.template = template
        self.max_frames = whole("max_frames", max_frames)
        self.batch_size = whole("batch_size", batch_size)
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens)
        self.log_dir = text("log_dir", log_dir)
        self.accelerator = _join_processes()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.tokenizer, self.model, _, _ = load_pretrained_model(
            text("pretrained", pretrained) or "",
            revision=text("revision", revision),
            dtype=dtype,
            **_placement(self.accelerator, text("device", device), text("device_map", device_map)),
            attn_implementation=attn_implementation,
            protocol=protocol,
        )
        tower = text("clip_text", clip_text)
        if tower is not None:
            self.model.load_clip_text(tower)
        self.model.set_pruner(self.pruner)
        self._device = self.model.device
        self._log: AnswerLog | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes; lmms-eval gathers results there."""
        return self._device

    # ------------------------------------------------------------------ lmms-eval's calls

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests; returns the answers in the order of the requests."""
        items, keys = items_of(requests)
        self._open_log()
        batches = batches_of(items.values(), 1 if draws(self.pruner) else self.batch_size)
        answers: dict[Any, str] = {}
        with tqdm(
            total=len(items), disable=self.rank != 0, unit="item", desc="llava_todre"
        ) as progress:
            for batch in batches:
                lines = self._answered(batch)
                answers |= {
                    item.key: line["answer"] for item, line in zip(batch, lines, strict=True)
                }
                progress.update(len(batch))
        return [answers[key] for key in keys]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: the benchmarks of the papers are generated, not ranked."""
        raise NotImplementedError(
            "llava_todre answers by generating text; tasks that compare likelihoods "
            "(output_type loglikelihood or multiple_choice) are not supported."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: what is dropped in a first round may be asked about in a second."""
        raise NotImplementedError(
            "llava_todre answers one question at a time; tasks of several rounds "
            "(output_type generate_until_multi_round) are not supported."
        )

    # ------------------------------------------------------------------ one batch

    def _answered(self, batch: Sequence[Item]) -> list[Line]:
        """Return the lines of a batch, from the log where it is finished."""
        task, split = batch[0].task, batch[0].split
        try:
            shown = [self._shown(item) for item in batch]
            name = batch_name(batch, shown)
            finished = self._log.finished(task, split) if self._log else {}
            places = [(name, item.doc_id, item.repeat) for item in batch]
            if all(place in finished for place in places):
                return [finished[place] for place in places]
            lines = self._compute(batch, shown, name)
        except Exception:
            documents = [item.doc_id for item in batch]
            logger.error("task %s, split %s, documents %s failed", task, split, documents)
            raise
        if self._log:
            self._log.append(task, split, lines)
        return lines

    def _shown(self, item: Item) -> Shown:
        document = self.task_dict[item.task][item.split][item.doc_id]
        return shown_of(item, item.doc_to_visual(document), self.max_frames)

    def _compute(self, batch: Sequence[Item], shown: Sequence[Shown], name: str) -> list[Line]:
        settings, until = generation(batch[0].gen_kwargs, self.max_new_tokens)
        if draws(self.pruner):
            self.model.set_pruner(with_seed(self.pruner, item_seed(self.seed, batch[0].doc_id)))
        if settings["do_sample"]:
            torch.manual_seed(item_seed(self.seed, name))
        asked = [
            Request(item.prompt, pictures, visuals.is_video)
            for item, visuals, pictures in zip(batch, shown, shared(shown), strict=True)
        ]
        start = time.perf_counter()
        given = answer(self.model, self.tokenizer, asked, template=self.template, **settings)
        seconds = (time.perf_counter() - start) / len(batch)
        return [
            {
                "task": item.task,
                "split": item.split,
                "doc_id": item.doc_id,
                "repeat": item.repeat,
                "batch": name,
                "prompt": item.prompt,
                "gen_kwargs": dict(item.gen_kwargs),
                **self._told(result, until),
                "seconds": seconds,
                "peak_memory_mib": _peak_memory_mib(self.device),
            }
            for item, result in zip(batch, given, strict=True)
        ]

    def _told(self, result: Answer, until: tuple[str, ...]) -> Line:
        """Return the answer and what it took."""
        stats: PruneStats = result.stats
        shape = self.model.decoder_shape
        unpruned = [stats.unpruned_prompt_tokens] * shape.layers
        return {
            "answer": cut(result.text, until),
            "visual_tokens": stats.visual_tokens,
            "kept_tokens": stats.kept_tokens,
            "mean_visual_tokens_per_layer": stats.mean_visual_tokens,
            "withdrawn_from": stats.withdrawn_from,
            "prefill_flops": decoder_prefill_flops(shape, stats.prompt_tokens_per_layer),
            "prefill_flops_unpruned": decoder_prefill_flops(shape, unpruned),
        }

    def _open_log(self) -> None:
        """Open the log afresh, so that it also holds what an earlier call wrote."""
        if self.log_dir is None:
            return
        settings = {
            "method": repr(self.pruner),
            "seed": self.seed,
            "template": self.template,
            "max_frames": self.max_frames,
            "max_new_tokens": self.max_new_tokens,
            "attn_implementation": self.model.config._attn_implementation,
        }
        name, parts = fingerprint(self.model, self.tokenizer, settings)
        self._log = AnswerLog(Path(self.log_dir), name, self.rank, parts)


def _join_processes() -> Any:
    """Return the accelerator: who is who among the processes of this run, and on which device."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The processes wait for each other at the end, and the slowest may need hours longer.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(kwargs_handlers=[patience])
    kind = accelerator.distributed_type.value
    if kind not in _RANKS:
        raise TodreError(
            f"processes of type {kind!r} are not supported; allowed: {', '.join(_RANKS)}, where "
            "each process holds the whole model."
        )
    return accelerator


def _placement(accelerator: Any, device: str | None, device_map: str | None) -> dict[str, Any]:
    """Return ``device`` and ``device_map`` of this process's model."""
    if device is not None and device_map is not None:
        raise TodreError(
            f"device {device!r} and device_map {device_map!r} were both given; allowed: one."
        )
    if accelerator.num_processes == 1:
        return {"device": device or "auto", "device_map": device_map}
    if spreads(device_map):
        raise TodreError(
            f"device_map {device_map!r} with {accelerator.num_processes} processes: each would "
            "take all GPUs; allowed: one process, or no device_map."
        )
    own = accelerator.device
    wanted = (device or device_map or "auto").partition(":")[0]
    if wanted not in ("auto", own.type):
        raise TodreError(
            f"device {wanted!r} with {accelerator.num_processes} processes that accelerate put on "
            f"{own.type!r}; for CPU set ACCELERATE_USE_CPU=true for the launcher."
        )
    return {"device": own}


def _peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used so far, of all GPUs if it uses any."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
