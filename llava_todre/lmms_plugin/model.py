"""The class that lmms-eval runs."""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_todre.errors import PromptTooLongError, TodreError, unknown
from llava_todre.generate import Answer, Memory, Picture, Request, Views
from llava_todre.lmms_plugin.answer_log import AnswerLog, Line
from llava_todre.lmms_plugin.arguments import (
    build_pruner,
    draws,
    flag,
    item_counts,
    item_seed,
    text,
    whole,
    with_seed,
)
from llava_todre.lmms_plugin.backend import load_backend
from llava_todre.lmms_plugin.distributed import (
    all_counts,
    join_processes,
    peak_memory_mib,
    placement,
)
from llava_todre.lmms_plugin.fingerprint import fingerprint
from llava_todre.lmms_plugin.image_keys import picture_keys, share_pictures
from llava_todre.lmms_plugin.prefetch import ahead
from llava_todre.lmms_plugin.requests import (
    Batch,
    Item,
    Key,
    Shown,
    batches_of,
    cut,
    generation,
    items_of,
    shown_of,
)
from llava_todre.lmms_plugin.response_cache import tell_response_cache
from llava_todre.lmms_plugin.tensor_parallel import Team
from llava_todre.model.chat_template import TEMPLATES
from llava_todre.model.prompt import AUTO
from llava_todre.stats import PruneStats
from llava_todre.work import prefill_work

logger = logging.getLogger(__name__)


class LlavaTodre(lmms):
    """LLaVA-1.5 or LLaVA-NeXT with one pruning method, for tasks that generate text."""

    is_simple = True

    def __init__(
        self,
        pretrained: Any = None,
        revision: Any = None,
        model_base: Any = None,
        load_8bit: Any = False,
        load_4bit: Any = False,
        dtype: str = "auto",
        device: Any = None,
        device_map: Any = None,
        tp_plan: Any = None,
        attn_implementation: str = "sdpa",
        backend: str = "auto",
        protocol: str = "native",
        template: str = AUTO,
        method: str = "todre",
        clip_text: Any = None,
        max_frames: Any = 5,
        batch_size: Any = 1,
        max_new_tokens: Any = 1024,
        log_dir: Any = None,
        seed: Any = None,
        num_items: Any = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: a folder or hub id, in the original layout or that of llava-hf.
            revision: branch, tag or commit on the hub.
            model_base: what a checkpoint of a projector or a LoRA adapter only is laid over.
            load_8bit: quantise the decoder by LLM.int8 of bitsandbytes.
            load_4bit: quantise the decoder to NF4 of bitsandbytes.
            dtype: auto, float32, float16 or bfloat16.
            device: auto, cpu, cuda, cuda:1, ...; with several processes only its kind counts,
                and each process takes the GPU of its local rank.
            device_map: instead of ``device``; auto spreads one model over all GPUs.
            tp_plan: instead of both; auto splits every layer of one model over the processes that
                torchrun started (tensor parallelism). All of them work on every item.
            attn_implementation: eager, sdpa or flash_attention_2.
            backend: llava runs our class, transformers its own with the method attached; auto
                takes ours for LLaVA-1.5 and LLaVA-NeXT on Llama or Mistral.
            protocol: native, or paper; with our class.
            template: conversation template; auto is the one the checkpoint was made for. With our
                class, others have their processor's own.
            method: a name from ``todre list``, A+B, or a YAML file of ``configs/methods``.
            clip_text: folder or hub id of the CLIP model, for methods that need its text tower.
            max_frames: frames of a video, evenly spaced over the clip.
            batch_size: items answered together; methods that draw at random answer one by one.
            max_new_tokens: longest answer where the task does not say.
            log_dir: folder for the answers of an interrupted run; None keeps none.
            seed: of methods that draw at random, and of sampled answers; when not given, that of
                the method's file, or else PyTorch's, which lmms-eval's ``--seed`` sets. Every item
                draws for itself.
            num_items: ``task:96;other:3000``: how many items each task has; anything else is an
                error before the first answer. None takes what there is.
            options: options of the method.

        Raises:
            TodreError: one line saying which argument is wrong, and what is allowed.
        """
        super().__init__()
        if pretrained is None:
            raise TodreError("pretrained is missing; give a folder or a hub id.")
        if template not in TEMPLATES:
            raise unknown("template", template, TEMPLATES)
        own = [key for key in inspect.signature(LlavaTodre).parameters if key != "options"]
        name = text("method", method) or "todre"
        self.pruner, self.seed = build_pruner(name, options, seed, own, seed_of_lmms_eval())
        self.num_items = None if num_items is None else item_counts(num_items)
        self.max_frames = whole("max_frames", max_frames)
        self.batch_size = whole("batch_size", batch_size)
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens)
        self.log_dir = text("log_dir", log_dir)
        self.accelerator = join_processes()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        places = {"device": device, "device_map": device_map, "tp_plan": tp_plan}
        chosen = {key: text(key, value) for key, value in places.items()}
        self._team = Team(self._world_size if chosen["tp_plan"] else 1, self._rank)
        with self._team.together():
            self._backend = load_backend(
                backend,
                text("pretrained", pretrained) or "",
                template=template,
                protocol=protocol,
                clip_text=text("clip_text", clip_text),
                revision=text("revision", revision),
                model_base=text("model_base", model_base),
                load_8bit=flag("load_8bit", load_8bit),
                load_4bit=flag("load_4bit", load_4bit),
                dtype=dtype,
                attn_implementation=attn_implementation,
                **placement(self.accelerator, **chosen),
            )
            self.template = self._backend.template
            self.model: Any = self._backend.model
            self.model.set_pruner(self.pruner)
        self._device = self.model.device
        self._log: AnswerLog | None = None
        self._views: dict[str, Sequence[Picture | Views]] = {}
        tell_response_cache(self._fingerprint)

    @property
    def device(self) -> torch.device:
        """Where this process computes; lmms-eval gathers results there."""
        return self._device

    # ------------------------------------------------------------------ lmms-eval's calls

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests; returns the answers in the order of the requests."""
        items, keys = items_of(requests)
        with self._team.together():
            self._check_num_items(items)
            answers = self._answers(self._team.items(items))
        return [answers[key] for key in keys]

    def _check_num_items(self, items: Mapping[Key, Item]) -> None:
        """Raise unless all processes together have as many items as they were told."""
        if self.num_items is None:
            return
        found = all_counts(Counter(item.task for item in items.values() if item.repeat == 0))
        for task, expected in self.num_items.items():
            if found[task] != expected:
                raise TodreError(
                    f"task {task!r} has {found[task]} items here; the suite expects {expected}. If "
                    "the data is right, correct the suite."
                )

    def _answers(self, items: Mapping[Key, Item]) -> dict[Key, str]:
        self._open_log()
        batches = self._batches(list(items.values()))
        answers: dict[Key, str] = {}
        # One thread looks at documents, always the same: tasks of lmms-eval may keep state.
        with (
            tqdm(
                total=len(items), disable=self.rank != 0, unit="item", desc="llava_todre"
            ) as progress,
            ahead(self._look_at, batches) as looked_at,
        ):
            memory = Memory()
            for batch in batches:
                start = Moment()
                look = next(looked_at)
                lines = self._team.agreed(look.finished)
                if lines is None:
                    lines = self._compute(batch, look, memory, start)
                for item, line in zip(batch.items, lines, strict=True):
                    answers[item.key] = line["answer"]
                progress.update(len(batch.items))
        return answers

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

    def _batches(self, items: Sequence[Item]) -> list[Batch]:
        """Return what is answered together, questions about one picture side by side."""
        if draws(self.pruner):  # every item has a seed of its own, and so tokens of its own
            return batches_of(items, 1, lambda item: None)
        places = dict.fromkeys((item.task, item.split) for item in items)
        documents = {place: self.task_dict[place[0]][place[1]] for place in places}
        keys = {place: picture_keys(each) for place, each in documents.items()}
        sizes = {place: len(each) for place, each in documents.items()}
        return batches_of(
            items,
            self.batch_size,
            lambda item: keys[item.task, item.split](item.doc_id),
            share_pictures(keys, sizes),
        )

    def _look_at(self, batch: Batch) -> Look:
        """Return what a batch shows, or its lines where the log has them."""
        with _named(batch):
            shown = [self._shown(item) for item in batch.items]
            name = batch.name(shown)
            lines = [
                self._log.finished(item.task, item.split).get((name, item.doc_id, item.repeat))
                if self._log
                else None
                for item in batch.items
            ]
            if all(lines):
                return Look(name, finished=[line for line in lines if line])
            pairs = zip(batch.items, shown, strict=True)
            requests = [self._request(item, visuals) for item, visuals in pairs]
            return Look(name, requests, [visuals.name for visuals in shown])

    def _shown(self, item: Item) -> Shown:
        document = self.task_dict[item.task][item.split][item.doc_id]
        return shown_of(item, item.doc_to_visual(document), self.max_frames)

    def _request(self, item: Item, shown: Shown) -> Request:
        """Return a question with its views made; equal pictures are the same object for a while."""
        pictures = [shown.pictures] if shown.is_video else [(one,) for one in shown.pictures]
        views: list[Picture | Views] = []
        for digest, group in zip(shown.digests, pictures, strict=True):
            known = self._views.pop(digest, None)
            if known is None:
                known = self._backend.prepare(Request("", group, shown.is_video)).images
            self._views[digest] = known  # the latest is the last
            views += known
        while len(self._views) > max(len(pictures), self.batch_size):
            self._views.pop(next(iter(self._views)))
        return Request(item.prompt, views, shown.is_video, shown.seconds)

    def _compute(self, batch: Batch, look: Look, memory: Memory, start: Moment) -> list[Line]:
        """Return the lines of a batch and log them.

        Args:
            batch: the items.
            look: what they show.
            memory: of the pictures before.
            start: when the wait for this batch began.
        """
        settings, until = generation(batch.items[0].gen_kwargs, self.max_new_tokens)
        if draws(self.pruner):
            (item,) = batch.items
            self.model.set_pruner(with_seed(self.pruner, item_seed(self.seed, item.doc_id)))
        if settings["do_sample"]:
            torch.manual_seed(item_seed(self.seed, look.name))
        with _named(batch):
            remembered = memory if batch.asks_again else None
            given = self._given(look.requests, remembered, settings)
        spent = {key: now / len(batch.items) for key, now in Moment().since(start).items()}
        lines = [
            {
                "task": item.task,
                "split": item.split,
                "doc_id": item.doc_id,
                "repeat": item.repeat,
                "batch": look.name,
                "prompt": item.prompt,
                "gen_kwargs": dict(item.gen_kwargs),
                **(_unread(result) if isinstance(result, str) else self._told(result, until)),
                **spent,
                "peak_memory_mib": peak_memory_mib(self.device),
                "pictures": pictures,
            }
            for item, result, pictures in zip(batch.items, given, look.pictures, strict=True)
        ]
        if self._log:
            self._log.append(lines)
        return lines

    def _given(
        self, requests: Sequence[Request], memory: Memory | None, settings: Mapping[str, Any]
    ) -> list[Answer | str]:
        """Return the answers to a batch; for a prompt the model cannot read, why.

        Where one is too long, the others are asked one by one.
        """
        try:
            return [*self._backend.answer(requests, memory, settings)]
        except PromptTooLongError as error:
            if len(requests) == 1:
                return [str(error)]
        return [given for request in requests for given in self._given([request], memory, settings)]

    def _told(self, result: Answer, until: tuple[str, ...]) -> Line:
        """Return the answer and what it took."""
        stats: PruneStats = result.stats
        work = prefill_work(self.model, stats)
        return {
            "answer": cut(result.text, until),
            "visual_tokens": stats.visual_tokens,
            "kept_tokens": stats.kept_tokens,
            "mean_visual_tokens_per_layer": stats.mean_visual_tokens,
            "withdrawn_from": stats.withdrawn_from,
            "prefill_flops": work and work.flops,
            "prefill_flops_unpruned": work and work.unpruned_flops,
        }

    def _fingerprint(self) -> tuple[str, dict[str, Any]]:
        """Return a name for all that answers depend on, and what it stands for."""
        settings = {
            "method": repr(self.pruner),
            "seed": self.seed,
            "template": self.template,
            "max_frames": self.max_frames,
            "max_new_tokens": self.max_new_tokens,
            "attn_implementation": self.model.config._attn_implementation,
        }
        return fingerprint(*self._backend.parts(), settings)

    def _open_log(self) -> None:
        """Open the log afresh, so that it also holds what an earlier call wrote."""
        if self.log_dir is None:
            return
        name, parts = self._fingerprint()
        if self._team.writes:
            self._log = AnswerLog(Path(self.log_dir), name, self.rank, parts)


@dataclass(frozen=True)
class Moment:
    """Now, on the clock, and in the time that this process has computed."""

    seconds: float = field(default_factory=time.perf_counter)
    cpu_seconds: float = field(default_factory=time.process_time)

    def since(self, start: Moment) -> dict[str, float]:
        """Return what has passed since an earlier moment."""
        return {
            "seconds": self.seconds - start.seconds,
            "cpu_seconds": self.cpu_seconds - start.cpu_seconds,
        }


@dataclass(frozen=True)
class Look:
    """What is known about a batch before the model runs."""

    name: str
    requests: list[Request] = field(default_factory=list)
    pictures: list[str | None] = field(default_factory=list)
    """Per item what stands for its pictures."""
    finished: list[Line] | None = None
    """The lines of an earlier start."""


def _unread(reason: str) -> Line:
    """Return the line of an item whose prompt the model cannot read."""
    counts = ("visual_tokens", "kept_tokens", "mean_visual_tokens_per_layer")
    flops = ("prefill_flops", "prefill_flops_unpruned")
    nothing = dict.fromkeys((*counts, *flops), 0)
    return {"answer": "", "failed": reason, **nothing, "withdrawn_from": None}


def seed_of_lmms_eval() -> int:
    """Return lmms-eval's ``--seed``, which it gave to torch; 0 where nobody seeded torch.

    Without a seed torch begins with a number that no one types, beyond the 32 bits of NumPy's.
    """
    seed = torch.initial_seed()
    return seed if seed < 2**32 else 0


@contextmanager
def _named(batch: Batch) -> Iterator[None]:
    """Say which documents a failure is about."""
    try:
        yield
    except Exception:
        places = sorted({(item.task, item.split) for item in batch.items})
        for task, split in places:
            documents = [i.doc_id for i in batch.items if (i.task, i.split) == (task, split)]
            logger.error("task %s, split %s, documents %s failed", task, split, documents)
        raise
