"""The page itself, in gradio: what a visitor can set, and where everything appears.

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
from llava_todre.ui import summary as facts
from llava_todre.ui.drawing import preview
from llava_todre.ui.handler import RESULTS, SIDES, Settings, part, reason, visit
from llava_todre.ui.session import Studio, has_budget
from llava_todre.ui.uploads import read_upload

_START = (("vanilla", 1.0), ("todre", 0.1))
_FRAMES, _MOST_FRAMES = 8, 32
_TOKENS, _MOST_TOKENS = 64, 512
_KEEP_UPLOADS_S = 3600
_INTRO = """# Two methods, one question
Ask about a picture or a short video, and see what each method keeps of it, what it costs, and what
is answered. In the pictures dropped tokens are dimmed; yellow frames are kept tokens of the
thumbnail, which see the whole picture coarsely.

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
    examples = _examples()
    first = next(iter(examples), None)
    path, question = examples.get(first or "", (None, ""))
    with gr.Blocks(
        title="llava_todre",
        analytics_enabled=False,
        delete_cache=(_KEEP_UPLOADS_S // 4, _KEEP_UPLOADS_S),
    ) as page:
        gr.Markdown(_INTRO.format(name=name, note=note))
        chosen, stopper = gr.State(path), gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                file = gr.File(
                    label="Upload an image or a short video",
                    file_types=["image", "video"],
                    elem_id="file",
                    height=130,
                )
                example = gr.Radio(
                    list(examples), value=first, label="Or pick an example", visible=bool(examples)
                )
                shown = gr.Image(
                    preview(read_upload(path, 1)) if path else None,
                    label="What the model is shown",
                    show_label=False,  # it would lie on the picture
                    alt_text="the picture, or the frames of the video, that was chosen",
                    elem_id="shown",
                    interactive=False,
                    height=270,
                    buttons=[],
                )
            with gr.Column(min_width=280):
                text = gr.Textbox(
                    question, label="Question", lines=2, max_lines=6, elem_id="question"
                )
                wanted, methods = [], studio.methods()
                for side, start in zip(SIDES, _START, strict=True):
                    wanted += _choice(gr, methods, side, *start)
                with gr.Accordion("More settings", open=False):
                    most = gr.Slider(
                        1, _MOST_TOKENS, _TOKENS, step=1, label="Longest answer, in tokens"
                    )
                    frames = gr.Slider(
                        1, _MOST_FRAMES, _FRAMES, step=1, label="Frames taken of a video"
                    )
                    every = gr.Checkbox(
                        True, label="Measure the attention of every layer (a pass of its own)"
                    )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        status = gr.HTML(elem_id="status")
        with gr.Row():
            parts = {"status": status}
            for side in SIDES:
                parts |= _results(gr, side)

        def look(sent: str | None, num_frames: int) -> dict[Any, Any]:
            if sent is None:
                return {chosen: None, shown: None, status: ""}
            try:
                picture = preview(read_upload(sent, int(num_frames)))
            except Exception as error:
                problem = facts.alert(reason(error))
                return {chosen: None, shown: None, example: None, status: problem, file: None}
            return {chosen: sent, shown: picture, example: None, status: ""}

        def pick(label: str) -> dict[Any, Any]:
            place, suggested = examples[label]
            picture = preview(read_upload(place, 1))
            return {chosen: place, shown: picture, text: suggested, status: "", file: None}

        def budget(method: str | None) -> Any:
            return gr.update(interactive=has_budget(method or ""))

        def begin(earlier: Event | None) -> dict[Any, Any]:
            if earlier is not None:
                earlier.set()  # asked twice at once: the later one counts
            return {
                **dict.fromkeys(parts.values()),
                status: facts.progress("Waits for its turn."),
                stopper: Event(),
                ask: gr.update(interactive=False),
                stop: gr.update(interactive=True),
            }

        def run(event: Event, *given: Any) -> Iterator[dict[Any, Any]]:
            sent, words, longest, num_frames, measured, *pairs = given
            names = [method or "" for method in pairs[::2]]
            chosen_methods = list(zip(names, pairs[1::2], strict=True))
            settings = Settings(
                sent, words, int(longest), int(num_frames), bool(measured), chosen_methods
            )
            for news in visit(studio, settings, event):
                yield {parts[key]: value for key, value in news.items()}
            yield {ask: gr.update(interactive=True), stop: gr.update(interactive=False)}

        def end(event: Event | None) -> Any:
            if event is not None:
                event.set()
            return gr.update(interactive=False)

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for uploaded in (file.upload, file.clear):
            uploaded(look, [file, frames], [chosen, shown, example, status, file], **quiet)
        for method, share in zip(wanted[::2], wanted[1::2], strict=True):
            method.change(budget, method, share, queue=False, **quiet)
        example.input(pick, example, [chosen, shown, text, status, file], **quiet)
        outputs = [*parts.values(), ask, stop]
        asked = gr.on(
            [ask.click, text.submit], begin, stopper, [stopper, *outputs], queue=False, **quiet
        )
        inputs = [stopper, chosen, text, most, frames, every, *wanted]
        asked.then(run, inputs, outputs, concurrency_limit=1, **quiet)  # one model, one question
        stop.click(end, stopper, stop, queue=False, **quiet)
    return page


def _choice(gr: Any, methods: list[str], side: str, method: str, ratio: float) -> list[Any]:
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
    return [name, share]


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
