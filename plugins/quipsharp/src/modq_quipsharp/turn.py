"""What stands on either side of the codes: a rotation, and scales behind it.

    A = diag(scales · factor · unit) P U

U rotates, and P keeps some of what comes out: the rows of one layer where several were quantized as one. W is
A Ŵ Bᵀ, so a product with W applies Bᵀ to the rows of x and A to those of what Ŵ makes of them; the transposed
product, Aᵀ and B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modq_quipsharp import cpu
from modq_quipsharp.rotation import Rotation


@dataclass(slots=True)
class Turn:
    """One side of a layer; `scales` are float16, `factor` is one float32 number or None for 1."""

    rotation: Rotation
    scales: Tensor
    factor: Tensor | None
    unit: float
    own: slice

    def apply(self, x: Tensor, dtype: torch.dtype, transpose: bool = False) -> Tensor:
        """Return A v, or Aᵀ v if `transpose`, for each row v of x, computed in float32 or float64.

        Args:
            x: (m, size), or (m, number of scales) if `transpose`.
            dtype: of what is returned.
        """
        y = cpu.turn(self, x, dtype, transpose)
        return self._apply_reference(x, transpose).to(dtype) if y is None else y

    def _apply_reference(self, x: Tensor, transpose: bool) -> Tensor:
        """Do it in plain torch."""
        compute = compute_dtype(x.dtype)
        x, numbers = x.to(compute), self.numbers(compute)
        if not transpose:
            return self.rotation.apply(x)[:, self.own] * numbers
        rows = x * numbers
        if len(numbers) < self.rotation.size:
            own, rows = rows, x.new_zeros((len(x), self.rotation.size))
            rows[:, self.own] = own
        return self.rotation.apply(rows, transpose=True)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the scales with all factors in them."""
        scales = self.scales.to(dtype)
        return scales * (self.unit if self.factor is None else self.factor.to(dtype) * self.unit)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in for x of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
