"""Products with orthogonal matrices that are never built: Kronecker products of small factors.

    x (..., n) -> x (F₁ ⊗ F₂ ⊗ … )ᵀ,  that is F₁ ⊗ F₂ ⊗ … applied to each vector along the last dimension

costs n · Σ kᵢ multiplications for factors of kᵢ × kᵢ instead of n². The Walsh-Hadamard matrix of 2^k in
Sylvester's order is such a product of 2 × 2 matrices; it is applied here in factors of up to 64, as small
matrix products, because k passes over the memory take longer than the multiplications saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from modq.errors import ShapeError

_FACTOR_BITS = 6

_FACTORS: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def kronecker(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Apply the Kronecker product of square matrices to each vector along the last dimension.

    Args:
        x: (..., n), n the product of the factors' sizes, in the dtype of the factors.
        factors: F₁, F₂, …; the last one's index runs fastest.
    """
    size = prod(factor.shape[0] for factor in factors)
    if x.shape[-1] != size:
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected (..., {size}), the size of the factors")
    y, inner = x, 1
    for factor in reversed(factors):
        k = factor.shape[0]
        y = y.reshape(-1, k) @ factor.T if inner == 1 else factor @ y.reshape(-1, k, inner)
        inner *= k
    return y.reshape(x.shape)


def hadamard_factors(size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return factors of the orthonormal Walsh-Hadamard matrix in Sylvester's order; `size` is a power of two.

    The factors are symmetric, so the matrix is its own inverse. They are kept and shared: do not write.
    """
    if size < 1 or size & (size - 1):
        raise ShapeError(f"size={size!r}, expected a power of two")
    bits = size.bit_length() - 1
    count = -(-bits // _FACTOR_BITS)
    widths = [bits * (i + 1) // count - bits * i // count for i in range(count)]
    return [_factor(width, dtype, device) for width in widths]


def hadamard_transform(x: Tensor) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard matrix to each vector along the last dimension."""
    return kronecker(x, hadamard_factors(x.shape[-1], x.dtype, x.device))


def _factor(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix of 2^bits, kept for each device: copying it to an accelerator waits for it."""
    key = (bits, dtype, device)
    if key in _FACTORS:
        return _FACTORS[key]
    with torch.inference_mode(False):  # a kept inference tensor would be unusable outside
        factor = (torch.tensor(_signs(bits), dtype=torch.float64) / 2 ** (bits / 2)).to(device, dtype)
    if type(factor) is Tensor:  # not one of a tracer's stand-ins
        _FACTORS[key] = factor
    return factor


@cache
def _signs(bits: int) -> list[list[int]]:
    """Return Sylvester's matrix: −1 to the number of ones that row and column index have in common."""
    return [[1 - 2 * ((i & j).bit_count() & 1) for j in range(2**bits)] for i in range(2**bits)]
