"""The class that lmms-eval runs."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache
from tqdm import tqdm

from llava_todre.errors import PromptTooLongError, TodreError, unknown
from llava_todre.image_cache import ImageCache
from llava_todre.lmms_plugin import NAME, answer_line
from llava_todre.lmms_plugin.answer_log import AnswerLog, Line
from llava_todre.lmms_plugin.arguments import (
    LOADING,
    build_pruner,
    draws,
    item_counts,
    item_seed,
    seed_of_lmms_eval,
    take_loading,
    text,
    whole,
    with_seed,
)
from llava_todre.lmms_plugin.distributed import (
    Team,
    all_counts,
    join_processes,
    peak_memory_mib,
    placement,
)
from llava_todre.lmms_plugin.fingerprint import fingerprint
from llava_todre.lmms_plugin.image_keys import image_keys, shared_images
from llava_todre.lmms_plugin.requests import (
    Batch,
    Item,
    Key,
    Shown,
    ahead,
    batches_of,
    generation,
    items_of,
    shown_of,
)
from llava_todre.load_options import LoadOptions
from llava_todre.model.chat_template import TEMPLATES
from llava_todre.model.images import Picture
from llava_todre.model.prompt import AUTO
from llava_todre.request import Answer, Request, Views
from llava_todre.vlm import load, runs_stock


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
                error before the first answer. None accepts any number.
            options: fields of :class:`~llava_todre.load_options.LoadOptions`, and options of the
                method. With several processes only the type of ``device`` counts: each takes the
                GPU of its local rank. With ``tp_plan`` all of them work on every item.

        Raises:
            TodreError: one line saying which argument is wrong, and what is expected.
        """
        super().__init__()
        if pretrained is None:
            raise TodreError("pretrained must be a folder or a hub id, got None.")
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
            if chosen.template not in TEMPLATES:
                raise unknown("template", chosen.template, TEMPLATES)
            if runs_stock(path, chosen):  # runs name a template for every model
                chosen = replace(chosen, template=AUTO)
            self.vlm = load(path, chosen)
            self.vlm.set_pruner(self.pruner)
        self.model: Any = self.vlm.model
        self.template = self.vlm.template
        self._device = self.vlm.device
        self._log: AnswerLog | None = None
        self._views: dict[str, Sequence[Picture | Views]] = {}
        _name_in_response_cache(self._fingerprint)

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
        """Raise unless all processes together have as many items as ``num_items`` says."""
        if self.num_items is None:
            return
        found = all_counts(Counter(item.task for item in items.values() if item.repeat == 0))
        for task, expected in self.num_items.items():
            if found[task] != expected:
                raise TodreError(
                    f"task {task!r} must have {expected} items as in the suite, got {found[task]}; "
                    "if the data is right, correct the suite."
                )

    def _answers(self, items: Mapping[Key, Item]) -> dict[Key, str]:
        self._open_log()
        batches = self._batches(list(items.values()))
        answers: dict[Key, str] = {}
        cache = ImageCache()
        bar = tqdm(total=len(items), disable=self.rank != 0, unit="item", desc=NAME)
        # Documents are read in one thread, always the same: tasks of lmms-eval may keep state.
        with bar, closing(ahead(self._prepare, batches)) as prepared:
            for batch in batches:
                start = answer_line.clocks()
                ready = next(prepared)
                lines = self._team.agreed(ready.finished)
                if lines is None:
                    lines = self._compute(batch, ready, cache, start)
                for item, line in zip(batch.items, lines, strict=True):
                    answers[item.key] = line["answer"]
                bar.update(len(batch.items))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: the benchmarks of the papers are generated, not ranked."""
        raise NotImplementedError(
            "llava_todre answers by generating text; tasks that compare likelihoods "
            "(output_type loglikelihood or multiple_choice) are not supported."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: a second round may ask about tokens dropped in the first."""
        raise NotImplementedError(
            "llava_todre answers one question at a time; tasks of several rounds "
            "(output_type generate_until_multi_round) are not supported."
        )

    # ------------------------------------------------------------------ one batch

    def _batches(self, items: Sequence[Item]) -> list[Batch]:
        """Return what is answered together, questions about one image in sequence."""
        if draws(self.pruner):  # every item has a seed of its own, and so tokens of its own
            return batches_of(items, 1, lambda item: None)
        places = dict.fromkeys((item.task, item.split) for item in items)
        documents = {place: self.task_dict[place[0]][place[1]] for place in places}
        keys = {place: image_keys(each) for place, each in documents.items()}
        sizes = {place: len(each) for place, each in documents.items()}
        return batches_of(
            items,
            self.batch_size,
            lambda item: keys[item.task, item.split](item.doc_id),
            shared_images(keys, sizes),
        )

    def _prepare(self, batch: Batch) -> Prepared:
        """Return the inputs of a batch, or its lines where the log has them."""
        with batch.named():
            shown = [self._shown(item) for item in batch.items]
            name = batch.name(shown)
            if self._log:
                lines = [
                    self._log.finished(item.task, item.split).get((name, item.doc_id, item.repeat))
                    for item in batch.items
                ]
                if all(lines):
                    return Prepared(name, finished=[line for line in lines if line])
            requests = [self._request(*pair) for pair in zip(batch.items, shown, strict=True)]
            return Prepared(name, requests, [images.name for images in shown])

    def _shown(self, item: Item) -> Shown:
        document = self.task_dict[item.task][item.split][item.doc_id]
        return shown_of(item, item.doc_to_visual(document), self.max_frames)

    def _request(self, item: Item, shown: Shown) -> Request:
        """Return a question with its views; equal images are the same object for a while."""
        groups = [shown.images] if shown.is_video else [(one,) for one in shown.images]
        views: list[Picture | Views] = []
        for digest, group in zip(shown.digests, groups, strict=True):
            known = self._views.pop(digest, None)
            if known is None:
                known = self.vlm.prepare(Request("", group, shown.is_video)).images
            self._views[digest] = known  # the latest is the last
            views += known
        while len(self._views) > max(len(groups), self.batch_size):
            self._views.pop(next(iter(self._views)))
        return Request(item.prompt, views, shown.is_video, shown.seconds)

    def _compute(
        self, batch: Batch, ready: Prepared, cache: ImageCache, start: Mapping[str, float]
    ) -> list[Line]:
        """Return the lines of a batch and log them.

        Args:
            batch: the items.
            ready: their inputs.
            cache: of earlier images.
            start: the clocks when the wait for this batch began.
        """
        settings, until = generation(batch.items[0].gen_kwargs, self.max_new_tokens)
        if draws(self.pruner):
            (item,) = batch.items
            self.vlm.set_pruner(with_seed(self.pruner, item_seed(self.seed, item.doc_id)))
        if settings["do_sample"]:
            torch.manual_seed(item_seed(self.seed, ready.name))
        with batch.named():
            given = self._given(ready.requests, cache if batch.shares_images else None, settings)
        now = answer_line.clocks()
        cost = {key: (now[key] - start[key]) / len(batch.items) for key in now}
        cost["peak_memory_mib"] = peak_memory_mib(self.device)
        lines = [
            {
                **answer_line.of_item(item),
                **{"batch": ready.name, "pictures": images},
                **(
                    answer_line.of_failure(result)
                    if isinstance(result, str)
                    else answer_line.of_answer(result, until, self.vlm)
                ),
                **cost,
            }
            for item, result, images in zip(batch.items, given, ready.images, strict=True)
        ]
        if self._log:
            self._log.append(lines)
        return lines

    def _given(
        self, requests: Sequence[Request], cache: ImageCache | None, settings: Mapping[str, Any]
    ) -> list[Answer | str]:
        """Return the answers to a batch; for a prompt the model cannot read, why.

        Where one is too long, each is answered by itself.
        """
        try:
            return [*self.vlm.answer(requests, image_cache=cache, **settings)]
        except PromptTooLongError as error:
            if len(requests) == 1:
                return [str(error)]
        return [given for request in requests for given in self._given([request], cache, settings)]

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
class Prepared:
    """What is known about a batch before the model runs."""

    name: str
    requests: list[Request] = field(default_factory=list)
    images: list[str | None] = field(default_factory=list)
    """Per item a hash of its images."""
    finished: list[Line] | None = None
    """The lines of an earlier start."""


def _name_in_response_cache(fingerprint: Callable[[], tuple[str, Any]]) -> None:
    """Let lmms-eval's response caches (``--use_cache``) know our model by its fingerprint, too.

    lmms-eval 0.7.3 looks answers up by the text after ``--model_args``. The same text may name
    another model or method later: a YAML file with other options, a folder with other weights,
    another version of this package, or another ``--seed``.

    Args:
        fingerprint: of the model; called only when a cache is opened, as it reads all weights.
    """
    create = getattr(ResponseCache.create, "__wrapped__", ResponseCache.create)

    @functools.wraps(create)
    def create_for(*args: Any, model: str = "", **kwargs: Any) -> ResponseCache:
        name = f"{model} {fingerprint()[0]}" if model == NAME else model
        return create(*args, model=name, **kwargs)

    ResponseCache.create = create_for
