"""The two kinds of models that can be asked: our class, and the stock classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.generate import Answer, Memory, Request, answer, prepare
from llava_todre.hf.load import load_stock_model, uses_stock
from llava_todre.hf.stock import StockModel
from llava_todre.model.chat_template import find_template, known_name
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model


class OurBackend:
    """Our class."""

    def __init__(self, model: LlavaLlamaForCausalLM, tokenizer: Any, template: str) -> None:
        """Take the model with what it needs to read and write."""
        self.model, self.tokenizer = model, tokenizer
        self.template = known_name(find_template(template, model, tokenizer))

    def prepare(self, request: Request) -> Request:
        """Return the request with its pictures made into views."""
        return prepare(self.model, request)

    def answer(
        self, requests: Sequence[Request], memory: Memory | None, settings: Mapping[str, Any]
    ) -> list[Answer]:
        """Answer a batch."""
        return answer(
            self.model,
            self.tokenizer,
            requests,
            template=self.template,
            memory=memory,
            **settings,
        )

    def parts(self) -> tuple[Any, Any, Any]:
        """Return model, tokenizer and processor: what answers depend on."""
        return self.model, self.tokenizer, self.model.get_vision_tower().image_processor


class StockBackend:
    """A model of transformers with its own processor and chat template."""

    template = "that of the processor"

    def __init__(self, model: StockModel) -> None:
        """Take the model."""
        self.model = model

    def prepare(self, request: Request) -> Request:
        """Return the request as it is: the processor takes pictures."""
        return request

    def answer(
        self, requests: Sequence[Request], memory: Memory | None, settings: Mapping[str, Any]
    ) -> list[Answer]:
        """Answer a batch; every image is read anew."""
        del memory
        return self.model.answer(requests, **settings)

    def parts(self) -> tuple[Any, Any, Any]:
        """Return model, tokenizer and processor: what answers depend on."""
        processor = self.model.processor
        return self.model.model, processor.tokenizer, processor


def load_backend(
    name: str,
    pretrained: str,
    *,
    template: str,
    protocol: str,
    clip_text: str | None,
    **loading: Any,
) -> OurBackend | StockBackend:
    """Load a model.

    Args:
        name: llava, transformers, or auto: ours for LLaVA-1.5 and LLaVA-NeXT on Llama or Mistral.
        pretrained: folder or hub id.
        template: conversation template, of our class; auto is the checkpoint's own.
        protocol: native or paper, of our class.
        clip_text: CLIP with the text tower, for our class.
        loading: what both loaders take; ``tp_plan`` is for our class.

    Raises:
        TodreError: an unknown name, an option of the other kind, or a checkpoint that is not one.
    """
    if not uses_stock(name, pretrained, loading["revision"], loading.get("model_base")):
        tokenizer, model, _, _ = load_pretrained_model(pretrained, protocol=protocol, **loading)
        if clip_text is not None:
            model.load_clip_text(clip_text)
        return OurBackend(model, tokenizer, template)
    ours = {"protocol": protocol if protocol != "native" else None, "clip_text": clip_text}
    ours["tp_plan"] = loading.pop("tp_plan", None)
    for key, value in ours.items():
        if value is not None:
            raise TodreError(
                f"{key} {value!r} is an option of our own class, which is not used for "
                f"{pretrained!r}; leave it out."
            )
    return StockBackend(load_stock_model(pretrained, **loading))
