"""The text side of LLaVA: conversation templates, and tokenizing a prompt that contains images.

A template turns turns into one string; the string holds ``<image>`` where an image goes; the
tokenizer puts the placeholder id -200 there, and the model later puts the visual tokens there.
System prompts and separators are facts of the checkpoints: a model answers worse with others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llava_todre.errors import TodreError, unknown

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
DEFAULT_IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Template:
    """How one family of checkpoints writes a conversation.

    Attributes:
        style: ``"two"`` (Vicuna), ``"llama_2"``, ``"mpt"`` (ChatML) or ``"plain"``.
        system: the system prompt.
        roles: names of the user and of the assistant.
        separators: what ends a user turn and what ends an assistant turn.
        stop: the string that ends an answer, or None when the EOS token alone does.
    """

    style: str
    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]
    stop: str | None = None

    def copy(self) -> Conversation:
        """Return a new, empty conversation; the template itself never changes."""
        return Conversation(self)


@dataclass
class Conversation:
    """A template and the turns so far, as (role, text); text None means "to be answered"."""

    template: Template
    messages: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def roles(self) -> tuple[str, str]:
        """The template's (user, assistant) names."""
        return self.template.roles

    @property
    def stop(self) -> str | None:
        """The string that ends an answer, or None when the EOS token alone does."""
        return self.template.stop

    def append_message(self, role: str, text: str | None) -> None:
        """Add one turn."""
        self.messages.append((role, text))

    def copy(self) -> Conversation:
        """Return a conversation with the same turns that can go on independently."""
        return Conversation(self.template, list(self.messages))

    def get_prompt(self) -> str:
        """Return the whole conversation as the string the checkpoint was trained on."""
        return _WRITERS[self.template.style](self.template, self.messages)


_Turns = list[tuple[str, str | None]]


def _write_two(template: Template, turns: _Turns) -> str:
    text = template.system + template.separators[0]
    for index, (role, message) in enumerate(turns):
        text += f"{role}: {message}{template.separators[index % 2]}" if message else f"{role}:"
    return text


def _write_llama_2(template: Template, turns: _Turns) -> str:
    between, end = template.separators
    text = ""
    for index, (_, message) in enumerate(turns):
        if not message:
            continue
        if index == 0 and template.system:
            message = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n{message}"
        text += f"{between}[INST] {message} [/INST]" if index % 2 == 0 else f" {message} {end}"
    return text.removeprefix(between)  # the tokenizer writes the first BOS itself


def _write_mpt(template: Template, turns: _Turns) -> str:
    end = template.separators[0]
    return template.system + end + "".join(r + m + end if m else r for r, m in turns)


def _write_plain(template: Template, turns: _Turns) -> str:
    pairs = zip(turns, template.separators * len(turns), strict=False)
    return template.system + "".join(m + end for (_, m), end in pairs if m)


_WRITERS = {
    "two": _write_two,
    "llama_2": _write_llama_2,
    "mpt": _write_mpt,
    "plain": _write_plain,
}

conv_templates: dict[str, Template] = {
    "vicuna_v1": Template(
        style="two",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        roles=("USER", "ASSISTANT"),
        separators=(" ", "</s>"),
    ),
    "llava_llama_2": Template(
        style="llama_2",
        system="You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
        roles=("USER", "ASSISTANT"),
        separators=("<s>", "</s>"),
    ),
    "mistral_instruct": Template(
        style="llama_2", system="", roles=("USER", "ASSISTANT"), separators=("", "</s>")
    ),
    "chatml_direct": Template(
        style="mpt",
        system="<|im_start|>system\nAnswer the questions.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        separators=("<|im_end|>", "<|im_end|>"),
        stop="<|im_end|>",
    ),
    "plain": Template(style="plain", system="", roles=("", ""), separators=("\n", "\n"), stop="\n"),
}


def build_prompt(question: str, num_images: int, template: str = "vicuna_v1") -> str:
    """Return the prompt of one question about some images.

    Args:
        question: the user's text; may already hold ``<image>`` where the images belong.
        num_images: how many images go with it.
        template: a name in ``conv_templates``.

    Raises:
        TodreError: unknown template, empty question, or a wrong number of ``<image>``.
    """
    if template not in conv_templates:
        raise unknown("template", template, conv_templates)
    if not question.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise TodreError(f"question {question!r} is empty; give a text with at least one word.")
    given = question.count(DEFAULT_IMAGE_TOKEN)
    if given not in (0, num_images):
        raise TodreError(
            f"question contains {given} {DEFAULT_IMAGE_TOKEN} but {num_images} image(s) were given;"
            " the numbers must agree, or leave them out and they are put in front."
        )
    if given == 0 and num_images > 0:
        question = " ".join([DEFAULT_IMAGE_TOKEN] * num_images) + "\n" + question
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Tokenize a prompt, with ``image_token_index`` wherever it says ``<image>``.

    The pieces between images are tokenized one by one, as in training; BOS, where the tokenizer
    writes one, stays on the first piece only.

    Args:
        prompt: text with any number of ``<image>``.
        tokenizer: a transformers tokenizer.
        image_token_index: the placeholder id, not a vocabulary id.
        return_tensors: ``"pt"`` for an int64 tensor of shape (t,), None for a list of t ids.
    """
    if return_tensors not in (None, "pt"):
        raise unknown("return_tensors", return_tensors, ["pt"])
    pieces = [_piece_ids(piece, tokenizer) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    skip = int(bos is not None and pieces[0][:1] == [bos])
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [image_token_index, *piece[skip:]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def _piece_ids(piece: str, tokenizer: Any) -> list[int]:
    """Tokenize one piece as SentencePiece would.

    SentencePiece puts one space in front of every text. The fast Llama tokenizer of
    transformers 5 leaves it out where the text begins with a space already, so one space gets
    lost: we give it back, when this tokenizer is of that kind.
    """
    if piece.startswith(" ") and tokenizer(" a").input_ids == tokenizer("a").input_ids:
        piece = " " + piece
    return list(tokenizer(piece).input_ids)
