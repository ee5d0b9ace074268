"""The projector has the layers that its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_todre.errors import TodreError
from llava_todre.model.projector import build_projector


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("linear", [nn.Linear]),
        ("mlp1x_gelu", [nn.Linear]),
        ("mlp2x_gelu", [nn.Linear, nn.GELU, nn.Linear]),
        ("mlp3x_gelu", [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]),
    ],
)
def test_projectors_have_the_layers_their_names_tell(kind, layers):
    projector = build_projector(kind, 6, 10)
    found = list(projector) if isinstance(projector, nn.Sequential) else [projector]
    assert [type(layer) for layer in found] == layers
    assert projector(torch.zeros(3, 6)).shape == (3, 10)


def test_identity_changes_nothing_and_other_names_are_errors():
    assert torch.equal(build_projector("identity", 6, 6)(torch.ones(2, 6)), torch.ones(2, 6))
    for kind in ("mlp2x_relu", "mlp0x_gelu", "resampler"):
        with pytest.raises(TodreError, match=f"mm_projector_type must be linear, .* got '{kind}'"):
            build_projector(kind, 6, 10)
