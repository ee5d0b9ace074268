"""Whatever a file holds, reading it ends soon: with its content, or one line that names it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_todre import files
from llava_todre.errors import TodreError
from llava_todre.files import parse_yaml, read_json, read_mapping, write_whole

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "impossible date": ("a: 2026-02-30", "day is out of range for month|day must be in range"),
    "5,000 digits": ("a: " + "9" * 5000, "a number in line 1 is too long"),
    "5,000 hexadecimal digits": ("a: 0x" + "f" * 5000, "a number in line 1 is too long"),
    "sexagesimal": ("a: 1" + ":59" * 80_000, "a number in line 1 is too long"),
    "nested": ("[" * 20_000, "nested too deeply"),
    "nested blocks": ("- " * 20_000, "nested too deeply"),
    "alias bomb": (LAUGHS, "more than 100,000 values"),
    "its own alias": ("a: &a [*a]", "an alias contains itself"),
    "twice": ("tau: 1\nratio: 2\ntau: 3", "key 'tau' is there twice, again in line 3"),
    "twice inside": ("a: {b: 1, 'b': 2}", "key 'b' is there twice"),
    "no boolean": ("a: !!bool perhaps", "not valid YAML"),
    "no timestamp": ("a: !!timestamp perhaps", "not valid YAML"),
    "no number": ("a: !!int ''", "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "control character": ("a: \x07", "not valid YAML"),
    "a list key": ("{[1]: 2}", "unhashable key"),
    "two documents": ("a: 1\n---\na: 2", "another document"),
    "a list": ("- 1", "must hold 'key: value' lines"),
    "a number for a key": ("1: 2", "must hold 'key: value' lines"),
    "nothing": ("", "must hold 'key: value' lines"),
}


@pytest.mark.parametrize("kind", YAML)
def test_what_no_config_says_is_one_line_with_the_file(kind: str, tmp_path: Path) -> None:
    text, said = YAML[kind]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(TodreError, match=said) as raised:
        read_mapping(file, "config")
    assert time.process_time() - start < 5
    message = str(raised.value)
    assert message.startswith(f"config {str(file)!r} ") and "\n" not in message
    assert len(message) < 600


JSON = {
    "cut short": ('{"a": [1, 2', "is not JSON: Expecting"),
    "nested": ("[" * 200_000, "is not JSON: it is nested too deeply"),
    "5,000 digits": ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
    "nothing": ("", "is not JSON: Expecting value"),
}


@pytest.mark.parametrize("kind", JSON)
def test_what_is_no_json_is_one_line_with_the_file(kind: str, tmp_path: Path) -> None:
    text, said = JSON[kind]
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(TodreError, match=said) as raised:
        read_json(file, "run")
    assert str(raised.value).startswith(f"run {str(file)!r} ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_mapping, read_json])
def test_what_is_no_text_file_is_refused_at_once(
    read: Callable[[Path, str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, binary, large = (tmp_path / name for name in ("pipe", "binary", "large"))
    os.mkfifo(pipe)
    binary.write_bytes(bytes(range(256)))
    large.write_text(f"a: {'x' * 300}")
    for file, said in (
        (pipe, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (binary, "must be UTF-8 text"),
        (tmp_path / "gone", "No such file"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(TodreError, match=said) as raised:
            read(file, "config")
        assert str(raised.value).startswith(f"config {str(file)!r} ")
    with pytest.raises(TodreError, match="must have 300 bytes at most, got 303"):
        files.read_text(large, "config", 300)


def test_what_people_write_is_read_as_ever() -> None:
    text = "base: &base {a: 1, b: [1_000, 0x10, 1e3, .5]}\nown: {<<: *base, a: 2}\nlist: *base"
    assert parse_yaml(text, "text") == {
        "base": {"a": 1, "b": [1000, 16, "1e3", 0.5]},
        "own": {"a": 2, "b": [1000, 16, "1e3", 0.5]},
        "list": {"a": 1, "b": [1000, 16, "1e3", 0.5]},
    }
    assert parse_yaml("", "text") is None


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")  # a write that fails names no file

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TodreError, match=r"run\.json' cannot be written: No space left on device"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
