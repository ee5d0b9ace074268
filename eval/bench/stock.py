"""The load of many questions per picture, on a stock model of transformers.

Symbols: B questions at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from eval.bench.answers import SYSTEM_TOKENS, random_image
from eval.bench.throughput import NEW_TOKENS, PER_PICTURE, RETAIN_RATIO, lengths_of
from eval.bench.timing import in_turns, percentiles, ratios, say, seconds
from llava_todre.hf.stock import StockModel
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.vlm import ImageCache, Request

_TEMPLATE = (
    "{% for message in messages %}"
    + " ".join(f"w{3 + number}" for number in range(SYSTEM_TOKENS))
    + "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def stock_loads(like: LlavaLlamaForCausalLM, repeats: int, method: str = "todre") -> dict[str, Any]:
    """Compare many questions per picture at 10 % of the tokens with the unpruned model.

    The unpruned model processes, encodes and reads the picture anew for each question.

    Args:
        like: a model of the same dimensions.
        repeats: turns.
        method: that prunes.
    """
    model = build_stock(like)
    shown = random_image(like, 0)
    runs = {
        "one by one": partial(_ask, model, shown, "vanilla", 1),
        "per picture": partial(_ask, model, shown, method, PER_PICTURE),
    }
    rates = in_turns(runs, repeats)
    return {
        "family": "llava_next",
        "samples_per_s": {name: percentiles(values) for name, values in rates.items()},
        "per_picture": ratios(rates["per picture"], rates["one by one"]),
    }


def build_stock(like: LlavaLlamaForCausalLM) -> StockModel:
    """Return a stock LLaVA-NeXT with the dimensions of a model, random weights and word tokens."""
    config, tower = like.config, like.get_vision_tower().config
    side, image_id = tower.image_size, config.vocab_size - 1
    text = {**config.to_dict(), "model_type": "llama"}
    whole = LlavaNextConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower.to_dict()),
        image_token_index=image_id,
        image_grid_pinpoints=[[2 * side, 2 * side]],
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with torch.device(like.device):
            model = LlavaNextForConditionalGeneration(whole).eval()
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(config._attn_implementation)
    model.generation_config.eos_token_id = None
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=[[2 * side, 2 * side]],
        ),
        tokenizer=_tokenizer(image_id),
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return StockModel(model, processor)


def _tokenizer(image_id: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are w3, w4, ... and one that stands for an image."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words |= {f"w{number}": number for number in range(3, image_id)} | {"<image>": image_id}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _ask(model: StockModel, shown: Image.Image, method: str, count: int) -> float:
    """Return the samples per second of B = ``count`` questions about one picture."""
    say(f"stock model: {count} questions about one picture, {method}")
    model.set_pruner(method, **({} if method == "vanilla" else {"retain_ratio": RETAIN_RATIO}))
    draw = torch.Generator().manual_seed(0)
    requests = []
    for length in lengths_of(count):
        words = torch.randint(3, model.config.text_config.vocab_size - 1, (length,), generator=draw)
        requests.append(Request(" ".join(f"w{word}" for word in words.tolist()), [shown]))
    settings: dict[str, Any] = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    memory = ImageCache() if count > 1 else None
    return count / seconds(lambda: model.answer(requests, image_cache=memory, **settings))
