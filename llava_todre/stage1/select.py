"""From projected views to the visual tokens of a prompt: merging, Stage 1, newline tokens.

Symbols: V views of one image, P patches per view, R x R = P, D decoder width, N merged patch
    tokens, S merged slots
(N patch tokens and the newline tokens between them).

Merging only ever re-orders tokens, drops padding and inserts newlines, so it is written once as a
list of indices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.model.images import Size, unpad_bounds
from llava_todre.pruners import Keep, Need, Pruner
from llava_todre.spans import VisualTokens
from llava_todre.stats import ImageStats

NEWLINE = -1
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def build_projector(kind: str, vision_width: int, width: int) -> nn.Module:
    """Return the vision-to-language projector named by ``mm_projector_type``.

    Args:
        kind: ``"linear"``, ``"mlpNx_gelu"`` (N linear layers with GELU between) or ``"identity"``.
        vision_width: features per patch.
        width: D.
    """
    if kind == "linear":
        return nn.Linear(vision_width, width)
    if kind == "identity":
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if match is None:
        raise TodreError(
            f"mm_projector_type {kind!r} is not supported; "
            "allowed: linear, mlp2x_gelu (any depth), identity."
        )
    layers: list[nn.Module] = [nn.Linear(vision_width, width)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


def whole_rows(key: str, rows: Any, width: int) -> list[Any]:
    """Return sizes as tuples of whole numbers; None stays, for what has no size.

    Args:
        key: what the user set, for messages.
        rows: a list of them, or a tensor.
        width: numbers of each.

    Raises:
        TodreError: anything else.
    """

    def numbers(row: Any) -> tuple[int, ...] | None:
        if row is None:
            return None
        found = tuple(map(int, row))
        # A string does not equal its number.
        if found != tuple(row) or len(found) != width or min(found) < 1:
            raise ValueError
        return found

    try:
        return list(map(numbers, rows.tolist() if hasattr(rows, "tolist") else rows))
    except (TypeError, ValueError, OverflowError):
        raise TodreError(
            f"{key} {rows!r} is not usable; allowed: {width} whole numbers above 0 for each image."
        ) from None


def merge_slots(
    num_views: int, side: int, grid: tuple[int, int] | None, size: Size | None, merge_type: str
) -> Tensor:
    """Return which patch stands where in the visual part of a prompt.

    Args:
        num_views: V.
        side: R, patches per row of a view.
        grid: (columns, rows) of crops on the canvas; None for a video or an image without crops.
        size: (width, height) of the image in pixels, needed for unpadding.
        merge_type: ``flat`` (views one after the other), ``spatial`` (thumbnail, then the canvas
            row by row) or ``spatial_unpad`` (the same without padding, and a newline token after
            every row).

    Returns:
        (S,) int64: index into the V * P patches, or :data:`NEWLINE`.
    """
    if merge_type not in MERGE_TYPES:
        raise TodreError(
            f"mm_patch_merge_type {merge_type!r} is not supported; "
            f"allowed: {', '.join(MERGE_TYPES)}."
        )
    patches = torch.arange(num_views * side * side)
    if merge_type == "flat" or grid is None:
        return patches
    newline = torch.tensor([NEWLINE])
    if num_views == 1:
        return torch.cat([patches, newline]) if merge_type == "spatial_unpad" else patches
    columns, rows = grid
    if columns * rows != num_views - 1:
        raise TodreError(
            f"image of {num_views} views does not fit its grid: "
            f"{columns} x {rows} crops and a thumbnail."
        )
    thumbnail, crops = patches[: side * side], patches[side * side :]
    canvas = (
        crops.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    )
    if merge_type == "spatial_unpad":
        assert size is not None, "unpadding needs the size of the image"
        top, bottom, left, right = unpad_bounds((rows * side, columns * side), size)
        canvas = canvas[top:bottom, left:right]
        canvas = torch.cat([canvas, newline.expand(len(canvas), 1)], dim=1)
    return torch.cat([thumbnail, canvas.flatten()])


@dataclass(frozen=True)
class ImageFeatures:
    """One image or video after the projector, before Stage 1; can serve many questions."""

    projected: Tensor
    """(V * P, D)."""
    slots: Tensor
    """(S,) int64 from :func:`merge_slots`, on the CPU."""
    side: int
    """R."""
    is_video: bool
    grid: Size | None = None
    """(columns, rows) of the crops, if any."""
    needs: frozenset[Need] = frozenset()
    """What methods may ask about below; the fields are those of ``VisualTokens``, with V * P in
    place of N."""
    vision: Mapping[tuple[str, int | float], Tensor] = field(default_factory=dict)
    vision_features: Tensor | None = None
    cls_features: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    resized: Callable[[int, int], Tensor] | None = None
    latest: list[tuple[Pruner, PrunedImage]] = field(default_factory=list, repr=False)
    """The last selection, if it did not depend on the question: the next may be the same."""

    @cached_property
    def patches(self) -> Tensor:
        """(N,) index of each merged patch token into the V * P patches."""
        return self.slots[self.slots != NEWLINE]

    @cached_property
    def row_id(self) -> Tensor:
        """(N,) newline token, counted from 0, that ends the row of each patch token; or -1."""
        is_patch = self.slots != NEWLINE
        line = (~is_patch).cumsum(0)[is_patch]
        has_newline = line < int((~is_patch).sum())
        thumbnail = (self.patches < self.side**2) & (len(self.projected) > self.side**2)
        return line.masked_fill(~has_newline | thumbnail, -1)

    def tokens(
        self, text_embeds: Tensor | None, clip_similarity: Tensor | None = None
    ) -> VisualTokens:
        """Return what a method selects from."""
        device = self.projected.device
        patches = self.patches.to(device)
        patch = patches % self.side**2
        before = self.vision_features
        return VisualTokens(
            features=self.projected[patches],
            view=patches // self.side**2,
            row=patch // self.side,
            column=patch % self.side,
            is_video=self.is_video,
            grid=self.grid if len(self.projected) > self.side**2 else None,
            vision={need: value[patches] for need, value in self.vision.items()},
            vision_features=None if before is None else before[patches],
            cls_features=self.cls_features,
            project=self.project,
            resized=self.resized,
            text_embeds=None if text_embeds is None else text_embeds.to(device),
            clip_similarity=(
                None if clip_similarity is None else clip_similarity.to(device)[patches]
            ),
        )


@dataclass(frozen=True)
class PrunedImage:
    """What the decoder gets to see of one image or video."""

    embeds: Tensor
    """(K + newlines, D)."""
    is_newline: Tensor
    """(K + newlines,) bool, on the CPU."""
    row_id: Tensor
    """(K + newlines,) int64 newline, counted from 0, of the row a token is in; or -1. CPU."""
    stats: ImageStats

    @property
    def num_newlines(self) -> int:
        """Newline tokens among ``embeds``."""
        return int(self.is_newline.sum())


def needs_selection(pruner: Pruner, slots: Sequence[Tensor]) -> bool:
    """Return whether the method drops any token; if not, nothing it needs is computed."""
    sizes = [int((image != NEWLINE).sum()) for image in slots]
    return any(pruner.will_select(size) for size in sizes)


def prune(
    visual: ImageFeatures,
    pruner: Pruner,
    newline: Tensor | None,
    text_embeds: Tensor | None,
    clip_similarity: Tensor | None = None,
) -> PrunedImage:
    """Stage 1: let the method select, then put newline tokens back after rows that kept a token.

    Args:
        visual: the encoded image or video; remembers the result when the question had no say.
        pruner: the method; asked only when its budget is below the number of tokens.
        newline: (D,) the newline embedding, for merge types that have one.
        text_embeds: (T, D) for methods that need them.
        clip_similarity: (V * P, M) for methods that need it.
    """
    asked = text_embeds is not None or clip_similarity is not None
    for known, packed in visual.latest:
        if not asked and known == pruner:
            return packed
    packed = _pack(visual, _select(visual, pruner, text_embeds, clip_similarity), newline)
    if not asked:
        visual.latest[:] = [(pruner, packed)]
    return packed


def prune_ahead(visuals: Sequence[ImageFeatures], pruner: Pruner, newline: Tensor | None) -> None:
    """Let a method that does not read the question select from all images at the same time.

    Args:
        visuals: :func:`prune` finds the results in them.
        pruner: the method.
        newline: see :func:`prune`.
    """
    new = {
        id(visual): visual
        for visual in visuals
        if pruner.will_select(len(visual.patches))
        and all(known != pruner for known, _ in visual.latest)
        and not pruner.needs - visual.needs
    }
    with torch.no_grad():
        tokens = [visual.tokens(None) for visual in new.values()]
        selections = pruner.keep(tokens)
    for visual, selection in zip(new.values(), selections, strict=True):
        visual.latest[:] = [(pruner, _pack(visual, selection, newline))]


def _select(
    visual: ImageFeatures,
    pruner: Pruner,
    text_embeds: Tensor | None,
    clip_similarity: Tensor | None,
) -> Keep:
    num_tokens = len(visual.patches)
    if not pruner.will_select(num_tokens):
        return Keep(torch.arange(num_tokens))
    missing = pruner.needs - visual.needs - {"text_embeds"}
    if missing:
        raise TodreError(
            f"images were encoded without {sorted(map(str, missing))} that "
            f"{type(pruner).__name__} needs; set the pruner first, then encode."
        )
    with torch.no_grad():  # what is kept has no gradient; neither have merged features
        return pruner.keep([visual.tokens(text_embeds, clip_similarity)])[0]


def _pack(visual: ImageFeatures, selection: Keep, newline: Tensor | None) -> PrunedImage:
    """Gather the kept tokens and the newlines of their rows; all bookkeeping is on the CPU."""
    keep_idx = selection.indices
    kept = torch.zeros(len(visual.patches), dtype=torch.bool)
    kept[keep_idx] = True
    is_patch = visual.slots != NEWLINE
    line = (~is_patch).cumsum(0) - 1  # of the newlines; the patches know theirs
    line[is_patch] = visual.row_id
    # Unpadding a strip of one pixel leaves rows without patches; unpruned, their newlines stay.
    has_token = torch.full((int((~is_patch).sum()),), len(keep_idx) == len(visual.patches))
    lines = visual.row_id[kept]
    has_token[lines[lines >= 0]] = True
    keep_slot = torch.empty_like(is_patch)
    keep_slot[is_patch], keep_slot[~is_patch] = kept, has_token

    source, rows = visual.projected, visual.patches[keep_idx]
    if selection.features is not None:
        source, rows = selection.features, torch.arange(len(keep_idx))
    chosen = is_patch[keep_slot]
    index = torch.full(chosen.shape, len(source))  # the row behind the last is the newline
    index[chosen] = rows
    if bool(has_token.any()):
        assert newline is not None, "a merge type with newlines has their embedding"
        source = torch.cat([source, newline.to(source)[None]])
    stats = ImageStats(visual.patches, visual.side, keep_idx, len(has_token))
    return PrunedImage(source[index.to(source.device)], ~chosen, line[keep_slot], stats)
