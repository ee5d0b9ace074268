"""Filled tables as text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eval.results.published import RowSpec
from llava_todre.errors import unknown

NAMES = {
    "mme": "MME",
    "mme_total": "MME P+C",
    "scienceqa": "ScienceQA",
    "gqa": "GQA",
    "pope": "POPE",
    "mmbench_en": "MMB-EN",
    "mmbench_cn": "MMB-CN",
    "vizwiz": "VizWiz",
    "vqav2": "VQAv2",
    "videomme": "VideoMME",
    "egoschema": "EgoSchema",
    "mlvu": "MLVU",
    "longvideobench": "LongVideoBench",
    "average": "Average",
    "time": "time",
    "paper_tflops": "TFLOPs (Eq. 1)",
    "tflops": "TFLOPs",
    "memory_gb": "memory (GB)",
    "samples_per_s": "samples/s",
}
LINES = {
    "ours": "ours",
    "interval": "95 % interval",
    "answers": "answers",
    "published": "published",
    "difference": "difference",
    "samples": "samples",
}
"""Fields of a cell, in the order in which they are shown, and their names."""


@dataclass(frozen=True)
class Table:
    """What the renderers draw; a cell may hold several lines."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    left: int = 1
    """Columns of text; the others hold numbers."""


@dataclass(frozen=True)
class Cell:
    """One number of ours, and what the papers say in its place; all as text."""

    ours: str = ""
    interval: str = ""
    published: str = ""
    difference: str = ""
    samples: str = ""
    answers: str = ""
    """How often an answer was given that the score must be read with."""


def name_of(column: str) -> str:
    return NAMES.get(column, column)


class Drawn(Protocol):
    """What can be drawn: a :class:`Sheet`, or an ``Efficiency`` of the bench."""

    @property
    def model(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[tuple[RowSpec, dict[str, Cell], list[str]]]: ...
    @property
    def used(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def notes(self) -> Sequence[str]: ...


def stacked(sheet: Drawn) -> Table:
    """Return a table of few columns, with what belongs to one number above each other."""
    body = []
    for row, cells, _ in sheet.rows:
        lines = [line for line in LINES if any(getattr(cell, line) for cell in cells.values())]
        columns = ["\n".join(getattr(cell, line) for line in lines) for cell in cells.values()]
        body.append([row.label, "\n".join(LINES[line] for line in lines), *columns])
    header = ["method", "", *map(name_of, sheet.columns)]
    return Table(sheet.title, header, body, list(sheet.notes), left=2)


def wide(found: Sequence[Drawn]) -> Table:
    """Return one table with a column for everything, for machines."""
    columns = list(dict.fromkeys(column for sheet in found for column in sheet.columns))
    header = ["model", "method", *(f"{column} {line}" for column in columns for line in LINES)]
    body = []
    for sheet in found:
        for row, cells, names in sheet.rows:
            given = [cells.get(column, Cell()) for column in columns]
            values = [getattr(cell, line) for cell in given for line in LINES]
            commits = {str(sheet.used[name].get("git_commit")) for name in names}
            body.append(
                [sheet.model, row.label, *values, " ".join(names), " ".join(sorted(commits))]
            )
    return Table("", [*header, "runs", "commits"], body)


def markdown_lines(table: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table: header, rule, rows.

    Args:
        table: header and rows.
        left: columns aligned to the left; the others hold numbers.
    """
    rule = ["---"] * left + ["---:"] * (len(table[0]) - left)
    return ["| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]]]


def aligned(table: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return a line per row, in columns; arguments as of :func:`markdown_lines`."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def as_markdown(table: Table) -> str:
    """Return the table in Markdown."""
    cells = [
        [cell.replace("|", "\\|").replace("\n", "<br>") for cell in row]
        for row in [table.header, *table.rows]
    ]
    notes = "\n".join(f"- {note}" for note in table.notes)
    lines = "\n".join(markdown_lines(cells, left=table.left))
    return f"**{table.title}**\n\n{lines}\n\n{notes}\n"


def as_text(table: Table) -> str:
    """Return the table with aligned columns."""
    lines = [line for row in [table.header, *table.rows] for line in _split(row)]
    header, *rows = aligned(lines, table.left)
    notes = [textwrap.fill(note, 100) for note in table.notes]
    return "\n".join([table.title, "", header, "-" * len(header), *rows, "", *notes, ""])


def as_latex(table: Table) -> str:
    """Return the table in LaTeX, with nothing but the base packages."""
    columns = "l" * table.left + "r" * (len(table.header) - table.left)
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\hline", _latex_row(table.header), "\\hline"]
    for row in table.rows:
        lines += map(_latex_row, _split(row))
    lines += ["\\hline", "\\end{tabular}"]
    notes = " ".join(map(_latex, table.notes))
    return "\n".join(
        [
            *("\\begin{table}", "\\centering\\footnotesize", f"\\caption{{{_latex(table.title)}}}"),
            *(*lines, f"\\par\\smallskip {notes}", "\\end{table}", ""),
        ]
    )


def as_csv(table: Table) -> str:
    """Return header and rows as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.rows])
    return stream.getvalue()


def _split(cells: Sequence[str]) -> list[list[str]]:
    """Return the lines of a row of cells."""
    parts = [cell.split("\n") for cell in cells]
    height = max(map(len, parts))
    return [[part[line] if line < len(part) else "" for part in parts] for line in range(height)]


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + " \\\\"


def _latex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {"|": "\\textbar{}", "<": "\\textless{}", ">": "\\textgreater{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


RENDERERS = {"text": as_text, "md": as_markdown, "latex": as_latex, "csv": as_csv}


def render(found: Sequence[Drawn], style: str) -> str:
    """Return the tables as text of a format: text, md, latex or csv."""
    if style not in RENDERERS:
        raise unknown("format", style, RENDERERS)
    if style == "csv":
        return as_csv(wide(found))
    return "\n".join(RENDERERS[style](stacked(sheet)) for sheet in found)
