"""Commands as a reader would type them: run where they are cheap, checked where they are not.

What runs: ``todre generate`` and ``convert`` on the bundled model, ``todre list``, tables of stored
results, ``--check`` and ``--dry-run``. Evaluations are planned, scripts print what they would call,
make says what it would do. Of everything else program, options, files and names are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from eval import __main__ as evaluation
from eval.demo.plan import plan as plan_demo
from eval.run.spec import CONFIGS
from eval.run.suites import load_suite
from llava_todre import cli
from llava_todre.lmms_plugin.arguments import build_pruner, take_loading
from llava_todre.pruners import create_pruner

ROOT = Path(__file__).parents[1]
Words = Sequence[str]
Settings = Mapping[str, str]
_TORCHRUN = {"--nproc_per_node"}
_SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


def lines_of(code: str) -> list[list[str]]:
    """Return the words of every command of a block."""
    joined = code.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def carry_out(code: str) -> None:
    """Carry out every command of a block, as far as it is cheap."""
    for line in lines_of(code):
        assert not {"&&", "||", "|", ";", ">"} & set(line), f"one command per line: {line}"
        settings, words = _split(line)
        assert words[0] in PROGRAMS, f"nothing says what to do with {words[0]!r}"
        PROGRAMS[words[0]](words[1:], settings)


def is_command(span: str) -> bool:
    """Return whether code in a sentence is a command."""
    words = [word for word in span.split() if not _SETTING.fullmatch(word)]
    return len(words) > 1 and words[0] in PROGRAMS and not words[1][0].isdigit()


def check_mention(span: str) -> None:
    """Check a command in a sentence, which may leave out what is required."""
    _, words = _split([word for word in shlex.split(span) if word != "|"])
    program, *rest = words
    if program == "todre":
        command = _choices(cli._parser()).get(rest[0])
        assert command or rest[0].startswith("-"), span
        assert command is None or _options(rest) <= _known(command), span
    elif program == "python" and rest[:2] == ["-m", "eval"]:
        command = _choices(evaluation.parser()).get(rest[2]) if rest[2:] else None
        assert not rest[2:] or (command and _options(rest) <= _known(command)), span
    elif program == "python" and rest[:2] == ["-m", "lmms_eval"]:
        assert _options(rest) <= _lmms_eval_options(), span
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), span
    elif program in ("python", "bash"):
        assert (ROOT / rest[0]).is_file(), span
    elif program == "torchrun":
        assert _options(rest) <= _lmms_eval_options() | _TORCHRUN, span
    else:
        PROGRAMS[program](rest, {})


def _split(line: Words) -> tuple[dict[str, str], list[str]]:
    """Return the variables before a command, and the command."""
    settings: dict[str, str] = {}
    for place, word in enumerate(line):
        match = _SETTING.fullmatch(word)
        if not match:
            return settings, list(line[place:])
        settings[match[1]] = match[2]
    raise AssertionError(f"no command: {line}")


def _options(words: Words) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands of a parser."""
    found = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return dict(found[0])


def _known(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


# ------------------------------------------------------------------------------ our programs


def _todre(words: Words, settings: Settings) -> None:
    del settings
    options = cli._parser().parse_args(list(words))
    chosen = options[options.command]
    if options.command == "demo":
        plan_demo(chosen.methods, chosen.ratios)
    elif options.command == "list" or chosen.model == "checkpoints/mini":
        assert cli.main(list(words)) == 0
    elif options.command == "generate":
        method, knobs = cli.method_options(chosen)
        create_pruner(method, **knobs)


def _python(words: Words, settings: Settings) -> None:
    assert words[0] == "-m", words
    module, *rest = words[1:]
    if module == "lmms_eval":
        _lmms_eval(rest, settings)
    if module != "eval":
        assert importlib.util.find_spec(module), module
        return
    assert not settings, "python -m eval reads no variables"
    options = evaluation.parser().parse_args(rest)
    if options.command in ("run", "sweep", "bench"):
        assert evaluation.main([*rest, *([] if options.dry_run else ["--dry-run"])]) == 0
    elif options.command in ("docs", "readme"):
        assert evaluation.main([options.command, "--check"]) == 0
    elif options.command == "compare" or (
        options.command == "table" and all(folder.exists() for folder in options.results or ())
    ):
        assert evaluation.main(rest) == 0


def _script(words: Words, settings: Settings) -> None:
    """Run a script with a Python that prints what it is asked for, and carry that out."""
    script, *rest = words
    text = (ROOT / script).read_text() + (ROOT / "scripts" / "common.sh").read_text()
    for name in settings:
        assert f"${{{name}:" in text, f"{script} does not read {name}"
    stub = Path("python_that_prints")
    stub.write_text("#!/usr/bin/env bash\nprintf '%q ' python \"$@\"\necho\n")
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", script, *rest],
        env={**os.environ, **settings, "PYTHON": str(stub.absolute())},
        capture_output=True,
        text=True,
        check=True,
    )
    carry_out(done.stdout)


def _make(words: Words, settings: Settings) -> None:
    del settings
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    for variable in {word.partition("=")[0] for word in words} - {*targets}:
        assert f"$({variable})" in makefile, f"no variable {variable}"
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:.*##", makefile, re.MULTILINE), target
    subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)


# ------------------------------------------------------------------------------ others' programs


def _lmms_eval_options() -> set[str]:
    spec = importlib.util.find_spec("lmms_eval")
    assert spec and spec.origin
    return set(re.findall(r'"(--\w+)"', Path(spec.origin).with_name("__main__.py").read_text()))


def _lmms_eval(words: Words, settings: Settings) -> None:
    del settings
    assert _options(words) <= _lmms_eval_options(), words
    parser = argparse.ArgumentParser()
    for option in ("model", "model_args", "tasks"):
        parser.add_argument(f"--{option}", required=True)
    given, _ = parser.parse_known_args(words)
    assert given.model == "llava_todre"
    from llava_todre.lmms_plugin.model import LlavaTodre

    own = [key for key in inspect.signature(LlavaTodre).parameters if key != "options"]
    arguments = dict(pair.split("=", 1) for pair in given.model_args.split(","))
    options = {key: value for key, value in arguments.items() if key not in own}
    take_loading(options)
    build_pruner(arguments.get("method", "todre"), options, None, own)
    for task in given.tasks.split(","):
        assert task in _tasks() or _has_task(task), task


def _tasks() -> set[str]:
    suites = [load_suite(file.stem) for file in (CONFIGS / "suites").glob("*.yaml")]
    return {task for suite in suites for task in suite.tasks}


def _has_task(name: str) -> bool:
    spec = importlib.util.find_spec("lmms_eval")
    assert spec and spec.origin
    return any((Path(spec.origin).parent / "tasks").rglob(f"{name}.yaml"))


def _torchrun(words: Words, settings: Settings) -> None:
    start = list(words).index("lmms_eval")
    assert words[start - 1] == "-m" and _options(words[:start]) <= _TORCHRUN, words
    _lmms_eval(words[start + 1 :], settings)


def _pip(words: Words, settings: Settings) -> None:
    """Check that what is installed is ours, with extras there are, or pinned."""
    del settings
    assert words[0] in ("install", "wheel"), words
    project = (ROOT / "pyproject.toml").read_text()
    locks = ("requirements.txt", "requirements-torch.txt")
    pins = "".join((ROOT / name).read_text() for name in locks)
    for word in words[1:]:
        if word.startswith(("-", "https://download.pytorch.org/")) or word == "requirements.txt":
            continue
        if word.startswith((".", "llava-todre")):
            for extra in re.findall(r"[a-z]+", word.partition("[")[2]):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
        else:
            name, equals, version = word.partition("==")
            locked = re.search(rf"^{name.replace('_', '-')}=={version or ''}", pins, re.MULTILINE)
            assert locked or not equals and name in project, word


def _source(words: Words, settings: Settings) -> None:
    del settings
    assert list(words) == [".venv/bin/activate"], words
    assert "\nVENV := .venv\n" in (ROOT / "Makefile").read_text()


def _hf(words: Words, settings: Settings) -> None:
    del settings
    (program,) = entry_points(group="console_scripts", name="hf")
    command = itertools.takewhile(str.isalpha, words)
    code = f"import sys; from {program.module} import {program.attr}; sys.exit({program.attr}())"
    subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, check=True
    )


PROGRAMS: dict[str, Callable[[Words, Settings], None]] = {
    "todre": _todre,
    "python": _python,
    "bash": _script,
    "make": _make,
    "torchrun": _torchrun,
    "pip": _pip,
    "source": _source,
    "hf": _hf,
}
