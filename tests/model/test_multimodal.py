"""Merging views into visual tokens, and packing what Stage 1 keeps, against slow loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Keep, Pruner, Random, Todre, Vanilla
from llava_todre.selection import greedy_diverse_batch
from llava_todre.spans import VisualTokens
from llava_todre.stage1.select import (
    NEWLINE,
    ImageFeatures,
    build_projector,
    merge_slots,
    needs_selection,
    prune,
)

# (columns, rows) of crops and (width, height) of an image on them; odd numbers on purpose.
CANVASES = [
    ((2, 2), (500, 500)),
    ((2, 2), (640, 481)),
    ((2, 2), (333, 640)),
    ((2, 2), (97, 101)),
    ((1, 2), (200, 399)),
    ((2, 1), (399, 200)),
    ((3, 1), (748, 352)),
    ((3, 1), (1000, 77)),
    ((1, 3), (352, 748)),
    ((1, 3), (31, 1023)),
    ((1, 3), (1, 4000)),
    ((3, 1), (4000, 1)),
]
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")

CLS = ("cls_attention", -1)


@dataclass(frozen=True, kw_only=True)
class Fixed(Pruner):
    """Keeps the tokens it is told to, with other features if some are given."""

    indices: tuple[int, ...]
    features: Tensor | None = None

    def num_keep(self, num_tokens: int) -> int:
        return min(num_tokens, len(self.indices))

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        assert num_keep == len(self.indices) < len(tokens)
        return Keep(torch.tensor(self.indices), self.features)


def encoded(
    num_views: int = 5,
    side: int = 4,
    grid: tuple[int, int] | None = (2, 2),
    size: tuple[int, int] | None = (640, 481),
    merge_type: str = "spatial_unpad",
) -> ImageFeatures:
    """Return a random image of some views."""
    generator = torch.Generator().manual_seed(num_views * side)
    projected = torch.randn(num_views * side * side, 8, generator=generator)
    slots = merge_slots(num_views, side, grid, size, merge_type)
    vision = {("cls_attention", -1): torch.arange(len(projected)) / 7}
    needs = frozenset(vision)
    return ImageFeatures(projected, slots, side, grid is None, grid, needs, vision)


def rows_of(visual: ImageFeatures) -> tuple[list[int], list[list[int]], list[int]]:
    """Return the thumbnail's tokens, the tokens of each row with a newline, and the rest."""
    num_thumbnail = visual.side**2 if len(visual.projected) > visual.side**2 else 0
    rows, row, token = [], [], 0
    for slot in visual.slots[num_thumbnail:].tolist():
        if slot == NEWLINE:
            rows.append(row)
            row = []
        else:
            row.append(num_thumbnail + token)
            token += 1
    return list(range(num_thumbnail)), rows, row


def slow_pack(visual: ImageFeatures, keep: set[int], features: Tensor, newline: Tensor) -> Tensor:
    """Return the kept tokens row by row, with a newline after every row that has one left."""
    thumbnail, rows, rest = rows_of(visual)
    embeds = [features[token] for token in thumbnail if token in keep]
    for row in rows:
        kept = [features[token] for token in row if token in keep]
        embeds += [*kept, newline] if kept else []
    return torch.stack(embeds + [features[token] for token in rest if token in keep])


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("side", [4, 5, 24])
@pytest.mark.parametrize(("grid", "size"), CANVASES)
def test_slots_move_features_as_the_original_does(grid, size, side, merge_type, draw):
    views = torch.randn(1 + grid[0] * grid[1], side**2, 6, generator=draw)
    newline = torch.randn(6, generator=draw)
    slots = merge_slots(len(views), side, grid, size, merge_type)
    got = torch.cat([views.flatten(0, 1), newline[None]])[slots]  # NEWLINE is the last row
    assert torch.equal(got, reference.merge_views(views, grid, size, merge_type, newline))


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_one_view_gets_one_newline_on_a_grid_only(grid, merge_type, draw):
    views = torch.randn(1, 16, 6, generator=draw)
    newline = torch.randn(6, generator=draw)
    slots = merge_slots(1, 4, grid, (5, 5), merge_type)
    got = torch.cat([views.flatten(0, 1), newline[None]])[slots]
    assert torch.equal(got, reference.merge_views(views, grid, (5, 5), merge_type, newline))
    assert len(slots) == (17 if grid and merge_type == "spatial_unpad" else 16)


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
def test_frames_of_a_video_follow_each_other(merge_type):
    assert torch.equal(merge_slots(3, 4, None, None, merge_type), torch.arange(48))


@pytest.mark.parametrize(
    ("num_views", "merge_type", "message"),
    [
        (5, "spatial_unpadded", "'spatial_unpadded' is not supported.*flat, spatial, spatial_unp"),
        (4, "spatial", "4 views .* 2 x 2 crops"),
        (6, "spatial_unpad", "6 views .* 2 x 2 crops"),
    ],
)
def test_what_cannot_be_merged_is_named(num_views, merge_type, message):
    with pytest.raises(TodreError, match=message):
        merge_slots(num_views, 4, (2, 2), (500, 500), merge_type)


# ---------------------------------------------------------------- what a method sees


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize(("grid", "size"), CANVASES)
def test_every_token_knows_the_newline_of_its_row(grid, size, merge_type):
    visual = encoded(1 + grid[0] * grid[1], 4, grid, size, merge_type)
    thumbnail, rows, rest = rows_of(visual)
    expected = [-1] * len(thumbnail)
    for number, row in enumerate(rows):
        expected += [number] * len(row)
    assert visual.row_id.tolist() == expected + [-1] * len(rest)


def test_tokens_of_one_view_share_its_newline():
    assert encoded(1, 4).row_id.tolist() == [0] * 16
    assert encoded(1, 4, grid=None).row_id.tolist() == [-1] * 16


def test_tokens_know_their_place():
    visual = encoded(grid=(2, 2), size=(640, 481))
    tokens = visual.tokens(None)
    assert len(tokens) == (visual.slots != NEWLINE).sum() == 16 + 6 * 8
    token = 0
    for slot in visual.slots.tolist():
        if slot == NEWLINE:
            continue
        place = (int(tokens.view[token]), int(tokens.row[token]), int(tokens.column[token]))
        assert place == (slot // 16, slot % 16 // 4, slot % 4)
        assert torch.equal(tokens.features[token], visual.projected[slot])
        assert tokens.vision[CLS][token] == visual.vision[CLS][slot]
        token += 1
    assert not tokens.is_video
    assert encoded(3, grid=None).tokens(None).is_video


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("method", [Vanilla(), Random(retain_ratio=1.0), Todre(retain_ratio=1.0)])
@pytest.mark.parametrize(("grid", "size"), CANVASES)
def test_everything_kept_is_everything_in_order(grid, size, method, merge_type, draw):
    """Newlines included, even those of rows that padding emptied (a strip of one pixel)."""
    visual = encoded(1 + grid[0] * grid[1], 4, grid, size, merge_type)
    newline = torch.randn(8, generator=draw)
    packed = prune(visual, method, newline, None)
    everything = torch.cat([visual.projected, newline[None]])[visual.slots]
    assert torch.equal(packed.embeds, everything)
    assert packed.num_newlines == (visual.slots == NEWLINE).sum()
    assert packed.stats.keep_idx.tolist() == list(range(packed.stats.num_tokens))


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize(("grid", "size"), CANVASES)
@pytest.mark.parametrize("budget", [1, 3, 10, 15])
def test_a_newline_stays_while_its_row_keeps_a_token(grid, size, merge_type, budget, draw):
    visual = encoded(1 + grid[0] * grid[1], 4, grid, size, merge_type)
    newline = torch.randn(8, generator=draw)
    features = visual.projected[visual.slots[visual.slots != NEWLINE]]
    keep = torch.randperm(len(features), generator=draw)[:budget].sort().values.tolist()
    packed = prune(visual, Fixed(indices=tuple(keep)), newline, None)
    assert torch.equal(packed.embeds, slow_pack(visual, set(keep), features, newline))
    assert packed.num_newlines == len(packed.embeds) - budget
    assert packed.stats.num_tokens == len(features)
    assert packed.stats.keep_idx.tolist() == keep


def test_a_kept_thumbnail_needs_no_newline():
    packed = prune(encoded(), Fixed(indices=(2, 15)), torch.ones(8), None)
    assert packed.num_newlines == 0
    assert len(packed.embeds) == 2


def test_one_view_keeps_its_newline_at_the_end():
    visual = encoded(1)
    packed = prune(visual, Fixed(indices=(2, 9)), torch.ones(8), None)
    expected = torch.cat([visual.projected[[2, 9]], torch.ones(1, 8)])
    assert torch.equal(packed.embeds, expected)


def test_merged_features_stand_where_the_kept_tokens_stood(draw):
    visual = encoded()
    newline = torch.randn(8, generator=draw)
    keep = [3, 17, 18, 25, 60]
    merged = torch.randn(5, 8, generator=draw)
    features = torch.zeros(len(visual.patches), 8)
    features[keep] = merged
    packed = prune(visual, Fixed(indices=tuple(keep), features=merged), newline, None)
    assert torch.equal(packed.embeds, slow_pack(visual, set(keep), features, newline))
    flat = encoded(merge_type="flat")
    packed = prune(flat, Fixed(indices=tuple(keep), features=merged), None, None)
    assert torch.equal(packed.embeds, merged)


def test_images_encoded_for_a_method_without_pivot_cannot_be_given_one():
    features, slots = torch.randn(16, 8), torch.arange(16)
    vision = {("cls_attention", -2): torch.rand(16)}
    without = ImageFeatures(features, slots, 4, False)
    of_layer_2 = ImageFeatures(features, slots, 4, False, None, frozenset(vision), vision)
    for visual in (without, of_layer_2):
        with pytest.raises(TodreError, match=r"without .*cls_attention', -1.* Todre needs"):
            prune(visual, Todre(), None, None)
        assert len(prune(visual, Todre(retain_ratio=1.0), None, None).embeds) == 16
    assert len(prune(of_layer_2, Todre(cls_layer=-2), None, None).embeds) == 2


def test_selection_is_needed_when_one_image_is_above_its_budget():
    small, large = torch.arange(16), torch.cat([torch.arange(17), torch.tensor([NEWLINE])])
    assert not needs_selection(Todre(retain_tokens=17), [small, large])
    assert needs_selection(Todre(retain_tokens=16), [small, large])
    assert not needs_selection(Vanilla(), [small, large])


# ---------------------------------------------------------------- the projector


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
        with pytest.raises(TodreError, match=f"'{kind}' is not supported.* linear"):
            build_projector(kind, 6, 10)


def test_the_images_of_a_batch_are_selected_from_at_the_same_time(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def spy(features: Any, *rest: Any) -> Any:
        calls.append(len(features))
        return greedy_diverse_batch(features, *rest)

    monkeypatch.setattr("llava_todre.pruners.todre.greedy_diverse_batch", spy)
    model = tiny_llava()
    model.set_pruner("todre", retain_ratio=0.25)
    draw = torch.Generator().manual_seed(4)
    pixels = [torch.randn(views, 3, 56, 56, generator=draw) for views in (5, 5, 3)]
    ids = torch.tensor([[1, -200, 7], [1, -200, 8], [1, -200, 9]])
    sizes = [(112, 112), (80, 112), (112, 40)]
    model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=1)
    together = [stats.images[0].keep_idx.tolist() for stats in model.last_stats]
    assert calls == [3]
    for index in range(3):
        one = slice(index, index + 1)
        model.generate(ids[one], images=pixels[one], image_sizes=sizes[one], max_new_tokens=1)
        assert model.last_stats[0].images[0].keep_idx.tolist() == together[index]
