"""Method files, registry and YAML agree."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

from llava_todre.pruners import PRUNERS, create_pruner

CONFIGS = Path(__file__).parents[1] / "configs" / "methods"


def test_every_method_has_a_yaml_and_the_reverse() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(PRUNERS)


@pytest.mark.parametrize("name", PRUNERS)
def test_yaml_spells_out_every_default(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    knobs = yaml.safe_load(text)
    assert knobs.pop("method") == name
    knobs = {key: tuple(v) if isinstance(v, list) else v for key, v in knobs.items()}
    assert knobs == dataclasses.asdict(create_pruner(name))
    assert create_pruner(name, **knobs) == create_pruner(name)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_method_names_its_paper(name: str) -> None:
    papers = re.findall(r"\d{4}\.\d{5}", PRUNERS[name].about.paper)
    assert papers or PRUNERS[name].about.paper in ("control", "no pruning")


@pytest.mark.parametrize("name", PRUNERS)
def test_a_method_is_a_documented_frozen_dataclass(name: str) -> None:
    method = PRUNERS[name]
    assert inspect.getdoc(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        create_pruner(name).retain_ratio = 0.5  # type: ignore[misc]
