"""Submissions padded to what their server demands: EvalAI takes VQAv2 whole or not at all.

VQAv2's test-dev is a part of test2015, and the server wants an entry for every question of
test2015; those that are missing get an empty answer, as LLaVA's own conversion gives them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_todre.errors import TodreError
from llava_todre.files import read_json, write_whole

if TYPE_CHECKING:
    from eval.run.suites import Benchmark

DATA_SET, SPLIT = "lmms-lab-encoder/VQAv2", "test"
ENTRIES = 447_793
"""Questions of test2015."""
DUMMY = ""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_READ_IDS = f"""
import json, sys
from datasets import load_dataset
ids = load_dataset({DATA_SET!r}, split={SPLIT!r}).select_columns("question_id")["question_id"]
json.dump([int(each) for each in ids], sys.stdout)
"""


def complete_submissions(
    marks: Sequence[Benchmark], benchmarks: Mapping[str, dict[str, Any]]
) -> None:
    """Pad the submissions of a run in place, or say in their notes how that is done later."""
    for mark in marks:
        stored = benchmarks[mark.key]
        if mark.submission_entries is None or stored["submission"] is None:
            continue
        file = Path(stored["submission"])
        try:
            padded = pad(file, questions_of_data_set(), mark.submission_entries)
        except TodreError as error:
            text = f"{error} Pad it: python -m eval pad-submission {file} --questions FILE"
        else:
            stored["submission"] = str(padded)
            text = f"padded with empty answers to the {mark.submission_entries:,} of test2015"
        stored["note"] = "; ".join(filter(None, (stored["note"], text)))


def pad(file: Path, questions: Sequence[int], entries: int = ENTRIES) -> Path:
    """Write a submission with an entry for every question; returns the new file.

    Raises:
        TodreError: the file is something else, its questions are not among these, or the new file
            cannot be written.
    """
    given = read_json(file, "submission")
    if not isinstance(given, list) or not all(map(_is_entry, given)):
        raise TodreError(f"submission {str(file)!r} must list question_id and answer.")
    answers = {entry["question_id"]: entry["answer"] for entry in given}
    if len(answers) != len(given):
        raise TodreError(f"submission {str(file)!r} answers a question twice.")
    known = dict.fromkeys(questions)
    if len(known) != entries:
        raise TodreError(f"{len(known):,} questions are known, the server wants {entries:,}.")
    strange = [question for question in answers if question not in known]
    if strange:
        raise TodreError(
            f"submission {str(file)!r} answers {len(strange)} questions that are not of this set,"
            f" {strange[0]} for one."
        )
    whole = [{"question_id": each, "answer": answers.get(each, DUMMY)} for each in known]
    padded = file.with_name(f"{file.stem}-padded.json")
    write_whole(padded, json.dumps(whole))
    return padded


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("question_id"), int)
        and isinstance(value.get("answer"), str)
    )


def questions_of_data_set() -> list[int]:
    """Return the ids of test2015 from the data set, if it is on this machine; never downloads.

    Raises:
        TodreError: it is not.
    """
    done = subprocess.run(
        [sys.executable, "-c", _READ_IDS],
        env=os.environ | dict.fromkeys(_OFFLINE, "1"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise TodreError(f"split {SPLIT!r} of {DATA_SET} is not on this machine.")
    ids: list[int] = json.loads(done.stdout)
    return ids


def questions_of_file(file: Path) -> list[int]:
    """Return the ids in VQA's own question file, or in a plain list of ids."""
    found = read_json(file, "questions")
    listed = found.get("questions") if isinstance(found, dict) else found
    given = listed if isinstance(listed, list) else []
    ids = [each.get("question_id") if isinstance(each, dict) else each for each in given]
    known = [each for each in ids if isinstance(each, int)]
    if not known or len(known) < len(ids):
        raise TodreError(
            f"questions {str(file)!r} must be v2_OpenEnded_mscoco_test2015_questions.json, or a"
            " list of ids."
        )
    return known


def add_parser(commands: Any) -> None:
    """Add ``pad-submission`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pad-submission",
        help="give a VQAv2 submission the entries that EvalAI demands",
        description="Writes SUBMISSION-padded.json. A run does so by itself where it can.",
    )
    parser.add_argument("submission", type=Path, help="JSON of a run on VQAv2's test-dev")
    parser.add_argument(
        "--questions",
        type=Path,
        help="v2_OpenEnded_mscoco_test2015_questions.json (default: the data set on this machine)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    file = options.questions
    questions = questions_of_data_set() if file is None else questions_of_file(file)
    print(f"eval: written to {pad(options.submission, questions)}", file=sys.stderr)
    return 0
