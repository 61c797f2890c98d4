"""The integer grid of a group: its scale and zero from the group's weights, and rounding to it.

With the weights w of a group of a row, lo = min(w, 0), hi = max(w, 0), and codes 0 … n = 2^bits − 1:

    symmetric     s = 2·max(−lo, hi) / n     z = 2^(bits−1)
    otherwise     s = (hi − lo) / n          z = round(−lo / s)

The search shrinks (lo, hi) by p = 1, 0.99, … 0.21 and keeps the p with the least Σ |w − ŵ|^2.4.
Scales are rounded to their stored dtype before anything is rounded to the grid, so the codes are chosen for
the numbers that will be used.

All tensors have the groups' weights along dimension 0, one column a row of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modq.errors import WeightError

_SHRINKS = tuple(1 - step / 100 for step in range(80))
_NORM = 2.4


@dataclass(frozen=True, slots=True)
class Grid:
    """How codes, scales and zeros are made from weights."""

    bits: int
    symmetric: bool
    mse: bool
    scale_dtype: torch.dtype

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero of each row, both (rows,) float32, for a group (columns, rows)."""
        low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = high == low
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scale, zero = self._between(low, high)
        if self.mse:
            scale, zero = self._search(weights, low, high, scale, zero)
        return scale, zero

    def round_(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Replace weights, (..., rows), by their codes, in place."""
        return weights.div_(scale).round_().add_(zero).clamp_(0, self.largest)

    def _between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = ((high - low) / self.largest).to(self.scale_dtype)
        if not torch.isfinite(scale).all():
            dtype = str(self.scale_dtype).removeprefix("torch.")
            raise WeightError(
                f"a weight of {float(high.max()):g} needs a scale beyond {dtype}; use scale_dtype='float32'"
            )
        # A scale that vanishes in its dtype would make zeros of weights that are not.
        scale = scale.clamp_(min=_smallest(self.scale_dtype)).float()
        if self.symmetric:
            return scale, torch.full_like(scale, 1 << self.bits - 1)
        return scale, (-low / scale).round_().clamp_(0, self.largest)

    def _search(
        self, weights: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        best = torch.full_like(scale, torch.inf)
        for shrink in _SHRINKS:
            candidate, its_zero = self._between(low * shrink, high * shrink)
            rounded = self.round_(weights.clone(), candidate, its_zero).sub_(its_zero).mul_(candidate)
            error = rounded.sub_(weights).abs_().pow_(_NORM).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, candidate, scale)
            zero = torch.where(better, its_zero, zero)
        return scale, zero


def _smallest(dtype: torch.dtype) -> float:
    """Return the least positive number of a dtype: a subnormal one."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps
