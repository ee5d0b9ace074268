"""Which conversation template a checkpoint was made for.

``auto`` is, in this order: the chat template that comes with the checkpoint, in its
chat_template.jinja, chat_template.json or tokenizer_config.json; the one that LLaVA's scripts take
for a checkpoint of that name; ``vicuna_v1``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.model.bounded import within
from llava_todre.model.checkpoint import first_line, read_json
from llava_todre.model.prompt import (
    AUTO,
    DEFAULT_IMAGE_TOKEN,
    Template,
    build_prompt,
    conv_templates,
    named_template,
    swallows_space,
)

logger = logging.getLogger(__name__)

DEFAULT = "vicuna_v1"
TEMPLATES = (AUTO, *conv_templates)
"""What users may name."""
# As LLaVA's run scripts; they say llava_v1 for "v1", but trained and evaluated with vicuna_v1.
_NAMES = (
    (r"(?<![a-z])llama[-_]?2(?!\d)", "llava_llama_2"),
    (r"(?<![a-z])llama[-_]?3(?!\d)", "llava_llama_3"),
    (r"mistral", "mistral_instruct"),
    (r"v1\.6-34b", "chatml_direct"),
    (r"vicuna|v1|llava-1\.5", "vicuna_v1"),
)
_MARKS = ("QUESTION-1", "ANSWER-1", "QUESTION-2")


def suggested_template(
    name: str, config: Mapping[str, Any] | None = None, words: Container[str] = ()
) -> str | None:
    """Return the template that a checkpoint's name suggests, or else its other facts.

    Args:
        name: path or hub id of the checkpoint.
        config: its config.json.
        words: the vocabulary.
    """
    for pattern, template in _NAMES:
        if re.search(pattern, _last_part(name).lower()):
            return template
    decoder = (config or {}).get("text_config")
    kinds = [(config or {}).get("model_type")]
    kinds += [decoder.get("model_type")] if isinstance(decoder, dict) else []
    if "llava_mistral" in kinds or "mistral" in kinds:
        return "mistral_instruct"
    return "llava_llama_3" if "<|start_header_id|>" in words else None


def _last_part(name: str) -> str:
    """Return what a checkpoint is called, also one of a training run or in the hub's cache."""
    path = Path(name)
    if path.name.startswith("checkpoint-"):
        return path.parent.name
    return path.parents[1].name if path.parent.name == "snapshots" else path.name


def planned_template(name: str, folder: Path | None) -> str:
    """Return the template for a benchmark: what the name suggests comes first, as in LLaVA's.

    ``auto`` where nothing but the loaded checkpoint can tell.

    Args:
        name: path or hub id of the checkpoint.
        folder: where it is, if it is on this machine.
    """
    suggested = suggested_template(name)
    if suggested or folder is None:
        return suggested or AUTO
    texts = [
        file.read_text(errors="replace")
        for file in (folder / "tokenizer_config.json", folder / "tokenizer.json")
        if file.is_file()
    ]
    if any(folder.glob("chat_template.j*")) or any('"chat_template"' in text for text in texts):
        return AUTO
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}  # loading it says what is missing
    return suggested_template(name, config, "".join(texts)) or DEFAULT


def find_template(template: str | Template, model: Any, tokenizer: Any) -> Template:
    """Return a template by name, or for ``auto`` the one the checkpoint was made for.

    Logs one line, once, where that is not what the checkpoint's name suggests.

    Args:
        template: a name of ``conv_templates``, ``auto``, or a template, which is returned.
        model: of ours; knows in ``suggested_template`` what its name suggests.
        tokenizer: knows the checkpoint's own chat template, if there is one.

    Raises:
        TodreError: unknown name, or a chat template that cannot be read.
    """
    if isinstance(template, Template):
        return template
    suggested: str | None = model.suggested_template
    if template != AUTO:
        chosen, what = named_template(template), repr(template)
    elif tokenizer.chat_template:
        chosen, what = own_template(tokenizer), "the chat template that comes with it"
    else:
        return conv_templates[suggested or DEFAULT]
    if suggested and build_prompt("x", 1, chosen) != build_prompt("x", 1, suggested):
        _warn(str(model.name_or_path), suggested, what)
    return chosen


def known_name(template: Template) -> str | Template:
    """Return the name of a template, or the template where it has none."""
    return next((name for name, known in conv_templates.items() if known == template), template)


@lru_cache
def _warn(checkpoint: str, suggested: str, used: str) -> None:
    logger.warning(
        "%s: its name or config suggests template %r; used is %s, which writes another prompt.",
        checkpoint,
        suggested,
        used,
    )


def own_template(tokenizer: Any) -> Template:
    """Return the chat template of a tokenizer, learned from what it makes of a conversation.

    Where that is what one of ``conv_templates`` makes of it, it is that one.

    The turns are given to it as text, as templates of language models want it, or else as parts,
    as those of processors do.

    Raises:
        TodreError: the template fails, or leaves out a turn.
    """
    reason = "it leaves out or repeats a turn"
    for parts in (None, [{"type": "text"}]):
        try:
            text = _rendered(tokenizer, parts, turns=3)
        except Exception as error:  # of Jinja, or whatever the template raises
            reason = first_line(error)
            continue
        pieces = re.split("|".join(_MARKS), text)
        if len(pieces) == 1 + len(_MARKS) and DEFAULT_IMAGE_TOKEN not in text:
            learned = _learned(tokenizer, *pieces)
            known = (one for one in conv_templates.values() if _facts(one) == _facts(learned))
            return next(known, learned)
    raise TodreError(
        f"the chat template of the checkpoint cannot be used: {reason}. Name another one: "
        f"template={', '.join(conv_templates)}."
    )


def _learned(tokenizer: Any, first: str, answer: str, question: str, end: str) -> Template:
    """Return the template that writes these texts before, between and after three turns."""
    images = _around_images(tokenizer, first)
    template = Template(
        system="",
        roles=("user", "assistant"),
        first=_without_bos(first, tokenizer),
        question=(question, ""),
        answer=(answer, ""),
        open=end,
        stop=_stop(question.lstrip(), tokenizer),
    )
    return template if images is None else replace(template, images=images)


def _facts(template: Template) -> tuple[Any, ...]:
    """Return all that tells templates apart, however they are put together."""
    conversation = template.copy()
    for text in (*_MARKS, None):
        conversation.append_message("", text)
    return conversation.get_prompt(), template.images, template.stop


def _around_images(tokenizer: Any, first: str) -> tuple[str, str] | None:
    """Return what the template writes between and after images; None if they are not in front."""
    try:
        text = _rendered(tokenizer, [{"type": "image"}] * 2 + [{"type": "text"}], turns=1)
    except Exception:  # a template for text only
        return None
    before, *rest = text.split(_MARKS[0])[0].split(DEFAULT_IMAGE_TOKEN)
    return (rest[0], rest[1]) if before == first and len(rest) == 2 else None


def _rendered(tokenizer: Any, parts: list[dict[str, str]] | None, turns: int) -> str:
    def content(mark: str) -> Any:
        if parts is None:
            return mark
        return [part | ({"text": mark} if part["type"] == "text" else {}) for part in parts]

    conversation = [
        {"role": ("user", "assistant")[index % 2], "content": content(mark)}
        for index, mark in enumerate(_MARKS[:turns])
    ]
    settings = {"tokenize": False, "add_generation_prompt": True}
    write = partial(tokenizer.apply_chat_template, conversation, **settings)
    return str(within("the chat template", write))


def _without_bos(text: str, tokenizer: Any) -> str:
    """Leave out the BOS that the tokenizer writes anyway, and the space that it swallows there."""
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos) or not writes_bos(tokenizer):
        return text
    text = text.removeprefix(bos)
    return text.removeprefix(" ") if swallows_space(tokenizer) else text


def writes_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts BOS in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]


def _stop(after_answer: str, tokenizer: Any) -> str | None:
    """Return the special token that ends an answer, where that is not EOS."""
    end = re.match(r"<[^<>\s]+>", after_answer)
    return end[0] if end and end[0] not in (tokenizer.eos_token, tokenizer.bos_token) else None
