"""How the tokens of one image or video lie in a prompt, whatever the model family.

Symbols: S tokens in the prompt, N patch tokens among them, C patches of the tower under one token,
    K kept patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava_todre.spans import NewlineRule, with_newlines
from llava_todre.stage1.anyres import NEWLINE, Size
from llava_todre.stats import ImageStats


@dataclass(frozen=True, eq=False)
class Layout:
    """One image or video; all tensors are on the CPU."""

    is_newline: Tensor
    """(S,) bool, tokens that only end a row."""
    row_id: Tensor
    """(S,) int64 newline, counted from 0, of the row a token is in; a newline's own; or -1."""
    view: Tensor
    """(N,) int64, 0 being the thumbnail, the only view, or the first frame."""
    row: Tensor
    """(N,) int64 in the view."""
    column: Tensor
    """(N,) int64 in the view."""
    sources: Tensor
    """(N, C) int64 patches of the tower that a token is made of, counted within this image."""
    num_patches: int
    """Patches that the tower computes for this image, padding included."""
    side: int
    """Tokens in a row of a view; where views are not square, in the longer of row and column."""
    is_video: bool = False
    grid: Size | None = None
    """(columns, rows) of the crops, if any."""
    weights: Tensor | None = None
    """(N, C) share of each of ``sources`` in a token; equal ones by default."""

    def __len__(self) -> int:
        return len(self.is_newline)

    @classmethod
    def of_slots(
        cls,
        slots: Tensor,
        num_views: int,
        side: int,
        is_video: bool = False,
        grid: Size | None = None,
    ) -> Layout:
        """Return the layout of square views of ``side`` x ``side`` tokens, one patch each.

        Args:
            slots: (S,) as :func:`llava_todre.stage1.anyres.merge_slots` returns it.
            num_views: V.
            side: tokens per row and column of a view.
            is_video: whether the views are frames.
            grid: (columns, rows) of the crops, if any.
        """
        is_newline = slots == NEWLINE
        patches = slots[~is_newline]
        row_id = is_newline.cumsum(0) - is_newline.long()
        unended = row_id >= int(is_newline.sum())
        of_thumbnail = torch.zeros_like(is_newline)
        if num_views > 1 and not is_video:
            of_thumbnail[~is_newline] = patches < side**2
        return cls(
            is_newline=is_newline,
            row_id=row_id.masked_fill(unended | of_thumbnail, -1),
            view=patches // side**2,
            row=patches % side**2 // side,
            column=patches % side,
            sources=patches[:, None],
            num_patches=num_views * side**2,
            side=side,
            is_video=is_video,
            grid=grid if num_views > 1 else None,
        )

    @classmethod
    def of_views(
        cls, views: Tensor, rows: int, columns: int, sources: Tensor, is_video: bool = False
    ) -> Layout:
        """Return the layout of whole views of ``rows`` x ``columns`` tokens, without newlines.

        Args:
            views: (V,) int64 what number each view has, in the order in which they stand.
            rows: tokens per column of a view.
            columns: tokens per row of a view.
            sources: (V * rows * columns, C) patches of the tower under each token.
            is_video: whether the views are frames.
        """
        patch = torch.arange(rows * columns).repeat(len(views))
        return cls(
            is_newline=torch.zeros(len(patch), dtype=torch.bool),
            row_id=torch.full_like(patch, -1),
            view=views.repeat_interleave(rows * columns),
            row=patch // columns,
            column=patch % columns,
            sources=sources,
            num_patches=sources.numel(),
            side=max(rows, columns),
            is_video=is_video,
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.view)

    @cached_property
    def patches(self) -> Tensor:
        """(N,) int64 places of the patch tokens, see :class:`~llava_todre.stats.ImageStats`."""
        return self.view * self.side**2 + self.row * self.side + self.column

    def gather(self, values: Tensor) -> Tensor:
        """Return (N, ...) for (patches of the tower, ...): the mean over the patches of a token."""
        sources = self.sources.to(values.device)
        if sources.shape[1] == 1:
            return values[sources[:, 0]]
        under = values[sources]  # (N, C, ...)
        if self.weights is None:
            return under.mean(dim=1)
        return torch.einsum("nc,nc...->n...", self.weights.to(under), under)

    def keep(self, kept: Tensor, newlines: NewlineRule = "row") -> Tensor:
        """Return (S,) bool, the tokens that stay when the ``kept`` (K,) patch tokens do.

        Args:
            kept: indices of patch tokens.
            newlines: see :func:`llava_todre.spans.with_newlines`.
        """
        is_patch = ~self.is_newline
        keep = torch.zeros_like(is_patch)
        keep[is_patch.nonzero()[kept, 0]] = True
        return with_newlines(keep, is_patch, self.is_newline, self.row_id, newlines)

    def stats(self, kept: Tensor | None = None) -> ImageStats:
        """Return the statistics of the image with ``kept`` (K,) patch tokens; all by default."""
        kept = torch.arange(self.num_tokens) if kept is None else kept
        return ImageStats(self.patches, self.side, kept, int(self.is_newline.sum()))
