"""Run the notebooks in a real kernel; ``python tests/notebooks.py`` stores what they show.

Stored are standard output and pictures, as JPEG; neither times nor warnings, which differ from
machine to machine.
"""

from __future__ import annotations

import base64
import copy
import io
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_FORGET = "%reset -f"
_LONGEST_CELL = 120
"""Seconds."""
_SHADES = 3.0
"""How far pixels may be apart on average, of 255: fonts and JPEG differ between versions."""


def started() -> KernelManager:
    """Return a running kernel that leaves the other cores to other tests."""
    kernel = KernelManager()
    kernel.start_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    return kernel


def read(file: Path) -> Any:
    """Return a notebook as it is stored."""
    return nbformat.read(file, as_version=4)


def executed(file: Path, kernel: KernelManager) -> Any:
    """Return a notebook with the outputs of today, from a kernel that has forgotten all others."""
    notebook = copy.deepcopy(read(file))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_FORGET))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=_LONGEST_CELL,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
    )
    client.execute(reset_kc=False, cleanup_kc=False)
    del notebook.cells[0]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.outputs = _kept(cell.outputs)
        cell.execution_count, cell.metadata = number, {}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _kept(outputs: list[Any]) -> list[Any]:
    """Return what a reader wants to see of a cell's outputs."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            elif output.name == "stdout":
                kept.append(output)
            continue
        data = {"image/jpeg", "text/plain"} & set(output.data)
        shown = {kind: output.data[kind] for kind in sorted(data)}
        kept.append(nbformat.v4.new_output("display_data", data=shown))
    return kept


def text_of(cell: Any) -> str:
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell: Any) -> list[np.ndarray]:
    """Return the (H, W, 3) pictures a cell shows."""
    found = [output.data.get("image/jpeg") for output in cell.outputs if "data" in output]
    files = [io.BytesIO(base64.b64decode(each)) for each in found if each]
    return [np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files]


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two pictures are the same to the eye."""
    return one.shape == other.shape and bool(np.abs(one - other).mean() < _SHADES)


def prose_of(notebook: Any) -> str:
    """Return the text of a notebook."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def names_machine(notebook: Any) -> bool:
    """Return whether a path of one machine is stored."""
    text = nbformat.writes(notebook)
    return re.search(r"site-packages|(?<![\w.])/(home|root|tmp|Users|work)/", text) is not None


def main() -> None:
    """Run all notebooks and store them."""
    kernel = started()
    try:
        for file in NOTEBOOKS:
            nbformat.write(executed(file, kernel), file)
    finally:
        kernel.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
