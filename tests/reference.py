"""Slow references: what the library must compute, written plainly, from weights and the papers.

Nothing here imports the library or transformers. One sample at a time, float64, no cache, no
padding, loops where loops say it best. Symbols: N tokens, D width, H heads, K kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SYSTEM, VISUAL, TEXT = 0, 1, 2
IMAGE = -200
Replaced = dict[int, tuple[Tensor, Tensor]]


# ---------------------------------------------------------------- the decoder


@dataclass
class Run:
    """What the reference decoder computed for one sample."""

    logits: Tensor
    """(N, V)."""
    attention: list[Tensor]
    """(H, N, N) per layer."""
    hidden: list[Tensor]
    """(N, D) output of each layer."""


class LlamaReference:
    """A Llama decoder as matrix products in float64; dropped tokens are hidden, not removed."""

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.weights = {
            name: value.double()
            for name, value in model.state_dict().items()
            if "vision_tower" not in name
        }
        self.embedding = self.weights["model.embed_tokens.weight"]

    def run(
        self, embeds: Tensor, present: Tensor | None = None, replaced: Replaced | None = None
    ) -> Run:
        """Run one sample.

        Args:
            embeds: (N, D).
            present: (layers, N) bool; a False token is no key of that layer. All by default.
            replaced: by layer, rows of its output and what is put there.
        """
        hidden, maps, outputs = embeds.double(), [], []
        num_tokens = len(hidden)
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        itself = torch.eye(num_tokens, dtype=torch.bool)  # keeps the rows of dropped tokens finite
        for layer in range(self.config.num_hidden_layers):
            visible = causal if present is None else causal & (present[layer] | itself)
            hidden, attention = self._layer(layer, hidden, visible)
            maps.append(attention)
            outputs.append(hidden)
            if replaced and layer in replaced:
                rows, values = replaced[layer]
                hidden = hidden.clone()
                hidden[rows] = values.double()
        last = self._norm(hidden, "model.norm")
        return Run(last @ self.weights["lm_head.weight"].T, maps, outputs)

    def greedy(
        self,
        embeds: Tensor,
        steps: int,
        present: Tensor | None = None,
        replaced: Replaced | None = None,
    ) -> tuple[list[int], Tensor]:
        """Return ``steps`` greedy tokens and their (steps, V) logits, starting over for each."""
        tokens: list[int] = []
        rows = []
        embeds = embeds.double()
        for _ in range(steps):
            rows.append(self.run(embeds, present, replaced).logits[-1])
            tokens.append(int(rows[-1].argmax()))
            embeds, present = self.extend(embeds, present, tokens[-1])
        return tokens, torch.stack(rows)

    def beams(
        self, embeds: Tensor, steps: int, num_beams: int, present: Tensor | None = None
    ) -> list[int]:
        """Return the best of ``num_beams`` sequences of exactly ``steps`` tokens."""
        beams = [(0.0, [], embeds.double(), present)]
        for _ in range(steps):
            grown = []
            for score, tokens, prompt, held in beams:
                logprobs = self.run(prompt, held).logits[-1].log_softmax(0)
                for value, token in zip(*logprobs.topk(num_beams), strict=True):
                    grown.append((score + float(value), [*tokens, int(token)], prompt, held))
            grown.sort(key=lambda beam: -beam[0])
            beams = [
                (score, tokens, *self.extend(prompt, held, tokens[-1]))
                for score, tokens, prompt, held in grown[:num_beams]
            ]
        return beams[0][1]

    def attention_of_next(self, hidden: Tensor, layer: int, present: Tensor) -> Tensor:
        """Return the (H, N, N) map that ``layer`` makes of its input ``hidden`` (N, D)."""
        causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
        itself = torch.eye(len(hidden), dtype=torch.bool)
        return self._layer(layer, hidden, causal & (present | itself))[1]

    def extend(
        self, embeds: Tensor, present: Tensor | None, *tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """Append tokens, present in every layer."""
        embeds = torch.cat([embeds.double(), self.embedding[list(tokens)]])
        if present is not None:
            present = torch.cat([present, present.new_ones(len(present), len(tokens))], dim=1)
        return embeds, present

    def _layer(self, layer: int, hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        prefix = f"model.layers.{layer}."
        state = self._norm(hidden, prefix + "input_layernorm")
        queries = self._rotate(self._heads(state, prefix + "self_attn.q_proj"))
        keys = self._rotate(self._heads(state, prefix + "self_attn.k_proj"))
        values = self._heads(state, prefix + "self_attn.v_proj")
        share = len(queries) // len(keys)  # query heads per key head
        mixed, maps = [], []
        for head, query in enumerate(queries):
            logits = query @ keys[head // share].T / query.shape[-1] ** 0.5
            maps.append(logits.masked_fill(~visible, -torch.inf).softmax(dim=-1))
            mixed.append(maps[-1] @ values[head // share])
        hidden = hidden + self._linear(torch.cat(mixed, dim=-1), prefix + "self_attn.o_proj")
        state = self._norm(hidden, prefix + "post_attention_layernorm")
        gate = self._linear(state, prefix + "mlp.gate_proj")
        up = self._linear(state, prefix + "mlp.up_proj")
        product = gate * torch.sigmoid(gate) * up
        return hidden + self._linear(product, prefix + "mlp.down_proj"), torch.stack(maps)

    def _linear(self, state: Tensor, name: str) -> Tensor:
        return state @ self.weights[name + ".weight"].T

    def _heads(self, state: Tensor, name: str) -> Tensor:
        width = self.config.hidden_size // self.config.num_attention_heads
        return self._linear(state, name).view(len(state), -1, width).transpose(0, 1)

    def _norm(self, state: Tensor, name: str) -> Tensor:
        mean = (state * state).mean(dim=-1, keepdim=True)
        return state / (mean + self.config.rms_norm_eps).sqrt() * self.weights[name + ".weight"]

    @staticmethod
    def _rotate(heads: Tensor, base: float = 10_000.0) -> Tensor:
        """Rotate pairs (i, i + width / 2) of each token by position * base ** (-2 i / width)."""
        half = heads.shape[-1] // 2
        steps = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(heads.shape[1])[:, None] * steps  # (N, half)
        first, second = heads[..., :half], heads[..., half:]
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat(
            [first * cosines - second * sines, second * cosines + first * sines], dim=-1
        )


def splice(
    embedding: Tensor, ids: Sequence[int], visuals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (N, D) embeddings and (N,) kinds of a prompt whose -200 ids stand for images."""
    rows, kinds = [], []
    images, kind = iter(visuals), SYSTEM
    for token in ids:
        if token == IMAGE:
            visual = next(images)
            rows += list(visual.to(embedding))
            kinds += [VISUAL] * len(visual)
            kind = TEXT
        else:
            rows.append(embedding[token])
            kinds.append(kind)
    return torch.stack(rows), torch.tensor(kinds)


def presence(kinds: Tensor, num_layers: int, plan: dict[int, int]) -> Tensor:
    """Return (layers, N) bool: after layer l only every plan[l]-th visual token stays (0: none)."""
    present = torch.ones(num_layers, len(kinds), dtype=torch.bool)
    for layer, stride in sorted(plan.items()):
        still = [i for i in range(len(kinds)) if kinds[i] == VISUAL and present[layer, i]]
        kept = still[::stride] if stride else []
        for token in set(still) - set(kept):
            present[layer + 1 :, token] = False
    return present


def mass(attention: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Return ToDRE Eq. 8 from an (H, N, N) map: what rows pay to columns, of all they pay."""
    if not bool(rows.any()):
        return 0.0
    return float(attention[:, rows][:, :, columns].sum() / attention[:, rows].sum())


# ---------------------------------------------------------------- Stage 1


def greedy_diverse(features: Tensor, budget: int, first: int, objective: str) -> list[int]:
    """Return the picks of ToDRE v2 Algorithm 1 (``max_sum``) or v1 Algorithm 1 (``max_min``)."""
    rows = features.double()
    length = rows.norm(dim=1, keepdim=True)
    rows = torch.where(length > 0, rows / length, rows)
    picked = [first]
    while len(picked) < budget:
        best, best_score = -1, float("inf")
        for candidate in range(len(rows)):
            if candidate in picked:
                continue
            cosines = [float(rows[candidate] @ rows[chosen]) for chosen in picked]
            score = sum(cosines) if objective == "max_sum" else max(cosines)
            if score < best_score:
                best, best_score = candidate, score
        picked.append(best)
    return picked


def greedy_gaps(features: Tensor, picked: Sequence[int], objective: str) -> list[float]:
    """Return by how much each pick misses the best available score, in float64; zero is greedy."""
    rows = torch.nn.functional.normalize(features.double(), dim=-1)
    free = torch.ones(len(rows), dtype=torch.bool)
    cosines = torch.empty(0, len(rows), dtype=torch.float64)
    gaps = []
    for step, pick in enumerate(picked):
        if step:
            score = cosines.sum(0) if objective == "max_sum" else cosines.amax(0)
            gaps.append(float(score[pick] - score[free].min()))
        free[pick] = False
        cosines = torch.cat([cosines, (rows @ rows[pick])[None]])
    return gaps


# ---------------------------------------------------------------- merging


def merge_views(
    views: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None, merge_type: str,
    newline: Tensor,
) -> Tensor:  # fmt: skip
    """Merge (V, P, D) view features into (S, D) by moving the features, as the original does.

    ``grid`` is (columns, rows) of crops and ``size`` the (width, height) of the image.
    """
    width = views.shape[-1]
    side = int(views.shape[1] ** 0.5)
    if merge_type == "flat" or grid is None:
        return views.reshape(-1, width)
    if len(views) == 1:
        return torch.cat([views[0], newline[None]]) if "unpad" in merge_type else views[0]
    columns, rows = grid
    canvas = views[1:].view(rows, columns, side, side, width)
    canvas = canvas.permute(4, 0, 2, 1, 3).contiguous()
    canvas = canvas.flatten(1, 2).flatten(2, 3)  # (D, height, width)
    if "unpad" in merge_type:
        assert size is not None
        canvas = unpad(canvas, size)
        ends = newline[:, None, None].expand(width, canvas.shape[1], 1)
        canvas = torch.cat([canvas, ends], dim=-1)
    return torch.cat([views[0], canvas.flatten(1).T])


def unpad(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the padding off a (D, height, width) canvas that shows an image of (width, height)."""
    height, width = canvas.shape[1:]
    image_width, image_height = size
    if image_width / image_height > width / height:
        pad = (height - int(image_height * (width / image_width))) // 2
        return canvas[:, pad : height - pad]
    pad = (width - int(image_width * (height / image_height))) // 2
    return canvas[:, :, pad : width - pad]
