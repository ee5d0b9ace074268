"""The search for VTW's layer, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.__main__ import main

EXAMPLES = Path(__file__).parents[1] / "checkpoints" / "mini" / "examples"


def test_bundled_scenes_and_own_questions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["vtw-layer", "--num-samples", "2", "--first", "8", "--eta", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    tried = {int(layer): value for layer, value in found["divergence"].items()}
    assert found["samples"] == 2 and found["num_layers"] == 10
    assert list(tried) == list(range(8, min(found["layer"], 9) + 1))
    assert found["layer"] == next((k for k, value in tried.items() if value <= 0.5), 10)

    rows = [{"image": str(EXAMPLES / "scene_0.png"), "question": "What does the sign say?"}]
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["vtw-layer", "--samples", str(file), "--first", "9", "--eta", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layer"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "0"], "num_samples 0"),
        (["--samples", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read"),
        (["--samples", "bad"], "keys image and question"),
        (["--samples", "empty"], "holds no questions"),
        (["--num-samples", "1", "--eta", "-1"], "eta must be a number, eta >= 0, got -1.0"),
        (
            ["--num-samples", "1", "--first", "10"],
            "first must be a whole number, 1 <= first <= 9, got 10",
        ),
    ],
)
def test_mistakes_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad").write_text('{"image": "x.png"}')
    (tmp_path / "empty").write_text("")
    known = [str(tmp_path / word) if word in ("bad", "empty") else word for word in options]
    assert main(["vtw-layer", *known]) == 1
    assert message in capsys.readouterr().err
