"""Lets PyPI's torchvision be imported beside a CPU build of torch (a plugin of pytest).

Its compiled operators are for CUDA builds and do not load there; importing it then fails where it
describes them. Processors of images and videos use none of them: that they exist is enough.
"""

from __future__ import annotations

import torch

_NAMES = (
    *("nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "roi_pool"),
    *("_roi_pool_backward", "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool"),
    "_ps_roi_pool_backward",
)


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _NAMES:
        library.define(f"{name}() -> ()")
    return library


try:
    import torchvision  # noqa: F401
except RuntimeError:
    KEPT = _declare()  # lives as long as the process
    import torchvision  # noqa: F401
