"""Files: YAML with keys, and writing that leaves the whole file or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from llava_todre.errors import TodreError


def check_regular(file: str | os.PathLike[str], key: str) -> None:
    """Refuse a pipe, a device or a socket: reading one may never end.

    What is missing, or a directory, is left to whoever opens it.

    Args:
        file: what is about to be read.
        key: what messages call it.
    """
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise TodreError(f"{key} {str(file)!r} is a pipe or a device; give a file.")


def read_mapping(file: Path, key: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        file: with ``key: value`` lines.
        key: what messages call it.

    Raises:
        TodreError: the file cannot be read, or holds something else.
    """
    check_regular(file, key)
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise TodreError(f"{key} {str(file)!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise TodreError(f"{key} {str(file)!r} is not valid YAML: {text}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise TodreError(f"{key} {str(file)!r} must hold 'key: value' lines.")
    return content


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file; an interruption leaves the one that was there before.

    Args:
        file: in a folder that exists.
        content: text is stored as UTF-8.
    """
    draft = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
