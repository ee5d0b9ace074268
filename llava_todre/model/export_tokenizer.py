r"""A tokenizer for processors of transformers, which read a prompt as one text, not in pieces.

LLaVA tokenizes what stands between images piece by piece, and SentencePiece puts a space in front
of every piece: ``<image>\nWhat`` becomes ``<image>``, ``▁\n``, ``What``. A processor hands over
the whole prompt, in which the fast Llama tokenizer puts that space in front of the first piece
only, and answers change. Here a rule of the tokenizer's normalizer writes it after an image.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_todre.errors import TodreError
from llava_todre.model.prompt import DEFAULT_IMAGE_TOKEN, tokenizer_image_token

_AFTER_AN_IMAGE = rf"{DEFAULT_IMAGE_TOKEN}(?!{DEFAULT_IMAGE_TOKEN}|\z)"
_PROBES = [
    text.replace("#", DEFAULT_IMAGE_TOKEN)
    for text in ("a#", "a #\nb", "# b", "#b #c", "# #\n\n b", "a  #\n#\n#\n  b\n")
]


def with_image_token(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows ``<image>`` and gives the ids of ``tokenizer_image_token``.

    It pads on the left, with the padding token, or else the unknown or the EOS token.

    Args:
        tokenizer: of a checkpoint; not changed.

    Raises:
        TodreError: it cannot be made to give these ids.
    """
    pad = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    if getattr(tokenizer, "backend_tokenizer", None) is None or pad is None:
        raise TodreError(
            "the tokenizer must be a fast one with an EOS token to be converted, "
            f"got a {type(tokenizer).__name__} with padding token {pad!r}."
        )
    image_id = tokenizer.get_vocab().get(DEFAULT_IMAGE_TOKEN, len(tokenizer))
    as_it_is = json.loads(tokenizer.backend_tokenizer.to_str())
    as_it_is |= {"truncation": None, "padding": None}
    for parts in (_with_image(as_it_is, image_id), _with_rule(as_it_is, image_id)):
        converted = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            unk_token=tokenizer.unk_token,
            pad_token=pad,
            padding_side="left",
            model_max_length=tokenizer.model_max_length,
            clean_up_tokenization_spaces=False,
        )
        if all(
            tokenizer_image_token(probe, tokenizer, image_id) == converted(probe).input_ids
            for probe in _PROBES
        ):
            return converted
    raise TodreError(
        "the tokenizer of this checkpoint gives other ids for the text after an image when it "
        "reads the prompt as a whole, and cannot be converted."
    )


def _with_image(parts: dict[str, Any], image_id: int) -> dict[str, Any]:
    """Return a tokenizer.json that knows ``<image>``."""
    if any(token["content"] == DEFAULT_IMAGE_TOKEN for token in parts["added_tokens"]):
        return parts
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    image = {"id": image_id, "content": DEFAULT_IMAGE_TOKEN, "special": True, **flags}
    return parts | {"added_tokens": [*parts["added_tokens"], image]}


def _with_rule(parts: dict[str, Any], image_id: int) -> dict[str, Any]:
    """Return a tokenizer.json whose normalizer writes a space after an image."""
    tokens = [
        # A normalized one is looked for after the normalizer, which can then see it.
        token | {"normalized": True} if token["content"] == DEFAULT_IMAGE_TOKEN else token
        for token in _with_image(parts, image_id)["added_tokens"]
    ]
    space = (parts["pre_tokenizer"] or {}).get("replacement", "\N{LOWER ONE EIGHTH BLOCK}")
    rule = {
        "type": "Replace",
        "pattern": {"Regex": _AFTER_AN_IMAGE},
        "content": DEFAULT_IMAGE_TOKEN + space,
    }
    usual = parts["normalizer"]
    normalizer = {"type": "Sequence", "normalizers": [rule, usual] if usual else [rule]}
    return parts | {"added_tokens": tokens, "normalizer": normalizer}
