"""Stage 1: merging views, what stays of an image and of a prompt, against slow loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import reference
import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.arguments import build_pruner
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import PRUNERS, Keep, Pruner, Random, Todre, Vanilla, create_pruner
from llava_todre.pruners.method_file import named_or_from_file
from llava_todre.selection import greedy_diverse_batch
from llava_todre.spans import NewlineRule, TokenType, VisualTokens, with_newlines
from llava_todre.stage1.anyres import NEWLINE, merge_slots
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.pack import Prompt, expand, pad_prompts, prune_prompts
from llava_todre.stage1.select import ImageFeatures, PrunedImage, prune_images

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
NEWLINES = get_args(NewlineRule)


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


@dataclass(frozen=True)
class Case:
    """A random image of some views."""

    image: ImageFeatures
    slots: list[int]
    """Index into the projected patches, or NEWLINE."""
    projected: Tensor
    num_thumbnail: int
    """Tokens before the first that belongs to a row."""

    @property
    def newline(self) -> Tensor:
        assert self.image.newline is not None
        return self.image.newline

    def rows(self) -> tuple[list[int], list[list[int]], list[int]]:
        """Return the thumbnail's tokens, the tokens of each row with a newline, and the rest."""
        rows, row, token = [], [], 0
        for slot in self.slots[self.num_thumbnail :]:
            if slot == NEWLINE:
                rows.append(row)
                row = []
            else:
                row.append(self.num_thumbnail + token)
                token += 1
        return list(range(self.num_thumbnail)), rows, row

    def slow_prune(self, keep: list[int], features: Tensor, newlines: str = "row") -> Tensor:
        """Return the kept tokens row by row, and the newlines that stay after them."""
        thumbnail, rows, rest = self.rows()
        embeds = [features[token] for token in thumbnail if token in keep]
        for row in rows:
            kept = [features[token] for token in row if token in keep]
            ends = newlines == "all" or (newlines == "row" and bool(kept))
            embeds += [*kept, self.newline] if ends else kept
        return torch.stack(embeds + [features[token] for token in rest if token in keep])


def encoded(
    num_views: int = 5,
    side: int = 4,
    grid: tuple[int, int] | None = (2, 2),
    size: tuple[int, int] | None = (640, 481),
    merge_type: str = "spatial_unpad",
) -> Case:
    """Return a random image."""
    draw = torch.Generator().manual_seed(num_views * side)
    projected = torch.randn(num_views * side * side, 8, generator=draw)
    slots = merge_slots(num_views, side, grid, size, merge_type)
    layout = Layout.of_slots(slots, num_views, side, grid is None, grid)
    image = ImageFeatures(
        layout.gather(projected),
        layout,
        torch.randn(8, generator=draw),
        frozenset({CLS}),
        {CLS: layout.gather(torch.arange(len(projected)) / 7)},
    )
    return Case(image, slots.tolist(), projected, side**2 if grid and num_views > 1 else 0)


def prune(image: ImageFeatures, method: Pruner) -> PrunedImage:
    [pruned] = prune_images([image], method)
    return pruned


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
        (
            5,
            "spatial_unpadded",
            "must be one of flat, spatial, spatial_unpad, got 'spatial_unpadded'",
        ),
        (4, "spatial", "5 views .2 x 2 crops .* got 4"),
        (6, "spatial_unpad", "5 views .2 x 2 crops .* got 6"),
    ],
)
def test_what_cannot_be_merged_is_named(num_views, merge_type, message):
    with pytest.raises(TodreError, match=message):
        merge_slots(num_views, 4, (2, 2), (500, 500), merge_type)


# ---------------------------------------------------------------- what a method sees


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize(("grid", "size"), CANVASES)
def test_every_token_knows_its_row(grid, size, merge_type):
    case = encoded(1 + grid[0] * grid[1], 4, grid, size, merge_type)
    thumbnail, rows, rest = case.rows()
    expected = [-1] * len(thumbnail)
    for number, row in enumerate(rows):
        expected += [number] * (len(row) + 1)
    assert case.image.layout.row_id.tolist() == expected + [-1] * len(rest)


def test_tokens_of_one_view_share_its_newline():
    assert encoded(1, 4).image.layout.row_id.tolist() == [0] * 17
    assert encoded(1, 4, grid=None).image.layout.row_id.tolist() == [-1] * 16


def test_tokens_know_their_place():
    case = encoded(grid=(2, 2), size=(640, 481))
    tokens = case.image.tokens()
    patches = [slot for slot in case.slots if slot != NEWLINE]
    assert len(tokens) == len(patches) == 16 + 6 * 8
    assert case.image.layout.patches.tolist() == patches
    for token, slot in enumerate(patches):
        place = (int(tokens.view[token]), int(tokens.row[token]), int(tokens.column[token]))
        assert place == (slot // 16, slot % 16 // 4, slot % 4)
        assert torch.equal(tokens.features[token], case.projected[slot])
        assert tokens.vision[CLS][token] == torch.tensor(slot) / 7
    assert (tokens.is_video, tokens.grid) == (False, (2, 2))
    assert encoded(3, grid=None).image.tokens().is_video
    assert encoded(1).image.tokens().grid is None


# ---------------------------------------------------------------- what stays


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("method", [Vanilla, Random, Todre])
@pytest.mark.parametrize(("grid", "size"), CANVASES)
def test_everything_kept_is_everything_in_order(grid, size, method, merge_type):
    """Newlines included, even those of rows that padding emptied (a strip of one pixel)."""
    case = encoded(1 + grid[0] * grid[1], 4, grid, size, merge_type)
    everything = torch.cat([case.projected, case.newline[None]])[case.slots]
    for newlines in NEWLINES:
        pruned = prune(case.image, method(retain_ratio=1.0, newlines=newlines))
        assert torch.equal(pruned.embeds, everything)
        assert bool(pruned.stays.all())
        assert pruned.stats.keep_idx.tolist() == list(range(pruned.stats.num_tokens))


@pytest.mark.parametrize("newlines", NEWLINES)
@pytest.mark.parametrize(("grid", "size"), CANVASES)
@pytest.mark.parametrize("budget", [1, 3, 12])
def test_newlines_stay_as_the_method_says(grid, size, budget, newlines, draw):
    case = encoded(1 + grid[0] * grid[1], 4, grid, size)
    features = case.image.features
    keep = torch.randperm(len(features), generator=draw)[:budget].sort().values.tolist()
    pruned = prune(case.image, Fixed(indices=tuple(keep), newlines=newlines))
    assert torch.equal(pruned.embeds, case.slow_prune(keep, features, newlines))
    assert int(pruned.stays.sum()) == len(pruned.embeds)
    assert pruned.stats.num_tokens == len(features)
    assert pruned.stats.num_newlines == case.slots.count(NEWLINE)
    assert pruned.stats.keep_idx.tolist() == keep


def test_a_kept_thumbnail_needs_no_newline():
    assert len(prune(encoded().image, Fixed(indices=(2, 15))).embeds) == 2


def test_one_view_keeps_its_newline_at_the_end():
    case = encoded(1)
    expected = torch.cat([case.projected[[2, 9]], case.newline[None]])
    assert torch.equal(prune(case.image, Fixed(indices=(2, 9))).embeds, expected)


def test_merged_features_stand_where_the_kept_tokens_stood(draw):
    case = encoded()
    keep = [3, 17, 18, 25, 60]
    merged = torch.randn(5, 8, generator=draw)
    features = torch.zeros(len(case.image.features), 8)
    features[keep] = merged
    method = Fixed(indices=tuple(keep), features=merged)
    assert torch.equal(prune(case.image, method).embeds, case.slow_prune(keep, features))
    flat = encoded(merge_type="flat").image
    assert torch.equal(prune(flat, method).embeds, merged)


def test_images_encoded_for_a_method_without_pivot_cannot_be_given_one():
    features, layout = torch.randn(16, 8), Layout.of_slots(torch.arange(16), 1, 4)
    vision = {("cls_attention", -2): torch.rand(16)}
    without = ImageFeatures(features, layout)
    of_layer_2 = ImageFeatures(features, layout, needs=frozenset(vision), vision=vision)
    for image in (without, of_layer_2):
        with pytest.raises(TodreError, match=r"without .*cls_attention', -1.* Todre needs"):
            prune(image, Todre())
        assert len(prune(image, Todre(retain_ratio=1.0)).embeds) == 16
    assert len(prune(of_layer_2, Todre(cls_layer=-2)).embeds) == 2


# ---------------------------------------------------------------- a batch


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


@dataclass(frozen=True, kw_only=True)
class Counting(Random):
    """Notes how many images each call brings."""

    calls: list[int] = field(default_factory=list, compare=False)

    def select_all(self, images: Sequence[VisualTokens], budgets: Sequence[int]) -> list[Keep]:
        self.calls.append(len(images))
        return super().select_all(images, budgets)


def test_an_image_is_selected_from_once_until_the_method_or_a_question_differs():
    first, second, small = encoded().image, encoded(3, 4, (2, 1)).image, encoded(1, 1).image
    method = Counting(retain_tokens=5)
    images = [first, second, first, small]
    pruned = prune_images(images, method)
    assert method.calls == [2], "each once, and none that is within the budget"
    assert pruned[0] is pruned[2] is not pruned[1]
    assert all(a is b for a, b in zip(prune_images(images, method), pruned, strict=True))
    assert method.calls == [2]
    other = Counting(retain_tokens=5, newlines="none")
    assert len(prune_images([first], other)[0].embeds) == 5
    text = torch.randn(2, 8)
    asked = prune_images(images, other, texts=[text] * 4)
    assert other.calls == [1, 3]
    assert asked[0] is not asked[2]
    prune_images([first], other)
    assert other.calls == [1, 3], "what a question chose is not used again"


@pytest.mark.parametrize("newlines", NEWLINES)
def test_a_prompt_holds_text_and_what_stays_of_its_images(newlines, draw):
    first, second = encoded(), encoded(3, 4, (2, 1))
    ids = torch.tensor([1, 5, -200, 7, -200, 8, 9])
    embeds, labels = torch.randn(7, 8, generator=draw), torch.arange(7)
    images = [first.image, second.image]
    row, image = expand(ids == -200, [len(each.layout) for each in images])
    keep = [3, 17, 18, 25, 30]
    method = Fixed(indices=tuple(keep), newlines=newlines)
    [prompt] = prune_prompts([Prompt(ids, embeds, images, row, image, labels)], method)
    parts = [case.slow_prune(keep, case.image.features, newlines) for case in (first, second)]
    expected = torch.cat([embeds[:2], parts[0], embeds[3:4], parts[1], embeds[5:]])
    lengths = [2, len(parts[0]), 1, len(parts[1]), 2]
    assert torch.equal(prompt.embeds, expected)
    assert prompt.prefix_len == sum(lengths[:-1])
    assert prompt.whole_length == 5 + sum(len(each.layout) for each in images)
    columns = torch.tensor([0, 2, 3, 4, 5]).repeat_interleave(torch.tensor(lengths))
    columns[1], columns[-1] = 1, 6
    assert torch.equal(prompt.columns, columns)
    assert torch.equal(prompt.ids, ids[columns])
    assert torch.equal(prompt.labels, labels[columns].masked_fill(ids[columns] == -200, -100))
    is_newline = torch.cat(
        [
            (part[:, None] == case.newline).all(-1).any(-1)
            for part, case in zip(parts, (first, second), strict=True)
        ]
    )
    visual = ids[columns] == -200
    kinds = torch.full((len(columns),), TokenType.TEXT)
    kinds[:2] = TokenType.SYSTEM
    kinds[visual] = torch.where(is_newline, TokenType.NEWLINE, TokenType.VISUAL)
    assert prompt.kinds.tolist() == kinds.tolist()
    numbers = [
        n
        for n, kind in zip(prompt.row_id.tolist(), kinds.tolist(), strict=True)
        if kind == TokenType.NEWLINE
    ]
    assert len(set(numbers)) == len(numbers) == int(is_newline.sum()), "no row of two images"
    assert bool((prompt.row_id[~visual] == -1).all())


# ---------------------------------------------------------------- newlines inside the decoder


@pytest.mark.parametrize("rule", NEWLINES)
def test_newlines_follow_any_decision_about_patches(rule, draw):
    for _ in range(200):
        types = torch.randint(0, 3, (24,), generator=draw)  # text, patch, newline
        row_id = torch.where(types == 0, -1, torch.randint(0, 4, (24,), generator=draw))
        keep = torch.rand(24, generator=draw) < torch.rand((), generator=draw) * 1.2
        got = with_newlines(keep, types == 1, types == 2, row_id, rule).tolist()
        kept = [bool(keep[i]) for i in range(24) if types[i] == 1]
        rows = {int(row_id[i]) for i in range(24) if types[i] == 1 and keep[i]}
        for i in range(24):
            stays = bool(keep[i])
            if types[i] == 2:
                by_rule = {"row": int(row_id[i]) in rows, "all": any(kept), "none": False}
                stays = all(kept) or by_rule[rule]
            assert got[i] == stays


@pytest.mark.parametrize("rule", NEWLINES)
def test_the_rule_is_an_option_of_every_method_wherever_options_are_given(rule, tmp_path):
    for name in PRUNERS:
        pruner = create_pruner(name, newlines=rule)
        assert pruner.newlines == rule
        assert build_pruner(name, {"newlines": rule}, None, ())[0] == pruner  # --model_args
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"method: {name}\nnewlines: {rule}\n")
        method, options = named_or_from_file(str(file))
        assert create_pruner(method, **options) == pruner
        with pytest.raises(TodreError, match="newlines 'rows' is unknown. Did you mean 'row'"):
            create_pruner(name, newlines="rows")


def test_one_prompt_is_padded_without_a_copy(draw):
    case, ids = encoded(), torch.tensor([1, -200, 7])
    row, image = expand(ids == -200, [len(case.image.layout)])
    embeds = torch.randn(3, 8, generator=draw)
    prompts = prune_prompts([Prompt(ids, embeds, [case.image], row, image)], Vanilla())
    padded, spans, _ = pad_prompts(prompts)
    assert padded.data_ptr() == prompts[0].embeds.data_ptr()
    assert padded.shape == (1, 2 + len(case.slots), 8) and bool(spans.valid.all())
