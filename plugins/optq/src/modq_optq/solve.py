"""OPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323), Algorithm 1.

Columns are rounded one after another; each error is made up for by all columns that follow, as far as the
inputs' second moments H allow. With U upper triangular and UᵀU = H⁻¹, in the order of quantization:

    e_i = (w_i − ŵ_i) / U_ii        W[:, j] −= e_i · U_ij  for j > i

The paper collects the errors of 128 columns before it touches the others. Here the columns are halved, again
and again: the left half is done, its errors go into the right half by one product, then the right half is
done. Most of the work so falls into a few large products, and a range is cut inside a group only if the group
is all there is: when a group's turn comes, all its columns have received all earlier errors, and its scales
come from the weights that will be rounded. (With blocks that know no groups, a group inside a block sees
weights that lack the errors of up to 127 columns.)

The weights lie transposed, (in, out): a column is a run of memory, and all rows are worked on at once. Errors
take the place of the weights that caused them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modq_optq.grid import Grid

_LEAF = 16
"""Columns whose errors are passed on one by one."""


@dataclass(frozen=True, slots=True)
class Order:
    """In which order columns are quantized, and where their codes and scales go.

    Attributes:
        columns: (in,) the column that is quantized at each step.
        places: (in,) where the codes of each step stand.
        groups: (in,) the group whose scale each step uses.
    """

    columns: Tensor
    places: Tensor
    groups: Tensor


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes (in, out) uint8 in stored order, scales and zeros (groups, out) float32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def natural_order(in_features: int, group_size: int, device: torch.device) -> Order:
    """Take the columns as they come."""
    return _in_place(torch.arange(in_features, device=device), group_size)


def group_order(importance: Tensor, group_size: int) -> Order:
    """Take the group with the most important column first, and in each group its columns by importance.

    Groups stay what they are, so this costs nothing when the weight is used (Gafni et al. 2025,
    https://arxiv.org/abs/2505.14638). A short group comes last.
    """
    whole = importance.shape[0] // group_size * group_size
    values, inside = importance[:whole].view(-1, group_size).sort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, whole, group_size, device=importance.device)
    turns = values[:, 0].argsort(descending=True, stable=True)
    rest = importance[whole:].argsort(descending=True, stable=True) + whole
    return _in_place(torch.cat(((inside + starts[:, None])[turns].flatten(), rest)), group_size)


def full_order(importance: Tensor, group_size: int, static_groups: bool) -> Order:
    """Take the columns by importance.

    Groups are then made of neighbours in this order, and their codes stand together, those of a group in the
    order of the matrix: so a checkpoint that knows each column's group alone is read back the same. Static
    groups are made of neighbours in the matrix.
    """
    columns = importance.argsort(descending=True, stable=True)
    if static_groups:
        return _in_place(columns, group_size)
    groups = torch.arange(columns.shape[0], device=columns.device) // group_size
    stored = groups[columns.argsort()].argsort(stable=True)  # the column that stands at each place
    return Order(columns, stored.argsort()[columns], groups)


def _in_place(columns: Tensor, group_size: int) -> Order:
    return Order(columns, columns, columns // group_size)


def solve(
    weight: Tensor, factor: Tensor, order: Order, group_size: int, grid: Grid, static: bool
) -> Solution:
    """Quantize a weight.

    Args:
        weight: (out, in) float32; left untouched.
        factor: U, (in, in) float32, in the order of quantization.
        order: when each column is quantized.
        group_size: columns in a group.
        grid: what to round to.
        static: whether scales come from the weights as given.
    """
    solver = _Solver(weight, factor, order, group_size, grid)
    if static:
        solver.fit_all(weight)
    solver.run(0, weight.shape[1])
    return Solution(solver.codes, solver.scales, solver.zeros)


class _Solver:
    """The state of one weight's quantization."""

    def __init__(self, weight: Tensor, factor: Tensor, order: Order, group_size: int, grid: Grid) -> None:
        out_features, in_features = weight.shape
        groups = -(-in_features // group_size)
        self.weights = weight.T[order.columns]  # (in, out)
        self.factor, self.pivots = factor, factor.diagonal().tolist()
        self.places, self.groups = order.places.tolist(), order.groups.tolist()
        self.group_size, self.grid = group_size, grid
        self.codes = torch.empty((in_features, out_features), dtype=torch.uint8, device=weight.device)
        self.scales = torch.empty((groups, out_features), device=weight.device)
        self.zeros = torch.empty_like(self.scales)
        self.fitted = [False] * groups

    def fit_all(self, weight: Tensor) -> None:
        """Take all scales from the weights as given, (out, in)."""
        for group in range(self.scales.shape[0]):
            self._fit(group, weight[:, group * self.group_size :][:, : self.group_size].T)

    def run(self, start: int, stop: int) -> None:
        """Quantize the columns from step `start` to `stop`, which have received all earlier errors."""
        if stop - start <= _LEAF:
            self._run_leaf(start, stop)
            return
        middle = self._middle(start, stop)
        self.run(start, middle)
        errors, rest = self.weights[start:middle], self.weights[middle:stop]
        rest.addmm_(self.factor[start:middle, middle:stop].T, errors, alpha=-1)  # [n, m] @ [m, out]
        self.run(middle, stop)

    def _middle(self, start: int, stop: int) -> int:
        """Cut between groups, or inside the only one."""
        first, last = start // self.group_size, -(-stop // self.group_size)
        if last - first > 1:
            return (first + last) // 2 * self.group_size
        return (start + stop) // 2

    def _run_leaf(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            group = self.groups[step]
            if not self.fitted[group]:
                self._fit(group, self.weights[step : step + self.group_size])
            weight, scale, zero = self.weights[step], self.scales[group], self.zeros[group]
            code = self.grid.round_(weight.clone(), scale, zero)
            self.codes[self.places[step]] = code
            error = weight.sub_(code.sub_(zero).mul_(scale)).div_(self.pivots[step])
            if step + 1 < stop:
                self.weights[step + 1 : stop].addr_(self.factor[step, step + 1 : stop], error, alpha=-1)

    def _fit(self, group: int, weights: Tensor) -> None:
        self.scales[group], self.zeros[group] = self.grid.fit(weights)
        self.fitted[group] = True
