"""What Stage 1 keeps of each image, for all images of a batch.

Symbols: S tokens of one image in the prompt, N patch tokens among them, K kept ones, V views,
    D decoder width, W width of the tower, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_todre.errors import TodreError, unknown
from llava_todre.pruners import NEEDS, VISION_NEEDS, Keep, Need, Pruner
from llava_todre.spans import VisualTokens
from llava_todre.stage1.layout import Layout
from llava_todre.stats import ImageStats

PerImage = Sequence[Tensor | None] | None
"""What a method reads of the question about each image; None where it reads none."""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """One image or video before Stage 1; can serve many questions."""

    features: Tensor
    """(N, D) patch tokens after the projector."""
    layout: Layout
    newline: Tensor | None = None
    """(D,) the newline embedding, for layouts that have newlines."""
    needs: frozenset[Need] = frozenset()
    """What of the fields below was computed for methods; they are those of ``VisualTokens``."""
    vision: Mapping[tuple[str, int | float], Tensor] = field(default_factory=dict)
    vision_features: Tensor | None = None
    cls_features: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    resized: Callable[[int, int], Tensor] | None = None
    latest: list[tuple[Pruner, PrunedImage]] = field(default_factory=list, repr=False)
    """The last result that did not depend on a question, and the method; the next call may want
    the same."""

    def tokens(
        self, text_embeds: Tensor | None = None, clip_similarity: Tensor | None = None
    ) -> VisualTokens:
        """Return what a method selects from."""
        device, layout = self.features.device, self.layout
        places = torch.stack([layout.view, layout.row, layout.column]).to(device)
        return VisualTokens(
            features=self.features,
            view=places[0],
            row=places[1],
            column=places[2],
            is_video=layout.is_video,
            grid=layout.grid,
            vision=self.vision,
            vision_features=self.vision_features,
            cls_features=self.cls_features,
            project=self.project,
            resized=self.resized,
            text_embeds=None if text_embeds is None else text_embeds.to(device),
            clip_similarity=None if clip_similarity is None else clip_similarity.to(device),
        )

    def keep(self, selection: Keep, pruner: Pruner) -> PrunedImage:
        """Return what is left: the selected tokens and the newlines that stay with them."""
        kept = selection.indices
        stays = self.layout.keep(kept, pruner.newlines)
        embeds = selection.features
        if embeds is None:
            whole = len(kept) == len(self.features)
            embeds = self.features if whole else self.features[kept.to(self.features.device)]
        is_newline = self.layout.is_newline[stays]
        if bool(is_newline.any()):
            assert self.newline is not None, "a layout with newlines has their embedding"
            newline = self.newline.to(embeds)[None]
            rows = embeds.tensor_split((~is_newline).cumsum(0)[is_newline].tolist())
            embeds = torch.cat([each for row in rows for each in (row, newline)][:-1])
        return PrunedImage(embeds, self.layout, stays, self.layout.stats(kept))


@dataclass(frozen=True, eq=False)
class PrunedImage:
    """What the decoder reads of one image or video."""

    embeds: Tensor
    """(K + newlines, D)."""
    layout: Layout
    """Of the whole image."""
    stays: Tensor
    """(S,) bool, which tokens of the layout ``embeds`` holds; on the CPU."""
    stats: ImageStats


def require_needs(pruner: Pruner, given: Collection[str], models: str) -> None:
    """Raise a TodreError unless models compute all that a method needs.

    Args:
        pruner: the method.
        given: names of what they compute, whatever the layer.
        models: what the message calls them.
    """
    method = type(pruner).__name__
    for need in pruner.needs:
        name, known = (need[0], VISION_NEEDS) if isinstance(need, tuple) else (need, NEEDS)
        if name not in known:
            raise unknown(f"needs of {method}:", name, known)
        if name not in given:
            raise TodreError(
                f"{method} needs {name}, which {models} do not give; "
                f"allowed needs: {', '.join(sorted(given))}."
            )


def prune_images(
    images: Sequence[ImageFeatures],
    pruner: Pruner,
    texts: PerImage = None,
    similarities: PerImage = None,
) -> list[PrunedImage]:
    """Stage 1: let a method select from all images of a batch, in one call.

    Where the method does not read the question, an image that comes several times is selected from
    once, and the result serves later calls with an equal method.

    Args:
        images: the images and videos of all prompts.
        pruner: the method; called for those that are above its budget.
        texts: (T, D) embeddings of the question about each image.
        similarities: (N, M) ``clip_similarity`` of each image with its question.

    Raises:
        TodreError: an image was encoded without something the method needs.
    """
    trains = torch.is_grad_enabled() and any(image.features.requires_grad for image in images)
    if texts is not None or similarities is not None or trains:
        return _pruned(images, pruner, texts, similarities)
    new = {
        id(image): image for image in images if all(known != pruner for known, _ in image.latest)
    }
    for image, result in zip(new.values(), _pruned(list(new.values()), pruner), strict=True):
        image.latest[:] = [(pruner, result)]
    return [image.latest[0][1] for image in images]


def _pruned(
    images: Sequence[ImageFeatures],
    pruner: Pruner,
    texts: PerImage = None,
    similarities: PerImage = None,
) -> list[PrunedImage]:
    above = [i for i, image in enumerate(images) if pruner.will_select(image.layout.num_tokens)]
    for index in above:
        missing = pruner.needs - images[index].needs - {"text_embeds"}
        if missing:
            raise TodreError(
                f"images were encoded without {sorted(map(str, missing))} that "
                f"{type(pruner).__name__} needs; set the pruner first, then encode."
            )
    texts, similarities = (each or [None] * len(images) for each in (texts, similarities))
    with torch.no_grad():  # what is selected has no gradient; neither have merged features
        tokens = [images[index].tokens(texts[index], similarities[index]) for index in above]
        selected = dict(zip(above, pruner.keep(tokens), strict=True))
    return [
        image.keep(selected.get(index) or Keep(torch.arange(image.layout.num_tokens)), pruner)
        for index, image in enumerate(images)
    ]
