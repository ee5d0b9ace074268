"""Asks a converted checkpoint as a user of transformers does: nothing of this project is imported.

python plain_transformers.py FOLDER [PICTURE QUESTION] ...  -> JSON on the last line
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(asked: dict[str, list[list[str]]]) -> None:
    torch.set_num_threads(1)
    told = {folder: report_on(folder, pairs) for folder, pairs in asked.items()}
    project = [name for name in sys.modules if name.startswith("llava_todre")]
    print(json.dumps({"folders": told, "project": project}))


def report_on(folder: str, pairs: list[list[str]]) -> dict[str, Any]:
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    model.eval()
    processor = AutoProcessor.from_pretrained(folder)
    conversations = [conversation(picture, question) for picture, question in pairs]
    return {
        "class": type(model).__name__,
        "wrong_tensors": {key: sorted(map(str, names)) for key, names in told.items() if names},
        "image_id": model.config.image_token_id,
        "asked": [answer(model, processor, each) for each in conversations],
        "together": answers_together(model, processor, conversations[:3]),
    }


def conversation(picture: str, question: str) -> list[dict[str, Any]]:
    image = Image.open(picture).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def inputs_of(processor: Any, conversations: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def generated(model: Any, processor: Any, inputs: Any) -> list[str]:
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    texts = processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer(model: Any, processor: Any, asked: Any) -> dict[str, Any]:
    inputs = inputs_of(processor, asked)
    written = processor.apply_chat_template(asked, add_generation_prompt=True)
    return {
        "ids": inputs["input_ids"][0].tolist(),
        # As servers do: the written prompt, images still one token each.
        "server_ids": processor.tokenizer(written, add_special_tokens=False).input_ids,
        "pixels": sha256(inputs["pixel_values"].numpy().tobytes()).hexdigest(),
        "text": generated(model, processor, inputs)[0],
    }


def answers_together(model: Any, processor: Any, conversations: Any) -> list[str]:
    inputs = inputs_of(processor, conversations, processor_kwargs={"padding": True})
    return generated(model, processor, inputs)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
