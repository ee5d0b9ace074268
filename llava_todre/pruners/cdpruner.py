"""CDPruner (arXiv 2506.10967): the most diverse subset, with diversity weighted by relevance.

Symbols: N tokens of the image, n tokens of one view, D width of the decoder, M chunks or words of
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Needs, Pruner, option, top
from llava_todre.pruners.per_view import by_view
from llava_todre.selection import unit_rows
from llava_todre.spans import VisualTokens

Relevance = Literal["clip", "text_embeds", "none"]

# A token of which no more than this share lies outside the span of those kept adds only rounding.
SPANNED = 1e-5


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Greedy MAP inference of a determinantal point process (DPP), view by view or frame by frame.

    The kernel is ``L = diag(r) S diag(r)``: ``S`` the cosine of the projected features, ``r`` the
    relevance of a token to the question, scaled to [0, 1] over the whole image. The greedy rule
    keeps the tokens whose submatrix of ``L`` has the largest determinant.
    """

    about: ClassVar[About] = About(
        paper="CDPruner, NeurIPS 2025, arXiv 2506.10967",
        budget_note="k tokens of the image, shared among its views in proportion to their size",
        deviations=(
            "The default relevance comes from the decoder's own text embeddings, not negated; the "
            "authors' needs the text tower of CLIP and is the option relevance=clip.",
            "Once no token adds to the determinant, the released code returns fewer tokens than "
            "requested; here the most relevant of the rest make up the number.",
            "The released code never unpads and gives every view the same number.",
            "Relevance is scaled to [0, 1] within each image, not over the whole batch.",
            "With relevance=clip, each chunk of a question too long for CLIP has its own marks of "
            "beginning and end; the released code cuts every 77 tokens.",
            "Videos are pruned frame by frame.",
        ),
    )

    relevance: Relevance = option(
        "text_embeds",
        "Relevance by `text_embeds` (mean cosine with the words after the image, as the decoder "
        "embeds them), `clip` (minus the mean cosine in CLIP's space, the released rule), or "
        "`none` (all tokens equal, a plain DPP).",
        choices=get_args(Relevance),
    )

    @property
    def needs(self) -> Needs:
        """What the relevance is read from."""
        sources = {"clip": "clip_similarity", "text_embeds": "text_embeds"}
        return {sources[self.relevance]} if self.relevance in sources else set()

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep a relevant and diverse set of each view."""
        rows = unit_rows(tokens.features)  # (N, D)
        relevance = self.relevance_of(tokens, rows)
        kept = []
        for group, share in by_view(tokens, num_keep):
            similarity = rows[group] @ rows[group].T  # (n, n)
            similarity.diagonal().round_()  # 1, or 0 for a token of zeros: ties are ties
            weight = relevance[group]
            picked = greedy_map(weight[:, None] * similarity * weight, share)
            others = weight.index_fill(0, picked, -torch.inf)
            kept += [group[picked], group[top(others, share - len(picked))]]
        return torch.cat(kept)

    def relevance_of(self, tokens: VisualTokens, rows: Tensor) -> Tensor:
        """Return (N,) relevance, scaled to [0, 1]; all ones where every token has the same.

        CLIP's is negated, as released: its patches are least similar to the text that describes
        them. This is not known of the decoder's embeddings. ``rows`` (N, D) are unit vectors.
        """
        if self.relevance == "clip":
            similarity, sign = tokens["clip_similarity"].float(), -1.0  # (N, M)
        elif self.relevance == "text_embeds":
            similarity, sign = rows @ unit_rows(tokens["text_embeds"]).T, 1.0  # (N, M)
        else:
            return rows.new_ones(len(rows))
        raw = sign * similarity.mean(dim=1)
        spread = raw.max() - raw.min()
        scaled = (raw - raw.min() + 1e-6) / spread  # the least relevant token stays above zero
        return torch.where(spread > 0, scaled, 1.0)  # 0: all alike; NaN: there is no text


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Return up to ``count`` indices that greedily maximise ``det(kernel[picked][:, picked])``.

    The determinant grows by the factor ``gain``, what is left of a token's diagonal entry after
    projecting out those picked. Incremental Cholesky keeps it up to date: O(count^2 n). Fewer come
    back when the numerical rank of ``kernel`` (n, n) is reached.
    """
    gain = kernel.diagonal()  # (n,)
    floor = SPANNED * gain
    factor = torch.zeros(count, len(kernel), device=kernel.device)  # (count, n)
    picked = torch.empty(count, dtype=torch.int64, device=kernel.device)
    gains = torch.empty(count, device=kernel.device)
    for step in range(count):
        newest = gain.argmax().view(1)  # a (1,) tensor: no device synchronisation inside the loop
        picked[step], gains[step] = newest[0], gain[newest][0]
        known = factor[:step, newest][:, 0] @ factor[:step]
        factor[step] = (kernel[newest][0] - known) / gain[newest].sqrt()
        gain = gain - factor[step].square()
        # Picked and spanned tokens are out, whatever rounding leaves of their gain.
        gain = torch.where(gain > floor, gain, 0.0).index_fill(0, newest, 0.0)
    return picked[gains > 0]
