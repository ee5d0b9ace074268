"""The mini LLaVA's projector and decoder, in lean bfloat16 torch for training on a CPU.

B images, S system tokens, V visual tokens, P = S + V prefix, T text tokens, H heads, D width.
Many questions share one image: each question's text starts at the same position after the
image and sees the system prompt, the image and itself, so one packed sequence is exactly as many
single-turn prompts. Splitting attention into a causal prefix and the text rows is three to four
times faster on a CPU than one dense mask. Parameter names are those of the LLaVA checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASKED = -1e4


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes, with the key names of `LlamaConfig`."""

    vocab_size: int
    mm_hidden_size: int = 128
    hidden_size: int = 192
    intermediate_size: int = 512
    # ToDRE probes up to layer floor(7/8 L) and withdraws from the next one on, which with 8 layers
    # would be never.
    num_hidden_layers: int = 10
    num_attention_heads: int = 4
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class PackedText:
    """Questions and answers behind one image, concatenated.

    `ids`, `segments`, `offsets`: int64 (B, T). Tokens of one question share a segment number,
    and offsets count from 0 inside it. Padding has segment -1.
    """

    ids: Tensor
    segments: Tensor
    offsets: Tensor


@dataclass
class _Shared:
    """What all layers of one pass have in common."""

    prefix_len: int
    system_len: int
    cos: Tensor
    sin: Tensor
    prefix_mask: Tensor
    text_mask: Tensor
    text_weight: Tensor
    masses: list[Tensor]


def _linear(x: Tensor, *modules: nn.Linear) -> Tensor:
    """Several bias-free linear maps of one input as a single product, in the input's dtype."""
    weight = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
    return F.linear(x, weight.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention of Llama; `x` (B, T, ..., head)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class _RMSNorm(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, shared: _Shared, text_only: bool) -> Tensor:
        """(B, P + T, D) to attention output of all rows, or (B, T, D) of the text rows."""
        batch, prefix_len = len(x), shared.prefix_len
        qkv = _linear(x, self.q_proj, self.k_proj, self.v_proj)
        qkv = qkv.view(batch, -1, 3, self.num_heads, self.head_size)
        q, k = _rotate(qkv[:, :, :2], shared.cos, shared.sin).permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)  # (B, H, P + T, head)
        q = q * self.head_size**-0.5
        prefix_k, prefix_v = k[:, :, :prefix_len], v[:, :, :prefix_len]
        text_q = q[:, :, prefix_len:]
        to_prefix = text_q @ prefix_k.transpose(-1, -2)  # (B, H, T, P)
        to_text = text_q @ k[:, :, prefix_len:].transpose(-1, -2) + shared.text_mask
        weights = torch.cat((to_prefix, to_text), -1).softmax(-1)
        on_prefix, on_text = weights[..., :prefix_len], weights[..., prefix_len:]
        mass = on_prefix[..., shared.system_len :].sum(-1).float().mean(1)  # (B, T)
        shared.masses.append((mass * shared.text_weight).sum())
        mixed = on_prefix @ prefix_v + on_text @ v[:, :, prefix_len:]
        if not text_only:
            scores = q[:, :, :prefix_len] @ prefix_k.transpose(-1, -2) + shared.prefix_mask
            mixed = torch.cat((scores.softmax(-1) @ prefix_v, mixed), 2)
        return _linear(mixed.transpose(1, 2).flatten(2), self.o_proj)


class _Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = _linear(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return _linear(F.silu(gate) * up, self.down_proj)


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = _RMSNorm(config)
        self.post_attention_layernorm = _RMSNorm(config)

    def forward(self, x: Tensor, shared: _Shared, text_only: bool) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), shared, text_only)
        x = (x[:, shared.prefix_len :] if text_only else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class _Model(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _RMSNorm(config)
        self.mm_projector = nn.Sequential(
            nn.Linear(config.mm_hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * 0.5)


class MiniDecoder(nn.Module):
    """Everything after the vision tower; `state_dict` has LLaVA's own names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.model.layers.named_parameters():
            if parameter.dim() == 2:
                # Small residual branches at the start keep a deep stack trainable at this rate.
                gain = 0.2 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.7)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def _projector_maps(self) -> tuple[nn.Linear, nn.Linear]:
        first, second = self.model.mm_projector[0], self.model.mm_projector[2]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return first, second

    @torch.no_grad()
    def fit_projector(self, features: Tensor) -> None:
        """Let the untrained projector centre and scale tower features (..., mm_hidden_size)."""
        first, second = self._projector_maps()
        flat = features.flatten(0, -2).float()
        mean, spread = flat.mean(0), flat.std().item()
        nn.init.normal_(first.weight, std=1 / (spread * flat.shape[1] ** 0.5))
        first.bias.copy_(-first.weight @ mean)
        nn.init.normal_(second.weight, std=1.2 * second.in_features**-0.5)
        nn.init.zeros_(second.bias)

    def visual_tokens(self, features: Tensor) -> Tensor:
        """Project tower features (B, views, 64, mm_hidden) and put them in LLaVA's order.

        One view: its 64 tokens. Five views: the thumbnail, then the 16x16 raster of the four
        crops with `image_newline` after every row, (B, 336, D).
        """
        first, second = self._projector_maps()
        dtype = features.dtype
        x = F.linear(features, first.weight.to(dtype), first.bias.to(dtype))
        x = F.linear(F.gelu(x), second.weight.to(dtype), second.bias.to(dtype))
        batch, num_views, num_patches, width = x.shape
        if num_views == 1:
            return x[:, 0]
        side = int(num_patches**0.5)
        crops = x[:, 1:].view(batch, 2, 2, side, side, width).transpose(2, 3)
        rows = crops.reshape(batch, 2 * side, 2 * side, width)
        newline = self.model.image_newline.to(dtype).expand(batch, 2 * side, 1, width)
        return torch.cat((x[:, 0], torch.cat((rows, newline), 2).flatten(1, 2)), 1)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.config.head_size, 2).float() / self.config.head_size
        angles = positions[..., None].float() * self.config.rope_theta**-exponents
        angles = angles[:, :, None, None]  # one angle for q and k of all heads
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self, prefix: Tensor, visual: Tensor, text: PackedText, squeeze: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Logits' hidden states of the text rows and text-to-visual attention mass.

        Arguments:
            prefix: system token ids (S,).
            visual: visual tokens (B, V, D); their dtype is the dtype of the computation.
            text: packed questions.
            squeeze: factor on the distances between visual positions; 1 is the plain model.

        Returns:
            Normalised hidden states (B, T, D), and the mean mass of each layer (layers,).
        """
        batch, num_visual, _ = visual.shape
        system_len, dtype = len(prefix), visual.dtype
        embed = self.model.embed_tokens
        system = embed(prefix).to(dtype).expand(batch, -1, -1)
        x = torch.cat((system, visual, embed(text.ids).to(dtype)), 1)
        visual_positions = system_len + torch.arange(num_visual) * squeeze
        text_start = system_len + round(num_visual * squeeze)
        before = torch.cat((torch.arange(system_len), visual_positions)).expand(batch, -1)
        cos, sin = self._rope(torch.cat((before, text_start + text.offsets), 1), dtype)
        same = text.segments[:, :, None] == text.segments[:, None, :]
        visible = same & (text.offsets[:, :, None] >= text.offsets[:, None, :])
        real = (text.segments >= 0).float()
        prefix_len = system_len + num_visual
        causal = torch.full((prefix_len, prefix_len), _MASKED, dtype=dtype).triu(1)
        text_mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, _MASKED)
        shared = _Shared(
            prefix_len, system_len, cos, sin, causal, text_mask[:, None], real / real.sum(), []
        )
        for layer in self.model.layers:
            x = layer(x, shared, text_only=layer is self.model.layers[-1])
        return self.model.norm(x), torch.stack(shared.masses)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to float32 (..., vocabulary)."""
        return _linear(hidden, self.lm_head).float()
