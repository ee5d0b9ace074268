"""VisionZip (arXiv 2412.04467): the tokens [CLS] attends to, and the rest merged into a few.

Symbols: N tokens, n tokens of one view, T tokens it keeps, m not dominant, c contextual, W width of
    the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from llava_todre.pruners.base import About, Keep, Pruner, option, round_half_up, top
from llava_todre.pruners.per_view import by_view
from llava_todre.selection import check_finite, unit_rows
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZip(Pruner):
    """Keep dominant tokens, merge the others into contextual ones, before the projector.

    In each view, or frame, the dominant tokens are [CLS] and the patches it attends to most. Of
    the m patches left every ``floor(m / c)``-th becomes a contextual token; each other one joins
    the contextual token whose key is most similar, which becomes itself plus their mean.
    """

    about: ClassVar[About] = About(
        paper="VisionZip, CVPR 2025, arXiv 2412.04467",
        budget_note="per view T = its share; 27/32 of them dominant, [CLS] included, the rest "
        "contextual (published: 162 + 30, 108 + 20, 54 + 10)",
        deviations=(
            "The release sends [CLS], then patches, then contextual tokens, and with crops the "
            "[CLS] and contextual tokens of all crops last; here all are in position order, a "
            "contextual token in the place of the patch it grew from, [CLS] in the place of the "
            "first patch of its view that is merged away.",
            "The release keeps the padding of crops and drops newline tokens.",
            "The release takes any two counts (191 + 30 by default); here they are a share of T.",
        ),
    )
    reads = ("cls_attention", "keys", "vision_features")

    dominant_ratio: float = option(
        27 / 32,
        "Share of the kept tokens that are dominant, [CLS] included; at least one is.",
        low=0,
        high=1,
    )
    keep_cls: bool = option(
        True, "Whether [CLS] is one of the dominant tokens; otherwise a patch takes its turn."
    )
    cls_layer: int = option(
        -2,
        "Vision layer of the [CLS] attention and of the keys: -2 is what LLaVA reads its features "
        "from.",
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        """Merge view by view, then project what stays."""
        states, cls_states = tokens["vision_features"], tokens["cls_features"]
        check_finite(states)
        attention = tokens["cls_attention", self.cls_layer].float()
        keys = unit_rows(tokens["keys", self.cls_layer].float().mean(dim=1))

        merged = states.clone()  # (N, W)
        kept = []
        for group, share in by_view(tokens, num_keep):
            num_dominant = max(1, round_half_up(share * self.dominant_ratio))
            num_contextual = share - num_dominant
            is_left = torch.ones_like(group, dtype=torch.bool)
            is_left[top(attention[group], num_dominant - self.keep_cls)] = False
            dominant, left = group[~is_left], group[is_left]

            targets, others = left[:0], left
            if num_contextual:
                is_target = torch.zeros_like(left, dtype=torch.bool)
                step = len(left) // num_contextual
                is_target[: num_contextual * step : step] = True
                targets, others = left[is_target], left[~is_target]
                joined = (keys[others] @ keys[targets].T).argmax(dim=1)
                member = one_hot(joined, num_contextual).T.float()  # (c, m - c)
                size = member.sum(dim=1, keepdim=True).clamp_min(1)
                means = member @ states[others].float() / size
                merged[targets] = (states[targets].float() + means).to(states.dtype)

            kept += [dominant, targets]
            if self.keep_cls:
                merged[others[0]] = cls_states[tokens.view[group[0]]]
                kept.append(others[:1])
        indices = torch.cat(kept).sort().values
        return Keep(indices, tokens["project"](merged[indices]))
