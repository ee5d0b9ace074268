"""The part of a report that says where its numbers come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.report.page import Html, folded, table, text

_KEYS = ("device", "torch_threads", "git_commit", "git_dirty", "seed")


def origin(stored: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Return a table of times, device, versions and commit, and every run's configuration.

    Args:
        stored: result files; where they differ, all values are told.
        configs: one per run.
    """
    times = sorted({str(each.get("time_utc")) for each in stored})
    rows = [["time (UTC)", " to ".join(dict.fromkeys((times[0], times[-1])))]]
    rows += [[key, _values(each.get(key) for each in stored)] for key in _KEYS if key in stored[0]]
    packages = dict.fromkeys(name for each in stored for name in each.get("versions", {}))
    rows += [
        [name, _values(each.get("versions", {}).get(name) for each in stored)] for name in packages
    ]
    settings = text("\n".join(json.dumps(config) for config in configs))
    block = Html(f'<div class="wide"><pre>{settings}</pre></div>')
    return [
        table(["key", "value"], rows, left=2),
        folded(f"Configuration of the {len(configs)} runs", block),
    ]


def _values(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))
