"""Packed questions are exactly single-turn prompts, in tokens and in logits."""

import pytest
import torch
from transformers import AutoTokenizer

from eval.mini.heldout import held_out_samples
from eval.mini.scenes import SeedFamily
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.packing import NO_TARGET, pack_questions
from scripts.mini_training.tokenizer import BEFORE_IMAGE, PromptEncoder, save_tokenizer

IMAGE_TOKEN_INDEX = -200


def tokenizer_image_token(prompt, tokenizer):
    """What LLaVA's `mm_utils.tokenizer_image_token` does, written out for one image."""
    first, second = (tokenizer(chunk).input_ids for chunk in prompt.split("<image>"))
    assert first[0] == second[0] == tokenizer.bos_token_id
    return [*first, IMAGE_TOKEN_INDEX, *second[1:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def samples():
    return held_out_samples(SeedFamily.VALIDATION, 2, 4, 3)


def test_training_tokens_equal_llavas(tokenizer, samples):
    encoder = PromptEncoder()
    packed = pack_questions([sample.questions for sample in samples], encoder)
    for i, sample in enumerate(samples):
        for j, question in enumerate(sample.questions):
            prompt = f"{BEFORE_IMAGE}<image>\n{question.text} ASSISTANT: {question.answer}</s>"
            expected = tokenizer_image_token(prompt, tokenizer)
            mine = packed.text.segments[i] == j
            ids = packed.text.ids[i][mine].tolist()
            targets = packed.targets[i][mine].tolist()
            eos = targets[-1]
            assert [*encoder.prefix, IMAGE_TOKEN_INDEX, *ids, eos] == expected
            assert tokenizer.unk_token_id not in expected
            answer = [token for token in targets if token != NO_TARGET]
            assert answer == expected[-len(answer) :]
            assert tokenizer.decode(answer[:-1]) == question.answer
            assert packed.text.offsets[i][mine].tolist() == list(range(len(ids)))


def test_users_may_type_capitals_or_not(tokenizer):
    def ids(text):
        return tokenizer(text).input_ids

    assert ids("What color is the star?") == ids("what color is the star ?")
    assert ids("Is there a red circle?") == ids("is there a Red Circle?")
    assert ids("what colour is the star?") == ids("what color is the star?")
    assert ids("A.")[1] != ids("a.")[1], "the option A must differ from the article"
    assert tokenizer.decode(ids("upper left"), skip_special_tokens=True) == "upper left"
    assert ids("zebra") == [tokenizer.bos_token_id, tokenizer.unk_token_id]


@torch.no_grad()
@pytest.mark.parametrize("squeeze", [1.0, 0.37])
def test_packed_logits_equal_single_prompts(samples, squeeze):
    torch.manual_seed(0)
    encoder = PromptEncoder()
    config = DecoderConfig(
        encoder.vocabulary_size, 16, hidden_size=32, intermediate_size=48, num_hidden_layers=3
    )
    decoder = MiniDecoder(config)
    torch.nn.init.normal_(decoder.lm_head.weight)
    visual = decoder.visual_tokens(torch.randn(len(samples), 5, 64, 16))
    assert visual.shape == (len(samples), 336, 32)
    prefix = torch.tensor(encoder.prefix)
    packed = pack_questions([sample.questions for sample in samples], encoder)
    hidden, masses = decoder(prefix, visual, packed.text, squeeze)
    assert masses.shape == (3,) and ((masses > 0) & (masses < 1)).all()
    for i, sample in enumerate(samples):
        for j, question in enumerate(sample.questions):
            single = pack_questions([[question]], encoder)
            expected, _ = decoder(prefix, visual[i : i + 1], single.text, squeeze)
            mine = packed.text.segments[i] == j
            torch.testing.assert_close(hidden[i][mine], expected[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_visual_order_is_thumbnail_then_rows_with_newline():
    config = DecoderConfig(10, 4, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    decoder = MiniDecoder(config)
    for i in (0, 2):
        torch.nn.init.eye_(decoder.model.mm_projector[i].weight)
        torch.nn.init.zeros_(decoder.model.mm_projector[i].bias)
    view = torch.arange(5).view(1, 5, 1).expand(1, 5, 64)
    patch = torch.arange(64).view(1, 1, 64).expand(1, 5, 64)
    # Far from zero the activation is the identity.
    features = torch.stack([view, patch, view * 0, view * 0], -1).float() + 100
    tokens = decoder.visual_tokens(features)[0]
    tokens[:64, :2] -= 100
    rows = tokens[64:].view(16, 17, 8)
    rows[:, :16, :2] -= 100
    assert tokens[:64, 0].eq(0).all() and tokens[:64, 1].tolist() == list(range(64))
    torch.testing.assert_close(rows[:, 16], decoder.model.image_newline.expand(16, 8))
    for y in range(16):
        for x in range(16):
            crop, inside = 1 + (y // 8) * 2 + x // 8, (y % 8) * 8 + x % 8
            assert rows[y, x, :2].tolist() == [crop, inside]
