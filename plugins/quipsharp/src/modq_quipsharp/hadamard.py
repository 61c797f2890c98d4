"""Hadamard matrices of the sizes that QuIP# uses, equal to those of Sloane's tables.

χ is the Legendre symbol modulo a prime q: 1 for squares, −1 for other numbers, 0 for 0.

    Paley I     K = q + 1       first row (1, −1 … −1), first column 1, else χ(i − j) + δᵢⱼ
    Paley II    K = 2(q + 1)    [[C + I, C − I], [C − I, −C − I]], C = 0 1…1 over 1, χ(i − j)
    Williamson  K = 4k          [[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]]

with symmetric circulant A, B, C, D, given below by the first half of their first rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PALEY_1 = (12, 20, 60, 108, 140)
_PALEY_2 = (28, 36)
_WILLIAMSON = {
    52: "+-+--++ +---+++ ++-+--+ +----+-",
    116: "++--+--+-+++-++ ++++-++-+---+++ +-+---++--+-+++ +++---++--+-+--",
    124: "+--+++-+--+----+ +--+++-+--+----+ +-----+++-+-+--+ ++++++---+-+-++-",
    156: "+++--+-+-----+--++-- ++++---+--++----+-+- +++--++-+---+-+--+-- +---++-+-+-----+++-+",
    172: "+---++--++++-+-+++-++- ++-++++++----+-+--++-+ +++-+-++--+-+-++++-+-- ++---++++-+--+--++----",
}

SIZES = (1, *sorted((*_PALEY_1, *_PALEY_2, *_WILLIAMSON)))


def hadamard_matrix(size: int) -> Tensor:
    """Return the ±1 matrix of one of `SIZES`, (size, size) int8."""
    if size in _PALEY_1:
        return _paley_1(size - 1)
    if size in _PALEY_2:
        return _paley_2(size // 2 - 1)
    if size in _WILLIAMSON:
        return _williamson(_WILLIAMSON[size].split())
    return torch.ones(1, 1, dtype=torch.int8)


def _paley_1(q: int) -> Tensor:
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = _characters(q) + torch.eye(q, dtype=torch.int8)
    return matrix


def _paley_2(q: int) -> Tensor:
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _characters(q)
    unit = torch.eye(q + 1, dtype=torch.int8)
    upper = torch.cat((conference + unit, conference - unit), dim=1)
    return torch.cat((upper, torch.cat((conference - unit, -conference - unit), dim=1)))


def _characters(q: int) -> Tensor:
    """Return χ(i − j), (q, q)."""
    squares = {n * n % q for n in range(1, q)}
    chi = torch.tensor([0] + [1 if n in squares else -1 for n in range(1, q)], dtype=torch.int8)
    index = torch.arange(q)
    return chi[(index[:, None] - index) % q]


def _williamson(halves: list[str]) -> Tensor:
    a, b, c, d = (_circulant([1 if sign == "+" else -1 for sign in half]) for half in halves)
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _circulant(half: list[int]) -> Tensor:
    """Return the symmetric circulant matrix whose first row mirrors `half` behind its first entry."""
    row = torch.tensor([*half, *half[:0:-1]], dtype=torch.int8)
    index = torch.arange(len(row))
    return row[(index - index[:, None]) % len(row)]
