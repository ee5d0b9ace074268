"""The pages of the project: their code is found and carried out, their links are followed.

What happens to a block depends on its language, and no language is passed over:

    python   runs; the blocks of a page share their names
    bash     each command runs or is checked, see :mod:`shell_lines`
    text     is what the block before it prints
    yaml     is a run or sweep that can be planned, or a method that can be made
    bibtex   is what CITATION.cff says
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shell_lines
import yaml
from PIL import Image

from eval.run.sweeps import plan
from llava_todre import load_pretrained_model
from llava_todre.model.export_hf import save_as_hf
from llava_todre.pruners import create_pruner

ROOT = Path(__file__).parents[1]
MINI = ROOT / "checkpoints" / "mini"
SCENE = MINI / "examples" / "scene_0.png"
_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_CLOSE = 0.05
"""By what share a number with a fraction may differ from the one on the page."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        """Where it stands."""
        return f"{self.page.relative_to(ROOT)}:{self.line} ({self.language or 'no language'})"


def pages() -> list[Path]:
    """Return all pages that are meant to be read on their own."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted([*found, *(ROOT / "checkpoints").rglob("*.md")])


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page, of some languages or of all."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        block = Block(page, text[: match.start()].count("\n") + 1, match[2].strip(), match[3])
        if not languages or block.language in languages:
            found.append(block)
    return found


# ------------------------------------------------------------------------------ carrying out


@dataclass
class Outcome:
    """What came of a page."""

    names: dict[str, Any] = field(default_factory=dict)
    """What its Python left behind."""
    said: list[str] = field(default_factory=list)
    """What each block printed."""


def checkout(folder: Path) -> Path:
    """Fill a folder with links to all of this checkout but what runs write; returns it."""
    for item in ROOT.iterdir():
        if item.name not in ("outputs", "runs") and not item.name.startswith("."):
            (folder / item.name).symlink_to(item)
    return folder


def carry_out(page: Path, folder: Path) -> Outcome:
    """Carry out all blocks of a page in order.

    Args:
        page: the page.
        folder: a new checkout, and the working directory.
    """
    outcome = Outcome()
    for block in blocks(page):
        try:
            outcome.said.append(_one(block, folder, outcome))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {error!r}") from error
    return outcome


def _one(block: Block, folder: Path, outcome: Outcome) -> str:
    """Carry out a block; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        match block.language:
            case "python":
                code = compile("\n" * block.line + block.code, str(block.page), "exec")
                if "inputs" in code.co_names and "inputs" not in outcome.names:
                    outcome.names |= stock_model(folder)
                exec(code, outcome.names)
            case "bash":
                shell_lines.carry_out(block.code)
            case "text":
                assert outcome.said, "nothing was printed before"
                assert_same_output(outcome.said[-1], block.code)
            case "yaml":
                _check_yaml(block.code, folder)
            case "none":
                pass  # a picture made of words
            case "bibtex":
                _check_citation(block.code)
            case _:
                raise AssertionError("nothing says what to do with this language")
    return printed.getvalue()


def stock_model(folder: Path) -> dict[str, Any]:
    """Return what a reader of a block with ``inputs`` has: a stock model and a question to it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    converted = folder / "converted"
    tokenizer, ours, _, _ = load_pretrained_model(MINI)
    save_as_hf(ours, tokenizer, converted, "vicuna_v1")
    processor = AutoProcessor.from_pretrained(converted)
    model = AutoModelForImageTextToText.from_pretrained(converted).eval()
    image = Image.open(SCENE).convert("RGB")
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "What does the sign say?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return {"model": model, "inputs": inputs}


def assert_same_output(printed: str, shown: str) -> None:
    """Hold the output on a page to what is printed now.

    Whole numbers and words are the same; fractions may differ a little, and times at will.
    """
    now, then = ([*filter(None, map(str.rstrip, text.splitlines()))] for text in (printed, shown))
    assert len(now) == len(then), f"the page shows {len(then)} lines, printed were:\n{printed}"
    for one, other in zip(now, then, strict=True):
        assert _NUMBER.sub("#", one).split() == _NUMBER.sub("#", other).split(), (one, other)
        for number, page in zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True):
            if "." not in page:
                assert number == page, (one, other)
            elif "(ms)" not in other:
                assert abs(float(number) - float(page)) <= _CLOSE * float(page), (one, other)


def _check_yaml(code: str, folder: Path) -> None:
    content = yaml.safe_load(code)
    if set(content) & {"suite", "base"}:
        file = folder / "config_on_the_page.yaml"
        file.write_text(code)
        assert plan([file], [])
    else:
        create_pruner(content.pop("method"), **content)


def _check_citation(code: str) -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    fields = dict(re.findall(r"(\w+)\s*=\s*\{([^}]*)\}", code))
    authors = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert fields.pop("author").split(" and ") == authors
    assert fields == {key: str(paper[key]) for key in fields}


# ------------------------------------------------------------------------------ prose


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Return the code between single backticks."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(text: str) -> list[str]:
    """Return where the links of a text lead, without those to the web."""
    found = _LINK.findall(re.sub(r"`[^`]*`", "", text))
    return [link for link in found if not re.match(r"(https?|mailto):", link)]


def anchors(page: Path) -> set[str]:
    """Return the names under which a page's headings can be reached, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        slug = "".join(_slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()))
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def _slug(heading: str) -> Iterator[str]:
    for letter in heading:
        if letter in "-_" or unicodedata.category(letter)[0] in "LN":
            yield letter
        elif letter == " ":
            yield "-"


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of a text on a page that lead nowhere."""
    broken = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    return broken
