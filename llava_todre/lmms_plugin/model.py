"""The class that lmms-eval runs."""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_todre.errors import PromptTooLongError, TodreError
from llava_todre.image_cache import ImageCache
from llava_todre.lmms_plugin.answer_log import AnswerLog, Line
from llava_todre.lmms_plugin.arguments import (
    LOADING,
    build_pruner,
    draws,
    item_counts,
    item_seed,
    take_loading,
    text,
    whole,
    with_seed,
)
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
from llava_todre.load_options import LoadOptions
from llava_todre.model.images import Picture
from llava_todre.model.prompt import AUTO
from llava_todre.request import Answer, Request, Views
from llava_todre.stats import PruneStats
from llava_todre.vlm import load, runs_stock
from llava_todre.work import prefill_work

logger = logging.getLogger(__name__)


class LlavaTodre(lmms):
    """LLaVA-1.5 or LLaVA-NeXT with one pruning method, for tasks that generate text."""

    is_simple = True

    def __init__(
        self,
        pretrained: Any = None,
        method: str = "todre",
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
            method: a name from ``todre list``, A+B, or a YAML file of ``configs/methods``.
            max_frames: frames of a video, evenly spaced over the clip.
            batch_size: items answered together; methods that draw at random answer one by one.
            max_new_tokens: longest answer where the task does not say.
            log_dir: folder for the answers of an interrupted run; None keeps none.
            seed: of methods that draw at random, and of sampled answers; when not given, that of
                the method's file, or else PyTorch's, which lmms-eval's ``--seed`` sets. Every item
                draws for itself.
            num_items: ``task:96;other:3000``: how many items each task has; anything else is an
                error before the first answer. None takes what there is.
            options: fields of :class:`~llava_todre.load_options.LoadOptions`, and options of the
                method. With several processes only the kind of ``device`` counts: each takes the
                GPU of its local rank. With ``tp_plan`` all of them work on every item.

        Raises:
            TodreError: one line saying which argument is wrong, and what is allowed.
        """
        super().__init__()
        if pretrained is None:
            raise TodreError("pretrained is missing; give a folder or a hub id.")
        loading = take_loading(options)
        own = {*inspect.signature(LlavaTodre).parameters} - {"options"}
        own |= {each.name for each in LOADING}
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
        places = [loading.pop(key, None) for key in ("device", "device_map", "tp_plan")]
        self._team = Team(self._world_size if places[2] else 1, self._rank)
        with self._team.together():
            path = text("pretrained", pretrained) or ""
            chosen = LoadOptions.of(None, {**loading, **placement(self.accelerator, *places)})
            if runs_stock(path, chosen):  # runs name a template for every model
                chosen = replace(chosen, template=AUTO)
            self.vlm = load(path, chosen)
            self.vlm.set_pruner(self.pruner)
        self.model: Any = self.vlm.model
        self.template = self.vlm.template
        self._device = self.vlm.device
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
            cache = ImageCache()
            for batch in batches:
                start = Moment()
                look = next(looked_at)
                lines = self._team.agreed(look.finished)
                if lines is None:
                    lines = self._compute(batch, look, cache, start)
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
                known = self.vlm.prepare(Request("", group, shown.is_video)).images
            self._views[digest] = known  # the latest is the last
            views += known
        while len(self._views) > max(len(pictures), self.batch_size):
            self._views.pop(next(iter(self._views)))
        return Request(item.prompt, views, shown.is_video, shown.seconds)

    def _compute(self, batch: Batch, look: Look, cache: ImageCache, start: Moment) -> list[Line]:
        """Return the lines of a batch and log them.

        Args:
            batch: the items.
            look: what they show.
            cache: of the pictures before.
            start: when the wait for this batch began.
        """
        settings, until = generation(batch.items[0].gen_kwargs, self.max_new_tokens)
        if draws(self.pruner):
            (item,) = batch.items
            self.vlm.set_pruner(with_seed(self.pruner, item_seed(self.seed, item.doc_id)))
        if settings["do_sample"]:
            torch.manual_seed(item_seed(self.seed, look.name))
        with _named(batch):
            shared = cache if batch.asks_again else None
            given = self._given(look.requests, shared, settings)
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
        self, requests: Sequence[Request], cache: ImageCache | None, settings: Mapping[str, Any]
    ) -> list[Answer | str]:
        """Return the answers to a batch; for a prompt the model cannot read, why.

        Where one is too long, the others are asked one by one.
        """
        try:
            return [*self.vlm.answer(requests, image_cache=cache, **settings)]
        except PromptTooLongError as error:
            if len(requests) == 1:
                return [str(error)]
        return [given for request in requests for given in self._given([request], cache, settings)]

    def _told(self, result: Answer, until: tuple[str, ...]) -> Line:
        """Return the answer and what it took."""
        stats: PruneStats = result.stats
        work = prefill_work(self.vlm, stats)
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
            "attn_implementation": self.vlm.config._attn_implementation,
        }
        return fingerprint(self.vlm, settings)

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
