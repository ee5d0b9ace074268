"""A finished demo, which several files read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.demo.run import run_demo


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and results of a demo on two images; copy the folder to change it."""
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(None, ["random", "todre"], [0.25], 2, out)
