"""Samples per second as a benchmark asks for them: many questions per picture, or many pictures.

Symbols: B questions at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from eval.bench.answers import QUESTION_TOKENS, answer, questions, random_image
from eval.bench.timing import in_turns, percentiles, ratios, say
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.stage2.prefix import PrefixStore

RETAIN_RATIO = 0.10
PER_PICTURE = 18
"""Questions of POPE about one image."""
BATCH = 8
NEW_TOKENS = 3
""""yes" or "no", and the end."""
_SPREAD = 4


def loads(model: LlavaLlamaForCausalLM, repeats: int, method: str = "todre") -> dict[str, Any]:
    """Compare two loads at 10 % of the tokens with the unpruned model asked one by one.

    The unpruned model prepares, encodes and reads the image anew for each question, as the
    evaluation of the original does. Questions differ in length, so batches have padding.
    """
    runs = {
        "one by one": partial(_ask, model, "vanilla", 1, 1),
        "per picture": partial(_ask, model, method, PER_PICTURE, 1),
        "batch": partial(_ask, model, method, BATCH, BATCH),
    }
    rates = in_turns(runs, repeats)
    return {
        "method": method,
        "retain_ratio": RETAIN_RATIO,
        "questions_per_picture": PER_PICTURE,
        "batch": BATCH,
        "new_tokens": NEW_TOKENS,
        "samples_per_s": {name: percentiles(values) for name, values in rates.items()},
        "per_picture": ratios(rates["per picture"], rates["one by one"]),
        "batched": ratios(rates["batch"], rates["one by one"]),
    }


def lengths_of(count: int) -> list[int]:
    """Return the words of so many questions: different lengths, the same words altogether."""
    if count == 1:
        return [QUESTION_TOKENS]
    return [QUESTION_TOKENS + (_SPREAD if i % 2 else -_SPREAD) for i in range(count)]


def _ask(model: LlavaLlamaForCausalLM, method: str, count: int, num_images: int) -> float:
    """Return the samples per second of B = ``count`` questions about so many images."""
    say(f"{count} questions about {num_images} images, {method}")
    model.set_pruner(method, **({} if method == "vanilla" else {"retain_ratio": RETAIN_RATIO}))
    ids, mask = questions(model, lengths_of(count))
    images = [random_image(model, seed) for seed in range(num_images)]
    shared = num_images == 1 and count > 1
    prefixes = PrefixStore() if shared else None
    timed = answer(model, images, ids, mask, NEW_TOKENS, prefixes=prefixes)
    return count * 1e3 / timed.total_ms
