"""Write docs/licences.md: the licence of each installed package, and the libraries it bundles.

python -m eval.pages.licences
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from typing import Any

from eval import ROOT
from eval.tables.render import markdown_lines

PAGE = ROOT / "docs" / "licences.md"
_NOT_LISTED = ("llava-todre", "pip")
# Packages without licence metadata: what their LICENSE files say.
_FROM_FILES = {"sentencepiece": "Apache-2.0"}
_HEAD = """# Licences of what is installed

What `make setup` installs on Linux with a CPU build of torch, by the packages' own metadata;
written by `make docs`. None of it is part of this repository, whose own code is
[Apache-2.0](../LICENSE). CUDA builds of torch add NVIDIA's packages, under NVIDIA's terms. Real
checkpoints have their own licences.

Copyleft libraries in the wheels: PyAV (`av`) and OpenCV contain FFmpeg (LGPL); PyAV's is built
with x264 and x265, which are GPL, so redistributing that wheel is subject to the GPL. PyAV is
needed for video only. OpenCV's FFmpeg comes with OpenSSL 1.1.1, which is past its end of life;
lmms-eval imports OpenCV for VideoMME, and nothing here opens a network stream with it.

"""


def licence(metadata: Any) -> str:
    """Return the licence that a package states."""
    given = metadata.get_all("License-Expression") or metadata.get_all("License") or ["UNKNOWN"]
    stated = given[0]
    if stated != "UNKNOWN" and len(stated) <= 120 and "\n" not in stated:
        return stated
    classifiers = metadata.get_all("Classifier") or []
    found = [each.split(" :: ")[-1] for each in classifiers if each.startswith("License ::")]
    return ", ".join(found) or _FROM_FILES.get(metadata["Name"], "not stated")


def packages() -> dict[str, Distribution]:
    """Return the installed packages by name; the first on the path where there are several."""
    found: dict[str, Distribution] = {}
    for each in distributions():
        found.setdefault(each.metadata["Name"], each)
    ordered = sorted(found, key=str.lower)
    return {name: found[name] for name in ordered if name not in _NOT_LISTED}


def bundled(package: Distribution) -> list[str]:
    """Return the libraries in the folder ``*.libs`` of a wheel."""
    files = [file for file in package.files or () if file.parent.name.endswith(".libs")]
    return sorted({file.name.removeprefix("lib").split(".so")[0].split("-")[0] for file in files})


def render() -> str:
    """Return the page."""
    return _HEAD + "\n".join(markdown_lines(list(_rows()), left=3)) + "\n"


def _rows() -> Iterator[list[str]]:
    yield ["package", "licence", "libraries in its wheel"]
    for name, package in packages().items():
        yield [name, licence(package.metadata), ", ".join(bundled(package))]


if __name__ == "__main__":
    PAGE.write_text(render())
