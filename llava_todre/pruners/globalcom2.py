"""GlobalCom2 (arXiv 2501.05179): the thumbnail says how many tokens of a crop stay, and which ones.

Symbols: N tokens of the image, n tokens of one crop, side patches along one side of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from llava_todre.pruners.base import About, Pruner, option, round_half_up, top
from llava_todre.pruners.per_view import apportion, by_view
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Pruner):
    """Rank tokens by their [CLS] attention before the softmax, crops with the thumbnail's help.

    A crop gets more tokens the more attention its part of the thumbnail has. Its tokens are ranked
    by their own attention plus that of the thumbnail at the same place. Images without crops and
    videos are ranked view by view, by their own attention alone.
    """

    about: ClassVar[About] = About(
        paper="GlobalCom2, AAAI 2026, arXiv 2501.05179",
        budget_note="k tokens of the image: the thumbnail's by its size, the rest to the crops; "
        "the authors' default is 25 %",
        deviations=(
            "The released code orders the tokens of the thumbnail by score; here all are in "
            "position order.",
            "It puts kept tokens of unpadded crops in wrong places; here they keep their own.",
            "It keeps the newlines of padded rows as well, with no tokens left in them.",
            "It rounds the count of every view down, and so keeps fewer tokens; here the crops "
            "share what the thumbnail leaves, in the same proportions.",
            "Its path for a single view does not run; images without crops, and the frames of a "
            "video, are pruned like the thumbnail.",
        ),
    )
    reads = ("cls_logits",)

    cls_layer: int = option(-1, "Vision layer of the [CLS] attention: -1 is the last, as released.")
    temperature: float = option(
        10.0,
        "Of the softmax that compares the crops' parts of the thumbnail; higher is more even.",
        above=0,
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the best of the thumbnail and of each crop."""
        logits = tokens["cls_logits", self.cls_layer].float()
        if tokens.grid is None:
            kept = [group[top(logits[group], share)] for group, share in by_view(tokens, num_keep)]
            return torch.cat(kept)
        columns, rows = tokens.grid
        thumbnail, *crops = (
            (tokens.view == view).nonzero()[:, 0] for view in range(1 + columns * rows)
        )
        side = math.isqrt(len(thumbnail))
        overview = logits[thumbnail].view(side, side)
        guidance = guidance_of(overview, tokens)
        num_thumbnail = round_half_up(num_keep * len(thumbnail) / len(tokens))
        ratios = crop_ratios(overview, tokens.grid, num_keep / len(tokens), self.temperature)
        sizes = [len(crop) for crop in crops]
        weights = [size * ratio for size, ratio in zip(sizes, ratios, strict=True)]
        shares = apportion(num_keep - num_thumbnail, weights, sizes)
        kept = [thumbnail[top(logits[thumbnail], num_thumbnail)]]
        for crop, share in zip(crops, shares, strict=True):
            score = normalize(logits[crop], dim=0) + normalize(guidance[crop], dim=0)
            kept.append(crop[top(score, share)])
        return torch.cat(kept)


def crop_ratios(
    overview: Tensor, grid: tuple[int, int], ratio: float, temperature: float
) -> list[float]:
    """Return the share of each crop's tokens to keep, before the count is made exact.

    Args:
        overview: (side, side) attention of the thumbnail.
        grid: (columns, rows) of the crops, and of the thumbnail's cells, the last of which take
            what the division leaves over.
        ratio: share of all tokens to keep.
        temperature: of the softmax over the sums of the cells.
    """
    side = len(overview)
    across, down = ([side // n] * (n - 1) + [side - side // n * (n - 1)] for n in grid)
    cells = [
        cell.sum() for band in torch.split(overview, down) for cell in torch.split(band, across, 1)
    ]
    weight = (torch.stack(cells) / temperature).softmax(dim=0)
    return [min(1.0, ratio * (1 + excess)) for excess in (weight - weight.mean()).tolist()]


def guidance_of(overview: Tensor, tokens: VisualTokens) -> Tensor:
    """Return (N,) the attention of the thumbnail at the place of each token of a crop.

    ``overview`` (side, side) is stretched over the canvas of crops without its padding, of which
    nothing may be left for a very long image. The thumbnail's own tokens get 0.
    """
    assert tokens.grid is not None
    side, columns = len(overview), tokens.grid[0]
    guidance = overview.new_zeros(len(tokens))
    in_crop = tokens.view > 0
    if not in_crop.any():
        return guidance
    crop = tokens.view[in_crop] - 1
    row = crop // columns * side + tokens.row[in_crop]
    column = crop % columns * side + tokens.column[in_crop]
    row, column = row - row.min(), column - column.min()
    size = int(row.max()) + 1, int(column.max()) + 1
    canvas = interpolate(overview[None, None], size, mode="bilinear", align_corners=False)
    guidance[in_crop] = canvas[0, 0, row, column]
    return guidance
