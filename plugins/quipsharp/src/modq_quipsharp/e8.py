"""The two codebooks of QuIP# (Tseng et al. 2024, https://arxiv.org/abs/2402.04396, section 4), built by rule.

Numbers are held times four, as int8: all are integers then.

**E8P** (16 bits for 8 weights). D̂8 are the vectors of half-odd entries whose sum is even; E8P's points are
those of D̂8 up to a norm, shifted by ±¼. A table of 256 rows A holds the absolute values: all vectors over
{½, 3/2, 5/2} with norm² <= 10 in lexicographic order (227 of them), then 29 chosen ones of norm² 12, with
five 3/2. A code c is

    row a = c >> 8, byte b = c & 255, parity p = popcount(b) & 1, signs b' = b ^ p (bit 0 flips)
    bit k of b' negates element ORDER[k]; element 7 is negated once more if the sum of A[a] is odd
    then all elements move by −¼ if p else +¼

so b' always has an even number of ones, which keeps the sum even.

**E81B** (8 bits for 8 weights) are 256 of the E8 lattice's points of norm² <= 2, and some of norm² 4.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from modq_quipsharp.constants import constant

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which element each sign bit is for."""

_HALVES_OF_NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 "
    "046 014 237"
)
"""Where the three ½ stand in the rows from 227 on."""


def absolute_rows() -> list[tuple[int, ...]]:
    """Return the 256 rows of A, times two."""
    inside = [row for row in product((1, 3, 5), repeat=8) if sum(n * n for n in row) <= 40]
    outside = [tuple(1 if str(i) in halves else 3 for i in range(8)) for halves in _HALVES_OF_NORM_12.split()]
    return [*inside, *outside]


def e8p_points() -> Tensor:
    """Return the points of all codes, times four: (65536, 8) int8."""
    rows = torch.tensor(absolute_rows())
    byte = torch.arange(256)
    bits = byte[:, None] >> torch.arange(8) & 1
    parity = bits.sum(1) & 1
    bits[:, 0] ^= parity
    negative = torch.empty_like(bits)
    negative[:, list(ORDER)] = bits
    negative = negative.expand(256, 256, 8).clone()  # (row, byte, element)
    negative[:, :, 7] ^= (rows.sum(1) // 2 & 1)[:, None]
    points = 2 * rows[:, None] * (1 - 2 * negative) + (1 - 2 * parity)[:, None]
    return points.view(65536, 8).to(torch.int8)


def e81b_points() -> Tensor:
    """Return the 256 points of E81B, times four: (256, 8) int8."""
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(p) % 2 == 0 and sum(n * n for n in p) <= 2]
    halves = [p for p in product((-1, 1), repeat=8) if sum(p) % 4 == 0]
    unit = torch.eye(8, dtype=torch.int8)
    parts = (4 * torch.tensor(whole), 2 * torch.tensor(halves), 8 * unit, -8 * unit[:7])
    return torch.cat([part.to(torch.int8) for part in parts])


def e8p_table(device: torch.device) -> Tensor:
    """Return `e8p_points` with each point's 8 bytes as one int64, which gathers twice as fast: (65536,)."""
    return constant("e8p", lambda: e8p_points().view(torch.int64).flatten(), device)


def e81b_table(device: torch.device) -> Tensor:
    """Return `e81b_points` as `e8p_table` does: (256,) int64."""
    return constant("e81b", lambda: e81b_points().view(torch.int64).flatten(), device)
