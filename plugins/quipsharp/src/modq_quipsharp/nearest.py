"""The nearest point of E8P to a vector, exactly, without trying all 65,536.

For each shift δ = ±¼ let t = x − δ and look for the v in D̂8 (of absolute values in the table A) that makes
2 t·v − ‖v‖² largest. If the signs could be chosen freely they would be those of t. They may, if the number
of negative ones has the parity that A's row demands (v's sum is even); else one sign is wrong, and it costs
least where v is ½ and |t| smallest.

The 227 rows of norm² <= 10 are all the arrangements of seven sets of numbers. Of the arrangements of one set,
the best puts the larger numbers where |t| is larger (rearrangement inequality), and a −½ where it is
smallest. So with |t| sorted, u₁ >= … >= u₈, seven scores are compared instead of 227 rows with their signs:

    2 t·v − ‖v‖² = Σu + Σᵢ gain[set, i] · uᵢ − norm²[set] − (2 u₈ if the parity is wrong)

Only part of the arrangements of norm² 12 are in the table; those 29 rows are compared one by one, for the
vectors that are so long that one of them can win.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from modq_quipsharp.constants import constant
from modq_quipsharp.e8 import ORDER, absolute_rows

_SETS = ("11111111", "31111111", "33111111", "33311111", "33331111", "51111111", "53111111")
"""The sets of absolute values with norm² up to 10, times two, in descending order."""


def nearest_e8p(x: Tensor) -> Tensor:
    """Return the codes of the nearest points: (n, 8) float -> (n,) int32."""
    # Sums over 8 neighbours are products with ones here: several times as fast as a reduction.
    device, n = x.device, x.shape[0]
    ones = constant("ones", lambda: torch.ones(8), device, x.dtype)
    t = torch.cat((x - 0.25, x + 0.25))  # (2n, 8): the shifts +¼ and −¼
    absolute, odd = t.abs(), (t < 0).to(x.dtype).mv(ones).int() & 1
    u, order = absolute.sort(dim=-1, descending=True, stable=True)
    score, kind = _best_set(u, odd)
    row = _improve_by_norm_12(score, absolute, u, odd)
    # ‖x − v − δ‖² = ‖x − δ‖² − Σu − score, and ‖x − δ‖² differs between the shifts by 4 δ Σx.
    gain = score + u.mv(ones)
    lower = gain[n:] > gain[:n] + x.mv(ones)
    chosen = torch.arange(n, device=device) + n * lower
    t, kind, order, row = (part.index_select(0, chosen) for part in (t, kind, order, row))
    halves = torch.empty_like(order, dtype=torch.int8).scatter_(1, order, _sets(device, torch.int8)[kind])
    halves = torch.where((row < 0)[:, None], halves, _norm_12_rows(device, torch.int8)[row])
    return _encode(t, halves, lower)


def _best_set(u: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best score, less Σu, and the set that has it."""
    sets = _sets(u.device, u.dtype)
    norms = constant("norms", lambda: torch.tensor([_norm(s) for s in _SETS]), u.device, u.dtype)
    odd_sets = constant("odd", lambda: torch.tensor([_is_odd(s) for s in _SETS]), u.device)
    penalty = torch.where(odd[:, None] == odd_sets, 0, 2 * u[:, 7:])
    return (u @ (sets - 1).T).sub_(norms).sub_(penalty).max(-1)


def _improve_by_norm_12(score: Tensor, absolute: Tensor, u: Tensor, odd: Tensor) -> Tensor:
    """Raise scores where a row of norm² 12 is better; return the best such row of each vector, else −1."""
    top = constant("top", lambda: torch.tensor((2, 2, 2, 2, 2, 0, 0, 0)), u.device, u.dtype)
    wrong = 1 - odd  # the sum of each of these rows is odd, so an even number of negative signs is wrong
    where = (u.mv(top) - 12 - 2 * u[:, 7] * wrong > score).nonzero().flatten()
    absolute, wrong = absolute.index_select(0, where), wrong.index_select(0, where)
    halves = constant("halves", _places_of_halves, u.device)
    first, second, third = (absolute.index_select(1, place) for place in halves)
    rows = _norm_12_rows(u.device, u.dtype)
    cheapest = torch.minimum(torch.minimum(first, second), third)
    best, row = (absolute @ (rows - 1).T - 12).sub_(2 * cheapest * wrong[:, None]).max(-1)
    before = score.index_select(0, where)
    score.index_copy_(0, where, torch.maximum(best, before))
    return torch.full_like(score, -1, dtype=torch.int64).index_copy_(
        0, where, torch.where(best > before, row, -1)
    )


def _encode(t: Tensor, halves: Tensor, lower: Tensor) -> Tensor:
    """Return the codes of points with these absolute values, times two, and the best signs for t."""
    device = halves.device
    powers = constant("powers of 3", lambda: 3 ** torch.arange(8), device, torch.float32)
    key = ((halves - 1) >> 1).float().mv(powers)
    row = constant("rows", row_of_key, device).index_select(0, key.int())
    odd = constant("odd rows", lambda: torch.tensor([_is_odd(row) for row in absolute_rows()]), device)
    odd_row, negative = odd.index_select(0, row), t < 0
    ones = constant("ones", lambda: torch.ones(8), device, torch.float32)
    wrong = (negative.float().mv(ones).int() & 1) != odd_row
    cheapest = (t.abs() * halves).argmin(-1, keepdim=True)
    negative ^= torch.zeros_like(negative).scatter_(1, cheapest, wrong[:, None])
    # Bit k of the sign byte is for element ORDER[k]; what element 7 is, the row decides too.
    weights = constant("sign bits", _sign_weights, device, torch.float32)
    return row << 8 | negative.float().mv(weights).int() ^ odd_row << 7 ^ lower.int()


def _sets(device: torch.device, dtype: torch.dtype) -> Tensor:
    return constant("sets", lambda: torch.tensor([[int(n) for n in s] for s in _SETS]), device, dtype)


def _norm(numbers: str) -> float:
    return sum(int(n) ** 2 for n in numbers) / 4


def _is_odd(numbers: Iterable[int | str]) -> int:
    """Return 1 if the sum of half these numbers is odd, else 0."""
    return sum(map(int, numbers)) // 2 & 1


def _norm_12_rows(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the 29 rows of norm² 12, times two."""
    return constant("norm² 12", lambda: torch.tensor(absolute_rows()[227:]), device, dtype)


def _places_of_halves() -> Tensor:
    """Return where the three ½ of those rows stand: (3, 29)."""
    return (torch.tensor(absolute_rows()[227:]) == 1).nonzero()[:, 1].view(-1, 3).T.contiguous()


def row_of_key() -> Tensor:
    """Return the row of the table for each way to write 8 numbers of {1, 3, 5}; −1 for those it lacks."""
    table = torch.full((3**8,), -1, dtype=torch.int32)
    for number, row in enumerate(absolute_rows()):
        table[sum((n - 1) // 2 * 3**i for i, n in enumerate(row))] = number
    return table


def _sign_weights() -> Tensor:
    weights = torch.empty(8)
    weights[list(ORDER)] = 2.0 ** torch.arange(8)
    return weights
