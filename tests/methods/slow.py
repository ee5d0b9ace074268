"""What the slow references of several methods share."""

from __future__ import annotations


def slow_shares(total: int, sizes: list[int]) -> list[int]:
    """Share ``total`` in proportion to ``sizes`` by the largest remainder, in whole numbers."""
    whole = [total * size // sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % sum(sizes)), i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
