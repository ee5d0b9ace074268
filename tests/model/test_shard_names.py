"""An index of shards cannot make any loader open a file outside the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_todre import TodreError, load_pretrained_model
from llava_todre.hf.load import load_stock_model
from llava_todre.model.clip_text import ClipText

LOADERS = [load_pretrained_model, load_stock_model, ClipText.from_pretrained]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.bin", "", 3])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_shard_is_a_file_of_its_folder(
    load: Callable[[str], Any], name: Any, kind: str, tmp_path: Path
) -> None:
    index = tmp_path / f"{kind}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "whole.safetensors", "b": name}}))
    with pytest.raises(TodreError) as raised:
        load(str(tmp_path))
    assert f"{index} names {name!r}; a shard must be a file of its folder." in str(raised.value)
