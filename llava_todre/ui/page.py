"""The page itself, in gradio: inputs, outputs, and what connects them.

Nothing on it comes from another server, and nothing about its visitors goes to one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

from llava_todre.catalogue import COMBINATION
from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.ui import summary
from llava_todre.ui.drawing import preview
from llava_todre.ui.handler import RESULTS, SIDES, Settings, part, reason, visit
from llava_todre.ui.session import Studio, has_budget
from llava_todre.ui.uploads import read_upload

_START = (("vanilla", 1.0), ("todre", 0.1))
_FRAMES, _MOST_FRAMES = 8, 32
_TOKENS, _MOST_TOKENS = 64, 512
_KEEP_UPLOADS_S = 3600
_INTRO = """# Two methods, one question
Ask about an image or a short video, and compare what each method keeps, what it costs, and its
answer. Dropped tokens are dimmed; yellow frames are kept tokens of the thumbnail, which cover the
whole image coarsely.

Model: **{name}**. {note}"""
CSS = """
table.facts, table.facts tr, table.facts th, table.facts td { border: 0; }
table.facts { width: 100%; font-size: 0.9rem; border-collapse: collapse; }
table.facts th, table.facts td { padding: 3px 6px; border-bottom: 1px solid #8886; }
table.facts th { text-align: left; font-weight: 500; }
table.facts td { text-align: right; }
table.facts caption { caption-side: bottom; text-align: left; padding: 6px; opacity: 0.8; }
.problem { border-left: 4px solid #d55e00; padding: 6px 10px; }
.progress { padding: 6px 10px; }
svg.ratios { max-width: 460px; }
#status { min-height: 2.6rem; }
"""


def build_page(gr: Any, studio: Studio, name: str, note: str = "") -> Any:
    """Return the page as gradio's Blocks.

    Args:
        gr: gradio.
        studio: answers.
        name: how the page calls the model.
        note: what a visitor should know about it.
    """
    with gr.Blocks(
        title="llava_todre",
        analytics_enabled=False,
        delete_cache=(_KEEP_UPLOADS_S // 4, _KEEP_UPLOADS_S),
    ) as blocks:
        gr.Markdown(_INTRO.format(name=name, note=note))
        page = _Page(gr, studio)
        page.connect()
    return blocks


class _Page:
    """The parts of the page by name, and their events."""

    def __init__(self, gr: Any, studio: Studio) -> None:
        """Place all parts, from top to bottom."""
        self.gr, self.studio = gr, studio
        self.examples = _examples()
        label = next(iter(self.examples), None)
        path, question = self.examples.get(label or "", (None, ""))
        self.chosen, self.stopper = gr.State(path), gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                self._place_input(label, path)
            with gr.Column(min_width=280):
                self._place_question(question)
        self.status = gr.HTML(elem_id="status")
        self.parts = {"status": self.status}
        with gr.Row():
            for side in SIDES:
                self.parts |= _results(gr, side)

    def _place_input(self, label: str | None, path: str | None) -> None:
        gr = self.gr
        self.file = gr.File(
            label="Upload an image or a short video",
            file_types=["image", "video"],
            elem_id="file",
            height=130,
        )
        self.example = gr.Radio(
            list(self.examples), value=label, label="Or pick an example", visible=label is not None
        )
        self.shown = gr.Image(
            preview(read_upload(path, 1)) if path else None,
            label="Input of the model",
            show_label=False,  # it would cover the image
            alt_text="the image, or the frames of the video, that was chosen",
            elem_id="shown",
            interactive=False,
            height=270,
            buttons=[],
        )

    def _place_question(self, question: str) -> None:
        gr, methods = self.gr, self.studio.methods()
        self.text = gr.Textbox(question, label="Question", lines=2, max_lines=6, elem_id="question")
        self.choices = [
            _choice(gr, methods, side, *start) for side, start in zip(SIDES, _START, strict=True)
        ]
        with gr.Accordion("More settings", open=False):
            self.most = gr.Slider(
                1, _MOST_TOKENS, _TOKENS, step=1, label="Longest answer, in tokens"
            )
            self.frames = gr.Slider(
                1, _MOST_FRAMES, _FRAMES, step=1, label="Frames taken of a video"
            )
            self.every = gr.Checkbox(
                True, label="Measure the attention of every layer (a pass of its own)"
            )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")

    def connect(self) -> None:
        """Connect the events."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        seen = [self.chosen, self.shown, self.example, self.status, self.file]
        for uploaded in (self.file.upload, self.file.clear):
            uploaded(self._show, [self.file, self.frames], seen, **quiet)
        for method, share in self.choices:
            method.change(self._budget, method, share, queue=False, **quiet)
        seen = [self.chosen, self.shown, self.text, self.status, self.file]
        self.example.input(self._pick, self.example, seen, **quiet)
        outputs = [*self.parts.values(), self.ask, self.stop]
        asked = self.gr.on(
            [self.ask.click, self.text.submit],
            *(self._begin, self.stopper, [self.stopper, *outputs]),
            queue=False,
            **quiet,
        )
        inputs = [self.stopper, self.chosen, self.text, self.most, self.frames, self.every]
        inputs += [each for choice in self.choices for each in choice]
        # One model, one question at a time.
        asked.then(self._run, inputs, outputs, concurrency_limit=1, **quiet)
        self.stop.click(self._end, self.stopper, self.stop, queue=False, **quiet)

    def _show(self, sent: str | None, num_frames: int) -> dict[Any, Any]:
        """Show what was uploaded."""
        if sent is None:
            return {self.chosen: None, self.shown: None, self.status: ""}
        update: dict[Any, Any] = {self.chosen: sent, self.example: None, self.status: ""}
        try:
            return update | {self.shown: preview(read_upload(sent, int(num_frames)))}
        except Exception as error:
            problem = summary.alert(reason(error))
            nothing = dict.fromkeys((self.chosen, self.shown, self.file))
            return update | nothing | {self.status: problem}

    def _pick(self, label: str) -> dict[Any, Any]:
        """Show an example."""
        path, question = self.examples[label]
        picture = preview(read_upload(path, 1))
        update = {self.chosen: path, self.shown: picture, self.text: question}
        return update | {self.status: "", self.file: None}

    def _budget(self, method: str | None) -> Any:
        return self.gr.update(interactive=has_budget(method or ""))

    def _begin(self, earlier: Event | None) -> dict[Any, Any]:
        """Clear the page for a question."""
        if earlier is not None:
            earlier.set()  # a second click: the later question counts
        return {
            **dict.fromkeys(self.parts.values()),
            self.status: summary.progress("Waiting for other questions."),
            self.stopper: Event(),
            self.ask: self.gr.update(interactive=False),
            self.stop: self.gr.update(interactive=True),
        }

    def _run(self, event: Event, *given: Any) -> Iterator[dict[Any, Any]]:
        """Show the answers as they come."""
        sent, words, longest, num_frames, measured, *pairs = given
        names = [method or "" for method in pairs[::2]]
        wanted = list(zip(names, pairs[1::2], strict=True))
        settings = Settings(sent, words, int(longest), int(num_frames), bool(measured), wanted)
        for update in visit(self.studio, settings, event):
            yield {self.parts[key]: value for key, value in update.items()}
        done, off = self.gr.update(interactive=True), self.gr.update(interactive=False)
        yield {self.ask: done, self.stop: off}

    def _end(self, event: Event | None) -> Any:
        if event is not None:
            event.set()
        return self.gr.update(interactive=False)


def _choice(gr: Any, methods: list[str], side: str, method: str, ratio: float) -> tuple[Any, Any]:
    """Place method and share of tokens of one side."""
    with gr.Row():
        name = gr.Dropdown(
            methods,
            value=method,
            label=f"{side}: method",
            info=COMBINATION,
            allow_custom_value=True,  # for A+B
            min_width=140,
            elem_id=part(side, "method"),
        )
        share = gr.Slider(
            0.01,
            1.0,
            ratio,
            step=0.01,
            label=f"{side}: share kept",
            interactive=has_budget(method),
            min_width=160,
            elem_id=part(side, "ratio"),
        )
    return name, share


def _results(gr: Any, side: str) -> dict[str, Any]:
    """Place the results of one side; returns them by id."""
    with gr.Column(min_width=280):
        gr.Markdown(f"## {side}")
        answer = gr.Textbox(
            label=f"{side}: answer", lines=2, interactive=False, elem_id=part(side, "answer")
        )
        kept = gr.Image(
            label=f"{side}: tokens kept",
            show_label=False,
            alt_text=f"the visual tokens kept on the {side.lower()}; dropped ones are dimmed",
            interactive=False,
            elem_id=part(side, "kept"),
            buttons=["fullscreen"],
        )
        rest = [gr.HTML(elem_id=part(side, name)) for name in RESULTS[2:]]
    return {
        part(side, name): each for name, each in zip(RESULTS, [answer, kept, *rest], strict=True)
    }


def _examples() -> dict[str, tuple[str, str]]:
    """Return file and a question by label; none without a checkout."""
    try:
        folder = bundled_checkpoint() / "examples"
    except TodreError:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for entry in json.loads((folder / "examples.json").read_text()):
        label = f"Scene {Path(entry['image']).stem.rpartition('_')[2]}"
        if entry["task"] == "read" or label not in found:
            found[label] = str(folder / entry["image"]), entry["question"]
    return found
