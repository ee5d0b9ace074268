"""The two attention ratios of ToDRE Eq. 8 over the decoder layers, as SVG that fits any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_todre.pruners import Combined, Pruner
from llava_todre.stats import Probe

TO_VISUAL, TO_TEXT = "#0072b2", "#d55e00"  # safe for colour-blind readers
_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 40, 42
_TICKS = 4

_Scale = Callable[[float], float]
"""From a layer, or a share, to a coordinate."""


def ratio_chart(
    ratios: Sequence[Probe], num_layers: int, withdrawn_from: int | None, tau: float | None
) -> str:
    """Return the drawing as SVG text.

    Args:
        ratios: a probe with both ratios per layer that held visual tokens.
        num_layers: of the decoder.
        withdrawn_from: the first layer without any visual token, if there is one.
        tau: the threshold of the method, if it has one.
    """
    to_visual = [(probe.layer, probe.text_to_visual or 0.0) for probe in ratios]
    to_text = [(probe.layer, probe.visual_to_text or 0.0) for probe in ratios]

    def x(layer: float) -> float:
        return _LEFT + (layer + 0.5) / num_layers * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        # Always up to 1, so that both sides can be compared.
        return _HEIGHT - _BOTTOM - value * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(num_layers, x, y)]
    if withdrawn_from is not None:
        edge = x(withdrawn_from - 0.5)
        parts += [
            f'<rect x="{edge:.1f}" y="{_TOP}" width="{_WIDTH - _RIGHT - edge:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="currentColor" opacity="0.10"/>',
            _text(min(edge, _WIDTH - _RIGHT) - 4, _TOP + 12, "no visual tokens:", "end"),
            _text(min(edge, _WIDTH - _RIGHT) - 4, _TOP + 25, f"layer {withdrawn_from} on", "end"),
        ]
    if tau is not None:
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tau):.1f}" y2="{y(tau):.1f}" '
            'stroke="currentColor" stroke-dasharray="2 4"/>',
            _text(_LEFT + 4, y(tau) - 4, f"tau {tau:g}"),
        ]
    parts += [_curve(to_text, TO_TEXT, "6 4", x, y), _curve(to_visual, TO_VISUAL, "", x, y)]
    parts.append(_legend())
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" width="100%" class="ratios" '
        f'aria-label="{_summary(to_visual, withdrawn_from)}" font-size="12" '
        f'font-family="inherit" fill="currentColor">{"".join(parts)}</svg>'
    )


def threshold(pruner: Pruner) -> float | None:
    """Return the withdrawal threshold ``tau`` of a method, if it has one."""
    inside = pruner.inside if isinstance(pruner, Combined) else pruner
    return getattr(inside, "tau", None)


def _grid(num_layers: int, x: _Scale, y: _Scale) -> str:
    lines = []
    for tick in range(_TICKS + 1):
        value = tick / _TICKS
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="currentColor" opacity="0.2"/>'
        )
        lines.append(_text(_LEFT - 6, y(value) + 4, f"{value:.3g}", "end"))
    step = max(1, -(-num_layers // 12))
    for layer in range(0, num_layers, step):
        lines.append(_text(x(layer), _HEIGHT - _BOTTOM + 15, str(layer), "middle"))
    lines.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, "decoder layer, from 0", "middle"))
    return "".join(lines)


def _curve(
    points: Sequence[tuple[int, float]], colour: str, dash: str, x: _Scale, y: _Scale
) -> str:
    places = [(x(layer), y(value)) for layer, value in points]
    path = " ".join(f"{left:.1f},{down:.1f}" for left, down in places)
    dots = "".join(
        f'<circle cx="{left:.1f}" cy="{down:.1f}" r="2.6" fill="{colour}"/>'
        for left, down in places
    )
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash}"/>{dots}'
    )


def _legend() -> str:
    entries = ((TO_VISUAL, "", "text to visual", _LEFT), (TO_TEXT, "6 4", "visual to text", 190))
    return _text(_LEFT, 12, "share of attention") + "".join(
        f'<line x1="{left}" x2="{left + 26}" y1="26" y2="26" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash}"/>{_text(left + 32, 30, name)}'
        for colour, dash, name, left in entries
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _summary(to_visual: Sequence[tuple[int, float]], withdrawn_from: int | None) -> str:
    if not to_visual:
        return "Attention ratios per decoder layer: none was measured."
    (first, at_first), (last, at_last) = to_visual[0], to_visual[-1]
    ending = "" if withdrawn_from is None else f" No visual tokens from layer {withdrawn_from} on."
    return (
        f"Attention from text to visual tokens: {at_first:.3f} in layer {first}, "
        f"{at_last:.3f} in layer {last}.{ending}"
    )
