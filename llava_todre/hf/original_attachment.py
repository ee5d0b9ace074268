"""One method on a model of the original ``llava`` package.

Its prompts hold one placeholder per image, and its ``generate`` lets
``prepare_inputs_labels_for_multimodal`` make embeddings of them. That is done ahead here, the
embeddings are pruned, and ``generate`` is handed what is left.

Symbols: B batch, T prompt length with one placeholder per image, L with all visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.hf.attachment import MANY, Attachment, Read
from llava_todre.hf.capture import DecoderInputs, Need, measuring
from llava_todre.hf.encoded import EncodedImage
from llava_todre.hf.prompts import Visual
from llava_todre.model.prompt import IMAGE_TOKEN_INDEX
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.pack import expand, padded
from llava_todre.stage2.cache import CACHE_ARGUMENT

_PREPARE = "prepare_inputs_labels_for_multimodal"


class OriginalAttachment(Attachment):
    """A method that is active on a model of the original package."""

    def encode(self, **inputs: Any) -> list[EncodedImage]:
        """Raise a TodreError: prompts of the original package have no place for each token."""
        raise TodreError("model must be of transformers to encode images, got one of llava.")

    def _real(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return (B, T) bool: without a mask, the original takes everything for real."""
        if kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(ids)}
        return super()._real(ids, kwargs)

    def _selects(self, ids: Tensor) -> bool:
        return self.pruner.will_select(MANY)  # placeholders do not say how many tokens there are

    def _read(self, ids: Tensor, real: Tensor, inputs: Mapping[str, Any]) -> Read:
        """Put as many placeholders as an image has tokens, and pad as the original does."""
        layouts = self.family.layouts(self.model, inputs)["image"]
        side = getattr(self.model.config, "tokenizer_padding_side", "right")
        return expanded(ids, real, layouts, side)

    def _captured(
        self, given: Mapping[str, Any], needs: Sequence[Need], length: int
    ) -> DecoderInputs:
        with measuring(self.family, self.model, needs) as measured:
            prepared = getattr(self.model, _PREPARE)(
                given["input_ids"],
                None,
                given["attention_mask"],
                None,
                None,
                given["images"],
                image_sizes=given.get("image_sizes"),
            )
        embeds = prepared[4]
        if embeds.shape[1] != length:
            raise TodreError(
                f"prompts must have {length} tokens, as with llava-torch 1.2.2 and within "
                f"tokenizer_model_max_length, got {embeds.shape[1]}."
            )
        return DecoderInputs(embeds, None, None, None, measured)

    def _call(
        self, given: Mapping[str, Any], short: dict[str, Any], settings: dict[str, Any]
    ) -> Any:
        """Let the original's ``generate`` find the pruned prompts prepared."""
        own = vars(self.model).get(_PREPARE)

        def restore() -> None:
            self.model.__dict__.pop(_PREPARE, None)
            if own is not None:
                self.model.__dict__[_PREPARE] = own

        def prepared(*_: Any, **__: Any) -> tuple[Any, ...]:
            restore()  # steps after the prompt are prepared as ever
            return None, None, short["attention_mask"], None, short["inputs_embeds"], None

        if CACHE_ARGUMENT in short:
            settings[CACHE_ARGUMENT] = short[CACHE_ARGUMENT]
        self.model.__dict__[_PREPARE] = prepared
        try:
            return self.own(given["input_ids"], images=given["images"], **settings)
        finally:
            restore()


def expanded(ids: Tensor, real: Tensor, layouts: list[Layout], side: str) -> Read:
    """Return the prompts with a placeholder for every visual token.

    Args:
        ids: (B, T).
        real: (B, T) bool, False for padding.
        layouts: of the images in order of appearance; the original lets a prompt without any image
            use one up.
        side: where the prompts are padded.

    Returns:
        (B, L) ids, (B, L) bool which are not padding, and the images of each sample.
    """
    starts = torch.tensor([0, *(layout.num_patches for layout in layouts)]).cumsum(0).tolist()
    rows, owners, shown, used = [], [], [], 0
    for row, keep in zip(ids.cpu(), real.cpu(), strict=True):
        row = row[keep]
        is_image = row == IMAGE_TOKEN_INDEX
        numbers = range(used, used + int(is_image.sum()))
        used += max(1, len(numbers))
        if numbers and numbers[-1] >= len(layouts):
            raise TodreError(
                f"prompts have {numbers[-1] + 1} or more '<image>' placeholders, but "
                f"{len(layouts)} images were given; they must agree."
            )
        source, image = expand(is_image, [len(layouts[number]) for number in numbers])
        rows.append(row[source])
        owners.append(image)
        shown.append(numbers)
    visuals = [
        [
            Visual(
                layouts[number],
                (of_row == index).nonzero()[:, 0],
                slice(starts[number], starts[number + 1]),
            )
            for index, number in enumerate(numbers)
        ]
        for of_row, numbers in zip(padded(owners, -1, side), shown, strict=True)
    ]
    valid = padded([torch.ones(len(row), dtype=torch.bool) for row in rows], False, side)
    return padded(rows, 0, side).to(ids.device), valid.to(ids.device), visuals
