"""What one run is: one model, one method, one suite, resolved and checked before anything starts.

    configs/runs/X.yaml  ->  Run  ->  a name, the arguments of lmms-eval, the "config" of its result

A run is known by what it computes. Its name is readable and ends in a hash of everything that can
change a score; how it is carried out (devices, number of processes) is not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from eval import ROOT
from eval.results.known_models import key_of, known_models, settings_of
from eval.run.checkpoints import fingerprint, local_folder, shown_path
from eval.run.config import parsed
from eval.run.suite_digest import suite_digest
from eval.run.suites import Benchmark, Suite, check_limit, load_suite
from llava_todre.errors import TodreError, unknown
from llava_todre.hf.load import BACKENDS
from llava_todre.model.chat_template import TEMPLATES, planned_template
from llava_todre.model.convert import PROTOCOLS
from llava_todre.model.placement import ATTENTION, DTYPES, TP_PLANS, spreads
from llava_todre.model.prompt import AUTO
from llava_todre.pruners import Combined, Pruner, create_pruner

CONFIGS = ROOT / "configs"
_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "dtype": ("auto", *DTYPES),
    "protocol": tuple(PROTOCOLS),
    "tp_plan": (None, *TP_PLANS),
    "attn_implementation": ATTENTION,
    "backend": BACKENDS,
    "template": TEMPLATES,
}
_ADDED = (("cls_heads", "mean"), ("newlines", "row"))
"""Options that came later, at what was done before there was a choice: in no name, so that results
from before are found."""
_LONGEST_NAME = 120
_LARGEST_SEED = 2**32 - 1
"""Of NumPy, which lmms-eval seeds, too."""


@dataclass(frozen=True)
class Model:
    """Keys of a model config, as the lmms-eval model ``llava_todre`` knows them."""

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    protocol: str = "native"
    device_map: str | None = None
    tp_plan: str | None = None
    attn_implementation: str = "sdpa"
    backend: str = "auto"
    template: str = AUTO
    max_new_tokens: PositiveInt = 1024
    clip_text: str | None = None


MODEL_KEYS = tuple(field.name for field in dataclasses.fields(Model))


@dataclass(frozen=True)
class Run:
    """One method on one model and one suite; its fields are the keys of a run config."""

    model: Any
    """Resolved: ``key``, all keys of :class:`Model`; for local folders ``fingerprint``s too."""
    method: str
    suite: str
    options: dict[str, Any] | None = None
    """Resolved: the budget, and every option that is not the method's default."""
    limit: PositiveInt | None = None
    """Items per task; None is all."""
    seed: NonNegativeInt = 0
    """Of lmms-eval, and of methods that draw at random."""
    batch_size: PositiveInt = 1

    @property
    def model_key(self) -> str:
        """Name of the model config, or the last part of an inline model's path."""
        return str(self.model["key"])

    @property
    def pruner(self) -> Pruner:
        """The method with its options."""
        return create_pruner(self.method, **(self.options or {}))

    @property
    def suite_spec(self) -> Suite:
        """The content of the suite's file."""
        return load_suite(self.suite)

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """Of the suite."""
        return self.suite_spec.benchmarks

    @property
    def suite_digest(self) -> str:
        """Hash of all in the suite that can change a score."""
        return suite_digest(self.suite_spec)

    @property
    def expected(self) -> dict[str, int]:
        """Number of items of each task."""
        sizes = {k: n for mark in self.benchmarks for k, n in mark.samples.items()}
        return {task: min(size, self.limit or size) for task, size in sizes.items()}

    @property
    def is_spread(self) -> bool:
        """Whether one copy of the model takes several devices."""
        return spreads(self.model["device_map"])

    @property
    def is_split(self) -> bool:
        """Whether one copy of the model takes several processes (tensor parallelism)."""
        return self.model["tp_plan"] is not None

    def config(self) -> dict[str, Any]:
        """Return what the result says about how it was made; JSON types only."""
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in (self.options or {}).items()
        }
        marks = [mark.key for mark in self.benchmarks]
        return {**config, "options": options, "benchmarks": marks}

    @cached_property
    def name(self) -> str:
        """A name fit for a file: what a reader wants to know, then a hash of all of it."""
        words = [self.model_key, self.suite, self.method]
        for key, value in (self.options or {}).items():
            known = key in ("retain_ratio", "retain_tokens")
            words.append(_short(value) if known else f"{key}-{_short(value)}")
        words += [f"seed{self.seed}"] * bool(self.seed)
        words += [f"limit{self.limit}"] * (self.limit is not None)
        readable = re.sub(r"[^\w.+-]+", "-", "-".join(words))[:_LONGEST_NAME].strip("-")
        return f"{readable}-{self._digest()}"

    def _digest(self) -> str:
        """Hash all that can change a score, the method's defaults and the suite's tasks too.

        Benchmarks that no average contains are left out: they can be added to a suite, and results
        from before are still known for its own. ``suite_digest`` tells them apart.
        """
        options = {
            key: value
            for key, value in options_of(self.pruner).items()
            if (key.rpartition(".")[2], value) not in _ADDED
        }
        marks = [mark for mark in self.benchmarks if mark.averaged]
        measured = [(m.key, m.tasks, m.metric, m.frames) for m in marks]
        model = {**self.model, "device_map": None}  # where it computes is not what
        del model["tp_plan"]
        if model["backend"] == "transformers":  # reads none; once the default was written there
            model["template"] = "vicuna_v1"
        if model["backend"] == "auto":  # what it was before there was a choice
            del model["backend"]
        everything = {**self.config(), "model": model, "options": options, "benchmarks": measured}
        text = json.dumps(everything, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def model_args(self, log_dir: str) -> str:
        """Return what follows ``--model_args``."""
        frames = {mark.frames for mark in self.benchmarks} - {None}
        folder = local_folder(self.model["pretrained"])
        arguments = {
            **{key: self.model[key] for key in MODEL_KEYS},
            "pretrained": self.model["pretrained"] if folder is None else shown_path(folder),
            "method": self.method,
            **(self.options or {}),
            "seed": self.seed,
            "max_frames": frames.pop() if frames else None,
            "num_items": "".join(f"{task}:{count};" for task, count in self.expected.items()),
            "log_dir": log_dir,
        }
        if arguments["backend"] == "auto":
            del arguments["backend"]
        given = {key: value for key, value in arguments.items() if value is not None}
        return ",".join(f"{key}={_as_argument(value)}" for key, value in given.items())


RUN_KEYS = tuple(field.name for field in dataclasses.fields(Run))


def resolve(config: Mapping[str, Any], where: str = "run") -> Run:
    """Return the run a config describes.

    Args:
        config: keys of :class:`Run`; ``model``, ``method`` and ``suite`` are required.
        where: what to call the config in messages.

    Raises:
        TodreError: unknown key, method, option, suite or model; value of wrong type or range.
    """
    run = parsed(Run, config, where)
    key, model = resolve_model(run.model)
    options = dict(_without_levels(run.options or {}))
    frames = {mark.frames for mark in run.benchmarks if mark.frames is not None}
    if len(frames) > 1:
        raise TodreError(
            f"{where}: suite {run.suite!r} takes {sorted(frames)} frames; allowed: one count."
        )
    budget = [key for key in ("retain_ratio", "retain_tokens") if options.get(key) is not None]
    if len(budget) > 1:
        raise TodreError(f"{where}: options {' and '.join(budget)} were both given; allowed: one.")
    if "seed" in options:
        raise TodreError(f"{where}: option 'seed' is the key 'seed' of the run; give it there.")
    if run.limit is not None:
        check_limit(where, run.suite_spec, run.limit)
    if run.seed > _LARGEST_SEED:
        raise TodreError(f"{where}: seed must be at most {_LARGEST_SEED}, got {run.seed}.")
    return replace(run, model={"key": key, **model}, options=canonical_options(run.method, options))


def resolve_model(model: Any) -> tuple[str, dict[str, Any]]:
    """Return (key, all settings) of a model.

    Args:
        model: the name of a file of configs/models, a checkpoint's folder or hub id (with a slash),
            or a mapping of :class:`Model`'s keys, which changes such a file if it has a ``key``. A
            copy of a known checkpoint, by the last part of its path, has that one's settings. Of
            ``device_map`` and ``tp_plan``, the one that is given replaces the other of the file.
    """
    changes = dict(model) if isinstance(model, Mapping) else {"key": model}
    given = changes.pop("key", None)
    base: dict[str, Any] = {}
    key = Path(str(changes.get("pretrained"))).name
    if given is not None:
        key, base = _known_model(given)
    where = f"model {key!r}"
    for name, other in (("device_map", "tp_plan"), ("tp_plan", "device_map")):
        if changes.get(name) is not None:
            base.pop(other, None)
    settings = dataclasses.asdict(parsed(Model, base | changes, where))
    for name, allowed in _ALLOWED.items():
        if settings[name] not in allowed:
            raise unknown(f"{where}: {name}", settings[name], map(str, allowed))
    if settings["tp_plan"] is not None and settings["device_map"] is not None:
        raise TodreError(f"{where}: device_map and tp_plan were both given; allowed: one.")
    folder = local_folder(settings["pretrained"])
    if folder is not None:
        settings["fingerprint"] = fingerprint(folder)
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", settings["pretrained"]):
        raise TodreError(
            f"{where}: pretrained {settings['pretrained']!r} does not exist; "
            "allowed: a checkpoint's folder, or a hub id owner/name."
        )
    if settings["template"] == AUTO and settings["backend"] != "transformers":
        settings["template"] = planned_template(settings["pretrained"], folder)
    clip_text = local_folder(settings["clip_text"] or "")
    if clip_text is not None:
        settings["clip_text_fingerprint"] = fingerprint(clip_text)
    return key, settings


def _known_model(given: Any) -> tuple[str, dict[str, Any]]:
    """Return (key, settings) of a name of configs/models, or of a path."""
    if isinstance(given, str) and given in known_models():
        return given, settings_of(given)
    if not (isinstance(given, str) and "/" in given):
        raise unknown("model", given, [*known_models(), "a folder or hub id with a slash"])
    key = key_of(given)
    if key is None:
        return Path(given).name, {"pretrained": given}
    return key, {**settings_of(key), "pretrained": given, "revision": None}


def _without_levels(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield options as A+B calls them, also where ``--set options.inside.tau=`` made a level."""
    for key, value in options.items():
        if key in ("before", "inside") and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def canonical_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same options in their one spelling: the budget, and what is not the default."""
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    every = options_of(create_pruner(method, **given))
    defaults = options_of(create_pruner(method))
    changed = {key: value for key, value in every.items() if value != defaults[key]}
    if "retain_tokens" in changed:
        return changed
    return {"retain_ratio": every["retain_ratio"], **changed}


def options_of(pruner: Pruner) -> dict[str, Any]:
    """Return all options of a method, spelled as ``create_pruner`` takes them."""
    if not isinstance(pruner, Combined):
        return {field.name: getattr(pruner, field.name) for field in dataclasses.fields(pruner)}
    before, inside = options_of(pruner.before), options_of(pruner.inside)
    budget = {key: before.pop(key) for key in ("retain_ratio", "retain_tokens")}
    budget |= {f"before.{key}": value for key, value in before.items()}
    return budget | {f"inside.{key}": value for key, value in inside.items()}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_short, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_argument(value: Any) -> str:
    """Spell a value so that it survives lmms-eval's and the model's reading."""
    if isinstance(value, tuple):
        return "".join(f"{part!r};" for part in value) or "[]"
    text = str(value)
    return f"'{text}'" if "," in text else text
