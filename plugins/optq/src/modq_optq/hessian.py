"""Factorizes the second moments of a layer's inputs for the columns to be quantized in some order.

With H = E[x xᵀ] in the order of quantization, OPTQ needs the upper triangular U with UᵀU = H⁻¹. Usually H is
factorized, inverted and factorized again. Here H is factorized from its last row up, H = R Rᵀ with R upper
triangular; then U = R⁻¹. That is half the work, and nothing is squared on the way.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from modq.errors import WeightError

_LEAF = 256
"""Up to this size a triangle is inverted by the library."""

_log = logging.getLogger(__name__)


def checked_hessian(hessian: Tensor, in_features: int) -> Tensor:
    """Return the Hessian in float32, or raise a WeightError unless it is one of this many inputs."""
    if tuple(hessian.shape) != (in_features, in_features):
        expected = (in_features, in_features)
        raise WeightError(
            f"the Hessian has shape {tuple(hessian.shape)}, expected {expected}; calibrate anew"
        )
    hessian = hessian.float()
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian.sum()) and not torch.isfinite(hessian).all():
        raise WeightError("the Hessian has NaN or infinite values; do the layer's inputs overflow?")
    if (diagonal < 0).any():
        raise WeightError(
            f"the Hessian has {float(diagonal.min()):g} on its diagonal, expected a mean of squares; "
            "calibrate anew"
        )
    return hessian


def inverse_factor(hessian: Tensor, order: Tensor, damping: float, max_damping: float) -> Tensor:
    """Return the upper triangular U, (in, in) float32, with UᵀU the inverse of the damped H[order, order].

    Args:
        hessian: (in, in) float32; inputs that are always zero may have zeros on the diagonal.
        order: (in,) which column is quantized when.
        damping: what to add to the diagonal, as a part of its mean.
        max_damping: how far to double the damping where the matrix cannot be factorized.

    Raises:
        WeightError: if it cannot be factorized even so.
    """
    backwards = order.flip(0)
    flipped = hessian[backwards][:, backwards]
    diagonal = flipped.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean  # the other entries of such a row are zeros: it stays apart from the rest
    undamped = diagonal.clone()
    used = damping
    while (lower := _cholesky(flipped, undamped + used * mean)) is None:
        if used >= max_damping:
            raise WeightError(
                f"the Hessian is not positive definite, even with damping={used:g}; "
                "calibrate on more data, or allow a larger max_damping"
            )
        used = min(2 * used, max_damping)
    if used > damping:
        _log.warning("the Hessian is not positive definite with damping=%g; used %g", damping, used)
    _invert_lower(lower)
    return lower.flip(0, 1).float()


def _cholesky(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """Factorize `matrix` with this diagonal, which stays in it; in float64 where float32 does not suffice."""
    matrix.diagonal().copy_(diagonal)
    for dtype in (torch.float32, torch.float64):
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
        if not failed and torch.isfinite(lower.diagonal()).all():
            return lower
    return None


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves.

    [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]
    """
    size = lower.shape[0]
    if size <= _LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    _invert_lower(lower[:half, :half])
    _invert_lower(lower[half:, half:])
    below = lower[half:, half:] @ (lower[half:, :half] @ lower[:half, :half])
    lower[half:, :half] = below.neg_()
