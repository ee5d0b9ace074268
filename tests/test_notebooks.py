"""The notebooks run as users run them, and show what they show today."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import notebooks
import pages
import pytest
from jupyter_client.manager import KernelManager


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """A real kernel; each notebook starts with an empty namespace in it."""
    manager = notebooks.started()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_its_stored_outputs_are_current(
    file: Path, kernel: KernelManager
) -> None:
    stored, now = notebooks.read(file), notebooks.executed(file, kernel)
    for before, after in zip(stored.cells, now.cells, strict=True):
        if before.cell_type != "code":
            continue
        pages.assert_same_output(notebooks.text_of(after), notebooks.text_of(before))
        shown = notebooks.pictures_of(before), notebooks.pictures_of(after)
        assert len(shown[0]) == len(shown[1]), f"{before.id}: run `python tests/notebooks.py`"
        assert all(map(notebooks.alike, *shown)), f"{before.id}: run `python tests/notebooks.py`"


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_stored_is_small_and_of_no_machine(file: Path) -> None:
    notebook = notebooks.read(file)
    assert file.stat().st_size < 200_000
    assert not notebooks.names_machine(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert sum(bool(cell.outputs) for cell in code) >= 2, "a reader sees something"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data"}, "no errors"


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_links_in_a_notebook_lead_somewhere(file: Path) -> None:
    assert pages.broken_links(file, notebooks.prose_of(notebooks.read(file))) == []
