"""A hash of what turns answers into scores: of a suite, its own task files, and data drawn here.

It is stored in every result and is no part of a run's name: after an edit of the suite the run goes
on with the answers in its log, and only what is prompted differently is computed again. (Tasks,
metrics and frames are in the name as well.) Not in it is lmms-eval itself, whose version every
result states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from eval.mini import data as mini_data
from eval.run.suites import Suite

_DEFINES = re.compile(r"^task:\s*['\"]?([\w.-]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)
_NOT_OURS = ("data", "__pycache__")
_COMMENT_EDITED = {
    "997eb421c20b563bd5cb41d8d613479b6d6af5b44ba6c3df2f34c7479a4ec0a7": (  # mini/_template_yaml
        "640438cab193294a5799f8a029a0167d7ceb83a46f2cea2342882d34bdb60a6b"
    ),
}
"""Files of which only a comment was edited since results were stored: hash now, hash then."""


def suite_digest(suite: Suite) -> str:
    """Return a hash that changes with anything in a suite that can change a score."""
    marks = [dataclasses.asdict(mark) for mark in suite.benchmarks]
    for mark in marks:
        del mark["note"]  # a remark
    parts = {
        "benchmarks": marks,
        "task files": dict(_task_files(suite)),
        "data": mini_data.stamp() if suite.data == "mini" else None,
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _task_files(suite: Suite) -> Iterator[tuple[str, str]]:
    """Yield name and hash of every file next to those that define tasks of the suite."""
    if suite.include is None:
        return
    folders = {
        file.parent
        for file in suite.include.rglob("*.yaml")
        if set(_DEFINES.findall(file.read_text(encoding="utf-8"))) & set(suite.tasks)
    }
    for folder in sorted(folders):
        for file in sorted(folder.rglob("*")):
            place = file.relative_to(suite.include)
            if file.is_file() and not any(part in _NOT_OURS for part in place.parts):
                yield place.as_posix(), _hash(file)


def _hash(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return _COMMENT_EDITED.get(digest, digest)
