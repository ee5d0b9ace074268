"""Figures: what is committed is current, legible and free of overlaps; wrong input is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from eval.__main__ import main
from eval.figures import kept, pareto, radar, sweeps
from eval.figures.files import KEY, as_json, digest, stored
from eval.figures.registry import FIGURES, drawn
from eval.figures.sources import Sources, middle, rounded
from eval.figures.style import COLUMN, LOOKS, PAGE, look_of
from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "figures"
FROM_RESULTS = [name for name, spec in FIGURES.items() if not spec.live]


@pytest.fixture(params=FIGURES, scope="module")
def figure(request: pytest.FixtureRequest) -> Any:
    return drawn(request.param, stored(request.param, COMMITTED))


@pytest.fixture(scope="module")
def texts(figure: Any) -> list[Text]:
    return texts_of(figure)


def texts_of(figure: Any) -> list[Text]:
    """Return every text that is drawn; ticks outside their axis, for one, are not."""
    seen = []
    draw = Text.draw

    def recorded(self: Text, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            seen.append(self)
        draw(self, *args, **kwargs)

    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the first time, the layout is still being found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", recorded)
        figure.draw_without_rendering()
    return list(dict.fromkeys(seen))


def require_apart(figure: Any, texts: list[Text]) -> None:
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0
        inside = inside and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} is cut"
    for index, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        for other, others in list(zip(texts, boxes, strict=True))[:index]:
            shared = type(box).intersection(box, others)
            apart = shared is None or min(shared.width, shared.height) < 2  # pixels of 1/200 inch
            assert apart, f"{text.get_text()!r} lies on {other.get_text()!r}"


# -------------------------------------------------------------------------- what is committed


@pytest.mark.parametrize("name", FIGURES)
def test_committed_pictures_were_drawn_from_the_committed_data(name: str) -> None:
    mark = digest((COMMITTED / "data" / f"{name}.json").read_text())
    assert Image.open(COMMITTED / f"{name}.png").info[KEY] == mark, "run `make figures`"


@pytest.mark.parametrize("name", FROM_RESULTS)
def test_committed_data_are_those_of_the_stored_results(name: str) -> None:
    data = json.loads(as_json(FIGURES[name].gather(Sources())))
    assert data == stored(name, COMMITTED), "run `make figures`"


def test_committed_files_are_small_and_listed() -> None:
    files = [f for f in COMMITTED.rglob("*") if f.is_file() and f.suffix != ".svg"]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert max(file.stat().st_size for file in files) < 300_000
    named = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "json")}
    assert {file.name for file in files} == named | {"README.md"}
    page = (COMMITTED / "README.md").read_text()
    assert all(f"({name}.png)" in page and f"data/{name}.json" in page for name in FIGURES)


# -------------------------------------------------------------------------- how it looks


def test_texts_lie_inside_the_figure_and_apart(figure: Any, texts: list[Text]) -> None:
    assert figure.get_figwidth() in (COLUMN, PAGE)
    assert len(texts) > 10
    require_apart(figure, texts)


@pytest.mark.parametrize("name", ["layers", "decoding", "framework"])
def test_so_they_do_for_a_decoder_of_32_layers(name: str) -> None:
    data = stored(name, COMMITTED)
    spread = [layer * 10 // 32 for layer in range(32)]
    if name == "layers":
        data["panels"] = {
            panel: {key: [found[k] for k in spread] for key, found in series.items()}
            for panel, series in data["panels"].items()
        }
        data["probe_layers"] = [16, 20, 24, 28]
    elif name == "decoding":
        data["tasks"] = {
            task: {kind: [found[k] for k in spread] for kind, found in kinds.items()}
            for task, kinds in data["tasks"].items()
        }
    else:
        data["visual_per_layer"] = [data["visual_per_layer"][k] for k in spread]
        data["shares"] = [data["shares"][k] for k in spread]
        data["probes"] = [{"layer": 28, "dropped": 36}]
    figure = drawn(name, data)
    require_apart(figure, texts_of(figure))


def test_no_text_lies_on_a_picture(figure: Any, texts: list[Text]) -> None:
    boxes = [image.get_window_extent() for axes in figure.axes for image in axes.images]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        for text in texts:
            shared = type(box).intersection(box, text.get_window_extent())
            apart = shared is None or min(shared.width, shared.height) < 1
            assert apart, f"{text.get_text()!r} lies on a picture"


def test_texts_are_large_enough_to_read_in_a_column(texts: list[Text]) -> None:
    assert min(text.get_fontsize() for text in texts) >= 5


def test_every_figure_says_what_it_was_made_from(texts: list[Text]) -> None:
    (note,) = [text.get_text() for text in texts if "not evidence about" in text.get_text()]
    assert "seed" in note or "commit" in note


def test_published_numbers_are_labelled_so() -> None:
    for name in FIGURES:
        data = stored(name, COMMITTED)
        assert ("published" in data) == ("published, not a result" in data["note"]), name


def test_every_method_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(PRUNERS)
    assert len({*LOOKS.values()}) == len(LOOKS)
    in_grey = {(LOOKS[method][1], line) for method, line in radar.LINES.items()}
    assert len(in_grey) == len(radar.LINES)
    looks = look_of(["todre", "uniform+vtw", "todre+vtw"])
    assert looks["todre"] == LOOKS["todre"] and len({*looks.values()}) == 3


# -------------------------------------------------------------------------- what is gathered


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(5.0, 1.0), (1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (1.0, 0.3), (4.0, 0.9)]
    assert pareto.front(points) == [(1.0, 0.5), (3.0, 0.9), (5.0, 1.0)]


def test_a_point_of_the_pareto_plot_is_a_row_of_the_results() -> None:
    results = Sources().demo()
    points = pareto.gather(Sources())["points"]
    assert len(points) == len(results["rows"])
    for point, row in zip(points, results["rows"], strict=True):
        assert point["time"] == pytest.approx(100 / row["first_token_speedup"]["median"])
        assert point["time_spread"][0] <= point["time"] <= point["time_spread"][1]
        assert point["interval"][0] <= point["accuracy"] <= point["interval"][1] + 1e-9


def test_no_interval_of_the_pareto_plot_is_cut() -> None:
    data = stored("pareto", COMMITTED)
    data["points"][1]["interval"] = [2.0, 108.0]
    low, high = drawn("pareto", data).axes[0].get_ylim()
    assert low < 2.0 and high > 108.0


def test_the_radar_shows_shares_of_the_unpruned_score() -> None:
    data = radar.gather(Sources())
    assert data["ratio"] == 0.10 and set(data["ours"]) == set(radar.LINES)
    # v2, Table 1: MME 1464.4 of 1519.6; v1: POPE 85.9 of 87.7
    assert data["published"]["todre"]["mme"] == pytest.approx(100 * 1464.4 / 1519.6)
    assert data["published"]["todre_v1"]["pope"] == pytest.approx(100 * 85.9 / 87.7)


def test_the_sweep_over_layers_has_our_runs_and_both_versions() -> None:
    data = sweeps.gather(Sources(), "6")
    ours = {point["at"]: point for point in data["ours"]}
    assert list(ours)[:5] == ["4/8", "5/8", "6/8", "7/8", "8/8"]
    assert ours["8/8"]["accuracy"] == 100 and ours["8/8"]["withdrawn"] == 0
    assert ours["4/8"]["interval"][0] < ours["4/8"]["accuracy"] < ours["4/8"]["interval"][1]
    assert {p["at"]: p["minutes"] for p in data["published"]["v2"]}["4/8"] == 64 + 19 / 60


def test_a_sweep_says_what_was_held_the_same_in_each_version() -> None:
    held = {"5": "ours and v2 7/8; v1 4/8, 5/8, 6/8, 7/8.", "6": "ours and v2 0.10; v1 0.03."}
    for table, text in held.items():
        assert sweeps.gather(Sources(), table)["note"].endswith(text)


def test_numbers_are_cut_to_what_can_be_seen() -> None:
    assert rounded({"a": [0.123456789, 1], "b": "x", "c": (1e-9,)}) == {
        "a": [0.12346, 1],
        "b": "x",
        "c": [1e-9],
    }
    assert middle([3.0, 1.0, 2.0]) == pytest.approx({"mean": 2.0, "p10": 1.2, "p90": 2.8})


# -------------------------------------------------------------------------- the command


def test_the_command_writes_three_files_and_redraws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same data give the same bytes."""
    assert main(["figure", "time", "--out", str(tmp_path)]) == 0
    made = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert set(made) == {"time.png", "time.svg", "time.json", "README.md"}
    assert capsys.readouterr().out.split() == [str(tmp_path / f"time.{k}") for k in ("png", "svg")]
    assert b"dc:date" not in made["time.svg"]
    gone = str(tmp_path / "nothing.json")
    assert main(["figure", "time", "--out", str(tmp_path), "--redraw", "--bench", gone]) == 0
    assert {f.name: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == made


def test_a_write_that_ends_early_leaves_the_whole_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(COMMITTED / "data" / "time.json", tmp_path / "data")
    before = Path(shutil.copy(COMMITTED / "time.png", tmp_path)).read_bytes()

    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    assert main(["figure", "time", "--out", str(tmp_path), "--redraw"]) == 130
    assert (tmp_path / "time.png").read_bytes() == before
    json.loads((tmp_path / "data" / "time.json").read_text())


def _wrong(tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    damaged, other = tmp_path / "damaged.json", tmp_path / "other.json"
    damaged.write_text("{")
    other.write_text("{}")
    empty, old = tmp_path / "empty.json", tmp_path / "old.json"
    empty.write_text('{"rows": [], "tasks": []}')
    results = Sources().demo()
    del results["rows"][0]["first_token_speedup"]
    old.write_text(json.dumps(results))
    yield ["radar", "--methods", str(empty)], "has no runs; expected: a list"
    yield ["pareto", "--methods", str(old)], "has no rows.0.first_token_speedup; expected: keys"
    yield ["paretto"], "figure 'paretto' is unknown. Did you mean 'pareto'? Allowed: all, decoding,"
    yield ["layers", "--samples", "0"], "samples 0 is out of range"
    yield ["pareto", "--methods", str(tmp_path / "no.json")], "no.json' cannot be read"
    yield ["radar", "--methods", str(damaged)], "is not JSON"
    yield ["time", "--bench", str(other)], "does not fit; allowed: a result of `eval bench`"
    yield ["time", "--bench", str(ROOT / "docs/results/table3/7b.json")], "holds no times"
    yield ["sweep_tau", "--runs", str(tmp_path / "none")], "is not a folder"
    yield ["time", "--redraw", "--out", str(tmp_path)], "is missing or damaged"
    yield ["time", "--out", str(other)], "cannot be written"


def test_wrong_input_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in _wrong(tmp_path):
        assert main(["figure", *arguments]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and message in said[0], (arguments, said)


def test_runs_without_a_sweep_are_refused(tmp_path: Path) -> None:
    (run,) = (ROOT / "docs/results/reproduce_mini").glob("mini-mini-vanilla-*.json")
    (tmp_path / run.name).write_text(run.read_text())
    with pytest.raises(TodreError, match="hold no sweep of table 5"):
        sweeps.gather(Sources(runs=tmp_path), "5")


def test_without_matplotlib_one_line_says_so_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(kept, "gather", lambda sources: pytest.fail("a model was run"))
    assert main(["figure", "kept"]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_the_script_draws_all_or_the_named(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\nprintf '%s|' \"$@\"\n")
    stub.chmod(0o755)
    for variables, arguments, expected in (
        ({}, [], "all|--out|docs/figures|"),
        ({"NAMES": "kept time", "OUT": "a b"}, ["--redraw"], "kept|time|--out|a b|--redraw|"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "figures.sh"), *arguments],
            env={"PATH": os.environ["PATH"], "PYTHON": str(stub), **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"-m|eval|figure|{expected}"


def test_results_of_another_demo_can_be_drawn(tmp_path: Path) -> None:
    results = json.loads((ROOT / "docs/results/demo_mini.json").read_text())
    results["rows"][-1]["method"] = "uniform+vtw"  # of no paper, and at a ratio between the others
    results["rows"][-1]["retain_ratio"] = 0.2
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    for name in ("pareto", "radar"):
        figure = drawn(name, FIGURES[name].gather(Sources(methods=file)))
        assert len(figure.axes) == 2
