"""Reading untrusted YAML and JSON, and writing files whole or not at all.

A file may be damaged or hostile: reading it gives its content or one TodreError that names it,
after a bounded amount of work.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llava_todre.errors import TodreError

_YAML_BYTES = 256 << 10
JSON_BYTES = 256 << 20
_MOST_NODES = 100_000
"""Values in a YAML text, each alias counted as all that it stands for."""
_LONGEST_NUMBER = 100
_LONGEST_REASON = 300


def configs(kind: str) -> Path:
    """Return the folder of our ``methods`` or ``tasks``: in the package, or in its checkout."""
    package = Path(__file__).resolve().parent
    packed = package / "configs" / kind
    return packed if packed.is_dir() else package.parent / "configs" / kind


def read_text(file: Path, key: str, most: int = _YAML_BYTES) -> str:
    """Return the text of a regular file.

    Args:
        file: UTF-8; a pipe or device is refused, as reading it may never end.
        key: what messages call it.
        most: bytes it may have.

    Raises:
        TodreError: it is absent, unreadable, too large, or not such a file.
    """
    where = f"{key} {str(file)!r}"
    try:
        check_regular(file, key)
        size = file.stat().st_size
        if size > most:
            raise TodreError(f"{where} must have {most:,} bytes at most, got {size:,}.")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise TodreError(f"{where} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise TodreError(f"{where} must be UTF-8 text: {error}") from None
    except TodreError:
        raise
    except ValueError as error:  # a NUL in the path
        raise TodreError(f"{where} cannot be read: {error}.") from None


def check_regular(file: str | os.PathLike[str], key: str) -> None:
    """Refuse a directory, and a pipe or a device, as reading one may never end.

    Args:
        file: what is about to be read; if it is missing, that is left to whoever opens it.
        key: what messages call it.
    """
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise TodreError(f"{key} {str(file)!r} cannot be read: it is not a regular file.")


def read_mapping(file: Path, key: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        file: with ``key: value`` lines.
        key: what messages call it.

    Raises:
        TodreError: the file cannot be read, or holds something else.
    """
    where = f"{key} {str(file)!r}"
    content = parse_yaml(read_text(file, key), where)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise TodreError(f"{where} must hold 'key: value' lines.")
    return content


def read_json(file: Path, key: str) -> Any:
    """Return what a JSON file holds.

    Args:
        file: with one JSON value.
        key: what messages call it.

    Raises:
        TodreError: the file cannot be read, is no JSON, or names a key twice in one object.
    """
    text = read_text(file, key, JSON_BYTES)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise TodreError(f"{key} {str(file)!r} is not JSON: {_reason(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """Return the value that a YAML text stands for.

    Args:
        text: of a file or a command line.
        where: what messages begin with.

    Raises:
        TodreError: it is no YAML, names a key twice, or stands for more than anybody would write.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except Exception as error:  # PyYAML lets out what int(), datetime and dicts raise as well
        raise TodreError(f"{where} is not valid YAML: {_reason(error)}") from None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file; an interruption leaves the one that was there before.

    Args:
        file: in a folder that exists.
        content: text is stored as UTF-8.

    Raises:
        TodreError: it cannot be written, for instance because the disk is full.
    """
    draft = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        try:
            with draft.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(file, error) from None


def unwritable(file: Path, error: OSError) -> TodreError:
    """Return the error for a file that the system does not let us write."""
    return TodreError(f"{str(file)!r} cannot be written: {error.strerror or error}.")


class _Loader(yaml.SafeLoader):
    """YAML as the safe loader reads it, without what only an accident or an attack writes."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _num_nodes(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"it stands for more than {_MOST_NODES:,} values")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = _repeated((key.tag, key.value) for key in keys)
        if twice is not None:
            mark = next(key.start_mark for key in reversed(keys) if key.value == twice[1])
            raise yaml.YAMLError(f"key {twice[1]!r} is there twice, again in line {mark.line + 1}")
        return node

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number in line {node.start_mark.line + 1} is too long")
        is_float = node.tag.endswith("float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _num_nodes(node: Any, known: dict[int, int | None]) -> int:
    """Return how many values a node stands for, those of aliases each time."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.YAMLError("an alias contains itself")
        return count
    known[id(node)] = None
    count = 1
    if isinstance(node, yaml.MappingNode):
        count += sum(_num_nodes(part, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_num_nodes(part, known) for part in node.value)
    known[id(node)] = count
    return count


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {_repeated(key for key, _ in pairs)!r} is there twice")
    return found


def _repeated(values: Iterable[Any]) -> Any:
    """Return the first value that was there before; None if all differ."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).replace('"<unicode string>",', "").split())[:_LONGEST_REASON]
    return (
        text if isinstance(error, (yaml.YAMLError, ValueError)) else "a value does not fit its tag"
    )
