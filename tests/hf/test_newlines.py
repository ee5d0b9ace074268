"""Which newlines stay, and how many images a method sees at once, on stock models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from checks import assert_follows, planned, run
from tiny import BATCH, TWO_IMAGES, VIDEO_BATCH, inputs_for, model_of

from llava_todre.pruners import Keep
from llava_todre.pruners.todre import Todre
from llava_todre.spans import VisualTokens

CASES = [
    ("llava_next", BATCH),
    ("llava_next", TWO_IMAGES),
    ("llava_onevision", BATCH),
    ("llava_onevision", VIDEO_BATCH),
]


@pytest.mark.parametrize("newlines", ["all", "none"])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize(("family", "samples"), CASES)
def test_answers_are_those_of_a_decoder_that_reads_what_stays(family, samples, ratio, newlines):
    """A part leaves after layer 2, and all that is left after layer 5."""
    model = model_of(family)
    inputs = inputs_for(model, samples)
    method = planned(inputs, ratio, (0, 2, 3), (0, 5, 0), newlines=newlines)
    stats = assert_follows(model, inputs, method)
    here, first = stats[0].visual_tokens_per_layer, stats[0].kept_tokens
    num_newlines = sum(image.num_newlines for image in stats[0].images)
    assert num_newlines and here[-1] == 0
    left = num_newlines if newlines == "all" else 0
    assert here[0] == first + (left if ratio < 1 else num_newlines)
    assert here[3] == -(-first // 3) + left


@dataclass(frozen=True, kw_only=True)
class Counting(Todre):
    """Selects from one image after the other, and notes how many each call brings."""

    calls: list[int] = field(default_factory=list, compare=False)

    def select_all(self, images: Sequence[VisualTokens], num_keeps: Sequence[int]) -> list[Keep]:
        self.calls.append(len(images))
        each = zip(images, num_keeps, strict=True)
        return [super(Counting, self).select_all([tokens], [k])[0] for tokens, k in each]


def test_the_images_of_a_batch_are_selected_from_at_the_same_time() -> None:
    model = model_of("llava_next")
    inputs, method = inputs_for(model, BATCH), Counting(retain_ratio=0.25)
    _, one_by_one = run(model, inputs, method)
    _, together = run(model, inputs, "todre", retain_ratio=0.25)
    assert method.calls == [3]
    assert [len(stats.images) for stats in together] == [1, 2, 0]
    for stats, expected in zip(together, one_by_one, strict=True):
        for image, other in zip(stats.images, expected.images, strict=True):
            assert torch.equal(image.keep_idx, other.keep_idx)
