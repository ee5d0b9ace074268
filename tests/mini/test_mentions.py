"""Mentions point at the token that completes an object's name, and at its cell."""

import torch

from llava_todre.mini.heldout import held_out_samples
from llava_todre.mini.mentions import MentionLoss
from llava_todre.mini.packing import pack_questions
from llava_todre.mini.scenes import SeedFamily
from llava_todre.mini.tokenizer import PromptEncoder


def test_mentions_of_unique_objects():
    encoder = PromptEncoder()
    samples = held_out_samples(SeedFamily.VALIDATION, 12, 4, 3)
    packed = pack_questions([sample.questions for sample in samples], encoder)
    loss = MentionLoss(8, encoder)
    mentions = loss.find([sample.scene for sample in samples], packed.text)
    found = set()
    rows = zip(mentions.image.tolist(), mentions.token.tolist(), mentions.cells, strict=True)
    for image, token, (column, row) in rows:
        ids = packed.text.ids[image].tolist()
        named = [
            item
            for item in samples[image].objects
            if encoder.word(item.colour) == ids[token - 1]
            and encoder.word(item.shape) == ids[token]
        ]
        assert len(named) == 1
        x, y = named[0].centre
        assert (column, row) == (x // 28, y // 28)
        found.add((image, int(packed.text.segments[image][token])))
    for i, sample in enumerate(samples):
        for j, question in enumerate(sample.questions):
            if question.task in ("where", "relation"):
                assert (i, j) in found
            if question.task in ("digit", "read", "colour"):
                assert (i, j) not in found
    value, right = loss(torch.randn(*packed.text.ids.shape, 8), mentions)
    assert value > 0 and 0 <= right <= 1
