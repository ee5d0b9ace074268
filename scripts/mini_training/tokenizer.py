"""A word-level tokenizer for the mini model's small world, and LLaVA's prompt around a question.

Every word is one token. Capitals are folded where a lower-case letter follows ("What" is "what"),
but a lone capital stays: the option "A" must not become the article "a".
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eval.mini.questions import LETTERS, NUMBERS, ORDINALS, PLURALS, Question
from eval.mini.shapes import COLOURS, SHAPES
from llava_todre.model.prompt import conv_templates

BEFORE_IMAGE = f"{conv_templates['vicuna_v1'].system} USER: "
"""LLaVA's `vicuna_v1` template up to `<image>`."""
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
MAX_LENGTH = 1024

_QUESTION_WORDS = (
    "is there a an the what color shape object objects how many are where of left right above "
    "below upper lower does sign say digit which row column in yes no ? . , : '"
)


def _words() -> list[str]:
    """The vocabulary in a fixed order, special tokens first."""
    system = re.findall(r"\w+|[^\w\s]+", BEFORE_IMAGE.replace("The", "the"))
    groups = [
        [PAD, BOS, EOS, UNKNOWN],
        [*system, "ASSISTANT"],
        _QUESTION_WORDS.split(),
        [*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS, *ORDINALS, *LETTERS],
        [str(digit) for digit in range(10)],
    ]
    return list(dict.fromkeys(word for group in groups for word in group))


def build_tokenizer() -> Tokenizer:
    """The tokenizer as a `tokenizers` object; `<s>` is put in front of every text."""
    vocabulary = {word: index for index, word in enumerate(_words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fold = [
        normalizers.Replace(Regex(f"{letter}(?=[a-z])"), letter.lower())
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ]
    # "left or right" is written "left, right": the model was trained before it could be asked so.
    spellings = [normalizers.Replace("colour", "color"), normalizers.Replace(" or ", ", ")]
    tokenizer.normalizer = normalizers.Sequence([*fold, *spellings])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = (BOS, vocabulary[BOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write the files that `transformers.AutoTokenizer` loads."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


class PromptEncoder:
    """Token ids of training prompts; equal to LLaVA's chunk-wise tokenisation at `<image>`."""

    def __init__(self) -> None:
        self._tokenizer = build_tokenizer()
        self.vocabulary_size = self._tokenizer.get_vocab_size()
        self.eos: int = self._tokenizer.get_vocab()[EOS]
        self.prefix: list[int] = self._tokenizer.encode(BEFORE_IMAGE).ids
        self._encode = functools.lru_cache(maxsize=200_000)(self._encode_text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        assert self._tokenizer.token_to_id(UNKNOWN) not in ids, text
        return tuple(ids)

    def prompt(self, question: Question) -> tuple[int, ...]:
        """Ids between the image and the answer."""
        return self._encode(f"\n{question.text} ASSISTANT:")

    def answer(self, question: Question) -> tuple[int, ...]:
        """Ids of the answer, without `</s>`."""
        return self._encode(question.answer)
