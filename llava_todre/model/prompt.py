"""The text side of LLaVA: conversation templates, and tokenizing a prompt that contains images.

A template turns turns into one string; the string holds ``<image>`` where an image goes; the
tokenizer puts the placeholder id -200 there, and the model later puts the visual tokens there.
System prompts and separators are facts of the checkpoints: a model answers worse with others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llava_todre.errors import TodreError, unknown

IMAGE_TOKEN_INDEX = -200
DEFAULT_IMAGE_TOKEN = "<image>"
AUTO = "auto"
"""Instead of a template's name: the one the checkpoint was made for."""


@dataclass(frozen=True)
class Template:
    """How one family of checkpoints writes a conversation.

    Attributes:
        system: the system prompt.
        roles: names of the user and of the assistant.
        first: what stands before the first question; ``{system}`` is the place of the system
            prompt.
        question: what stands before and after every later question; the latter after the first too.
        answer: what stands before and after an answer.
        open: what stands before an answer that is still to be written.
        stop: the string that ends an answer, or None when the EOS token alone does.
        images: what stands between images, and between the last one and the question.
    """

    system: str
    roles: tuple[str, str]
    first: str
    question: tuple[str, str]
    answer: tuple[str, str]
    open: str
    stop: str | None = None
    images: tuple[str, str] = (" ", "\n")

    def copy(self) -> Conversation:
        """Return a new, empty conversation; the template itself never changes."""
        return Conversation(self)

    @property
    def opening(self) -> str:
        """All that stands before the first question."""
        return self.first.replace("{system}", self.system)


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
        template = self.template
        before = (template.question[0], template.answer[0])
        after = (template.question[1], template.answer[1])
        text = template.opening
        for index, (_, message) in enumerate(self.messages):
            if message:
                text += (before[index % 2] if index else "") + message + after[index % 2]
            elif index % 2:
                text += template.open
        return text


_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_USER_3 = "<|start_header_id|>user<|end_header_id|>\n\n"
_ASSISTANT_3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"

_VICUNA = Template(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    roles=("USER", "ASSISTANT"),
    first="{system} USER: ",
    question=("USER: ", " "),
    answer=("ASSISTANT: ", "</s>"),
    open="ASSISTANT:",
)
conv_templates: dict[str, Template] = {
    "vicuna_v1": _VICUNA,
    "llava_v1": replace(_VICUNA, system=re.sub(r"\buser\b", "human", _VICUNA.system)),
    # The tokenizer writes the first BOS itself.
    "llava_llama_2": Template(
        system=_VISION_ASSISTANT,
        roles=("USER", "ASSISTANT"),
        first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        question=("<s>[INST] ", " [/INST]"),
        answer=(" ", " </s>"),
        open="",
    ),
    "llava_llama_3": Template(
        system=_VISION_ASSISTANT,
        roles=("user", "assistant"),
        first="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>" + _USER_3,
        question=(_USER_3, "<|eot_id|>"),
        answer=(_ASSISTANT_3, "<|eot_id|>"),
        open=_ASSISTANT_3,
        stop="<|eot_id|>",
    ),
    "mistral_instruct": Template(
        system="",
        roles=("USER", "ASSISTANT"),
        first="[INST] ",
        question=("[INST] ", " [/INST]"),
        answer=(" ", " </s>"),
        open="",
    ),
    "chatml_direct": Template(
        system="Answer the questions.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        first="<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
        question=("<|im_start|>user\n", "<|im_end|>"),
        answer=("<|im_start|>assistant\n", "<|im_end|>"),
        open="<|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
    "plain": Template(
        system="",
        roles=("", ""),
        first="",
        question=("", "\n"),
        answer=("", "\n"),
        open="",
        stop="\n",
    ),
}


def named_template(name: str) -> Template:
    """Return a template of ``conv_templates``; raises when there is none of that name."""
    if not isinstance(name, str) or name not in conv_templates:
        raise unknown("template", name, [AUTO, *conv_templates])
    return conv_templates[name]


def build_prompt(question: str, num_images: int, template: str | Template = "vicuna_v1") -> str:
    """Return the prompt of one question about some images.

    Args:
        question: the user's text; may already hold ``<image>`` where the images belong.
        num_images: how many images go with it.
        template: a name in ``conv_templates``, or a template of its own.

    Raises:
        TodreError: unknown template, empty question, or a wrong number of ``<image>``.
    """
    if isinstance(template, str):
        template = named_template(template)
    if not question.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise TodreError(f"question {question!r} is empty; give a text with at least one word.")
    given = question.count(DEFAULT_IMAGE_TOKEN)
    if given not in (0, num_images):
        raise TodreError(
            f"question contains {given} {DEFAULT_IMAGE_TOKEN} but {num_images} image(s) were given;"
            " the numbers must agree, or leave them out and they are put in front."
        )
    if given == 0 and num_images > 0:
        between, end = template.images
        question = between.join([DEFAULT_IMAGE_TOKEN] * num_images) + end + question
    conversation = template.copy()
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
    if piece.startswith(" ") and swallows_space(tokenizer):
        piece = " " + piece
    return list(tokenizer(piece).input_ids)


def swallows_space(tokenizer: Any) -> bool:
    """Return whether a tokenizer leaves out its own space where a text begins with one."""
    return bool(tokenizer(" a").input_ids == tokenizer("a").input_ids)
