"""The ``todre`` command: ``todre generate``, ``convert``, ``ui``, ``demo`` and ``list``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from llava_todre.command import run_command
from llava_todre.errors import TodreError
from llava_todre.files import configs, parse_yaml, read_mapping
from llava_todre.load_options import LoadOptions
from llava_todre.version import __version__

# Commands import what they use when they run, so that `todre --help` does not wait for torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 fine, 1 bad input or failure, 2 bad usage)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("todre", lambda: _run(given), "--debug" in given)


def _run(arguments: list[str]) -> int:
    parsed = _parser().parse_args(arguments)
    options = parsed[parsed.command]
    for key, value in vars(options).items():
        if value == "" and key != "question":  # "" would be the working folder
            raise TodreError(f"{key} must have a value or be left out, got ''.")
    _COMMANDS[parsed.command](options)
    return 0


class _Parser(ArgumentParser):
    """A parser with ``--debug`` and errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Add ``--debug``."""
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a file for ``--config``; a pipe or a repeated key is an error."""
        read_mapping(Path(str(cfg_path)), "config")
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line and exit with 2."""
        del ex
        print(
            f"todre: error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr
        )
        self.exit(2)


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="todre",
        description="Visual-token pruning for LLaVA (ToDRE, arXiv 2505.18757).",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    commands.add_subcommand("generate", _generate_parser(), help="answer a question about images")
    commands.add_subcommand("convert", _convert_parser(), help="save in the layout of llava-hf")
    commands.add_subcommand("ui", _ui_parser(), help="open a web page for questions")
    commands.add_subcommand("demo", _demo_parser(), help="compare methods on the bundled model")
    listing = _Parser()
    listing.add_argument("method", nargs="?", help="print its options as a method file")
    commands.add_subcommand("list", listing, help="list the pruning methods, or options of one")
    return parser


def _generate_parser() -> ArgumentParser:
    parser = _Parser(description="Answer a question about one or more images.")
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", required=True, help="checkpoint: a folder or a hub id, original or llava-hf")
    _add_loading(parser)
    images = "image files or data URIs, in order; with --video also one video file"
    add("--image", nargs="+", required=True, metavar="FILE", help=images)
    add("--allow-urls", action="store_true", help="fetch images given as http(s) URLs")
    add("--video", action="store_true", help="the images are the frames of one video")
    add("--max-frames", type=int, default=5, help="frames taken of a video file, evenly spaced")
    add("--fps", type=float | None, help="frames per second of a video given as images")
    add("--question", required=True, help="may contain <image> where each image goes")
    add("--method", default="todre", help="a name from `todre list`, or a YAML file of configs/")
    add("--retain-ratio", type=float | None, help="share of visual tokens kept, in (0, 1]")
    add("--retain-tokens", type=int | None, help="number kept per image, instead of the ratio")
    add("--option", nargs="+", default=[], metavar="KEY=VALUE", help="other options of the method")
    add("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    add("--picture", type=str | None, metavar="PNG", help="draw the kept tokens here")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _loading_fields() -> list[Field[Any]]:
    """Return the options of loading that a command line can give."""
    return [each for each in fields(LoadOptions) if each.metadata["typed"]]


def _add_loading(parser: ArgumentParser) -> None:
    for each in _loading_fields():
        name, text = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        text += " (our class only)" if each.metadata["own"] else ""
        if each.default is False:
            parser.add_argument(name, action="store_true", help=text)
        else:
            kind = str if each.default else str | None
            parser.add_argument(name, type=kind, default=each.default, help=text)


def _loading(options: Namespace) -> dict[str, Any]:
    return {each.name: options[each.name] for each in _loading_fields()}


def _convert_parser() -> ArgumentParser:
    parser = _Parser(description="Save a checkpoint in the layout that transformers' classes read.")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint: a folder or a hub id, original or llava-hf")
    add("--revision", type=str | None, help="revision of a hub id")
    add("--out", required=True, help="a new or empty folder")
    add("--template", default="auto", help="conversation template, for the processor")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    return parser


def _ui_parser() -> ArgumentParser:
    parser = _Parser(description="Open a web page: one question, two methods side by side.")
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", type=str | None, help="checkpoint (default: the bundled one)")
    _add_loading(parser)
    add("--host", default="127.0.0.1", help="the address to listen on")
    add("--port", type=int, default=7860, help="TCP port")
    return parser


def _demo_parser() -> ArgumentParser:
    parser = _Parser(description="Compare methods on the bundled model; CPU, a minute or two.")
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", type=str | None, help="checkpoint (default: the bundled one)")
    methods = "names from `todre list`, A+B combinations, or all"
    add("--methods", nargs="+", default=["random", "todre_v1", "todre"], help=methods)
    add("--ratios", nargs="+", type=float, default=[0.25, 0.10], help="shares of tokens kept")
    pictures = "held-out images, nine questions each; stored results have 96"
    add("--num-images", type=int, default=12, help=pictures)
    add("--out", default="outputs/demo", help="folder for results, table and drawings")
    add("--fresh", action="store_true", help="forget finished runs in that folder")
    add("--ui", action="store_true", help="deprecated: todre ui")
    add("--host", default="127.0.0.1", help="of the page: the address to listen on")
    add("--port", type=int, default=7860, help="of the page")
    add("--backend", default="auto", help="of the page: llava, transformers, or auto: by model")
    add("--template", default="auto", help="of the page: conversation template, of our class")
    return parser


def method_options(options: Namespace) -> tuple[str, dict[str, Any]]:
    """Return name and options of the method from ``--method``, ``--retain-*`` and ``--option``."""
    from llava_todre.pruners.method_file import named_or_from_file

    method, chosen = named_or_from_file(options.method)
    for item in options.option:
        key, equals, value = item.partition("=")
        if not equals:
            raise TodreError(f"option must be of the form KEY=VALUE, got {item!r}.")
        chosen[key.replace("-", "_")] = parse_yaml(value, f"option {key!r}: the value")
    for key in ("retain_ratio", "retain_tokens"):
        if options[key] is not None:
            chosen[key] = options[key]
    return method, chosen


def _generate(options: Namespace) -> None:
    from llava_todre.pruners import create_pruner
    from llava_todre.report import as_text, report_of
    from llava_todre.request import Request
    from llava_todre.viz import picture_of
    from llava_todre.vlm import load

    if options.picture and options.video:
        raise TodreError(f"picture must be left out with --video, got {options.picture!r}.")
    if options.fps is not None and not (options.video and options.fps > 0):
        raise TodreError(f"fps must be a number above 0, with --video, got {options.fps}.")
    method, chosen = method_options(options)
    pruner = create_pruner(method, **chosen)
    images, seconds = _pictures(options)
    request = Request(options.question, images, options.video, seconds)
    vlm = load(options.model, own_only={"picture": options.picture}, **_loading(options))
    vlm.set_pruner(pruner)
    (result,) = vlm.answer([request], max_new_tokens=options.max_new_tokens, timed=True)
    if options.picture:
        _save(picture_of(images, result.stats, vlm.model), options.picture)
    report = report_of(vlm, method, result)
    print(json.dumps(report) if options.json else as_text(report))


def _pictures(options: Namespace) -> tuple[Sequence[Any], Sequence[float]]:
    """Return the images, or the frames of a video and when each is seen where that is known."""
    from llava_todre.model.images import is_image_file, load_image
    from llava_todre.video import read_clip

    first = os.path.expanduser(options.image[0])
    is_one_file = len(options.image) == 1 and os.path.isfile(first)
    if options.video and is_one_file and not is_image_file(first):
        if options.fps is not None:
            raise TodreError(f"fps must be left out with a video file, got {options.fps}.")
        return read_clip(first, options.max_frames)
    images = [load_image(path, allow_urls=options.allow_urls) for path in options.image]
    seconds = [number / options.fps for number in range(len(images))] if options.fps else []
    return images, seconds


def _convert(options: Namespace) -> None:
    from llava_todre.model.export_hf import check_new, save_as_hf
    from llava_todre.model.load import load_pretrained_model

    check_new(Path(options.out))
    tokenizer, model, _, _ = load_pretrained_model(
        options.model, revision=options.revision, dtype=options.dtype, device="cpu"
    )
    save_as_hf(model, tokenizer, Path(options.out), options.template)
    print(
        f"{options.out}: {type(model).__name__} as AutoModelForImageTextToText reads it.\n"
        "Its chat template writes BOS: use processor.apply_chat_template(..., tokenize=True), or "
        "give what it writes to the processor with add_special_tokens=False."
    )


def _save(picture: Any, path: str) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise TodreError(f"picture {path!r} cannot be written: {error}") from None


def _ui(options: Namespace) -> None:
    from llava_todre.ui.serve import serve

    serve(options.model, host=options.host, port=options.port, **_loading(options))


def _demo(options: Namespace) -> None:
    usual = _demo_parser().get_defaults()
    for key in _COMPARISON_ONLY if options.ui else _PAGE_ONLY:
        if options[key] != usual[key]:
            place = "with" if options.ui else "without"
            raise TodreError(f"{key} must be left out {place} --ui, got {options[key]!r}.")
    if options.ui:
        from llava_todre.ui.serve import serve

        print("todre: demo --ui is deprecated; use todre ui.", file=sys.stderr)
        serve(
            options.model,
            host=options.host,
            port=options.port,
            backend=options.backend,
            template=options.template,
        )
        return
    _comparison()(
        options.model,
        methods=options.methods,
        ratios=options.ratios,
        num_images=options.num_images,
        out=Path(options.out),
        fresh=options.fresh,
    )


def _comparison() -> Callable[..., None]:
    """Return the demo, which only a checkout has."""
    try:
        compare: Callable[..., None] = importlib.import_module("eval.demo.command").compare
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "eval":
            raise
        raise TodreError(
            "todre demo compares methods on the model of a checkout of llava_todre; clone the "
            "project and run it there (make demo)."
        ) from None
    return compare


def _list(options: Namespace) -> None:
    from llava_todre.catalogue import COMBINATION, reads_text, where
    from llava_todre.pruners import PRUNERS
    from llava_todre.pruners.method_file import method_yaml

    if options.method is not None:
        print(method_yaml(options.method), end="")
        return
    rows = [("name", "prunes", "text", "paper")]
    for name, method in PRUNERS.items():
        text = "yes" if reads_text(method) else "no"
        rows.append((name, where(method), text, method.about.paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print("\nprunes: before the decoder, inside it, or both; text: whether it reads the text.")
    print(COMBINATION)
    print(f"\nmethod files: {configs('methods')}\ntask files for lmms-eval: {configs('tasks')}")


_COMPARISON_ONLY = ("methods", "ratios", "num_images", "out", "fresh")
_PAGE_ONLY = ("host", "port", "backend", "template")
_COMMANDS = {
    "generate": _generate,
    "convert": _convert,
    "ui": _ui,
    "demo": _demo,
    "list": _list,
}


if __name__ == "__main__":
    sys.exit(main())
