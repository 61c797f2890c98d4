"""The half-quadratic solver: the zero of each group that makes the p-norm of the error small.

HQQ (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/) replaces a group of weights W by integers q
with a scale 1/s and a zero z, Ŵ = (q − z)/s. s and the first z put the ends of the group on the ends of the
integers, and s stays. To make Σ|W − Ŵ|^p small, p < 1, it splits the error off as a variable V, penalizes
V ≠ W − Ŵ by β/2·‖·‖², and alternates. With E = W − Ŵ:

    q = clamp(round(W·s + z))
    V = sign(E)·max(0, |E| − |E|^(p−1)/β)               a soft threshold, the V that is best for E
    z = mean over the group of q − (W − V)·s            the z that is best for V

until the mean |E| over the whole matrix falls no more; the z of the last step is kept, and q chosen anew.

Here it is written in steps of the grid. With d = W·s + z − q = E·s the z of the third line is

    z − mean of sign(d)·min(|d|, c·|d|^(p−1))           c = s^(2−p)/β

so errors up to c^(1/(2−p)) count in full and larger ones less, the larger the less. At the usual β = 10 that
bound is 0.17 in units of W, above every error in most matrices: then the power, by far the dearest operation
here, is not needed, and a step costs a few passes over a chunk that stays in the cache. The matrix is read
chunk by chunk in its own dtype; all arithmetic is float32, sums over the matrix are float64.

One thing is done otherwise than in the hqq package, which rounds scales and zeros to 16 bits after it has
chosen q: here q is chosen for the numbers that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modq.errors import WeightError
from modq.materialize import blocks
from modq_hqq.options import Options

CHUNK_ELEMENTS = 1 << 17
"""Weights in a chunk: with what a step takes it fits a second-level cache."""

# The narrowest group that is not taken for a constant, and the largest s. Those of float16 are the package's,
# and keep 1/s out of float16's subnormals; the other dtypes have float32's range.
_LIMITS = {"float16": (1e-4, 2e4), "bfloat16": (1e-35, math.inf), "float32": (1e-35, math.inf)}


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Some whole groups: (groups, size) views of the weight and of the codes, and which groups they are."""

    weight: Tensor
    codes: Tensor
    groups: slice


def quantize_groups(
    weights: Sequence[Tensor], codes: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Quantize groups of weights.

    Args:
        weights: views (groups, size) of the weight, of any float dtype, one for each size that occurs.
        codes: the same views of a uint8 matrix, which is filled.
        options: the widths, dtypes and the solver's parameters.

    Returns:
        The scales and the zeros, (groups,) each, in the dtype that they are stored in.

    Raises:
        WeightError: if a scale or zero is beyond that dtype, or the weight not finite.
    """
    chunks = list(_chunks(weights, codes))
    inverse, zeros = _spanning(chunks, options)
    if options.optimize:
        _fit_zeros(chunks, inverse, zeros, options)
    dtype = getattr(torch, options.scale_dtype)
    scales, zeros = inverse.reciprocal().to(dtype), zeros.to(dtype)
    _check_finite(scales, zeros, options)
    inverse, shift = scales.float().reciprocal(), zeros.float()
    for chunk in chunks:
        _, nearest = _nearest(chunk, inverse, shift, options)
        chunk.codes.copy_(nearest)
    return scales, zeros


def _chunks(weights: Sequence[Tensor], codes: Sequence[Tensor]) -> Iterator[_Chunk]:
    first = 0
    for weight, code in zip(weights, codes, strict=True):
        count, size = weight.shape
        for part in blocks(count, size, CHUNK_ELEMENTS):
            yield _Chunk(weight[part], code[part], slice(first + part.start, first + part.stop))
        first += count


def _spanning(chunks: Sequence[_Chunk], options: Options) -> tuple[Tensor, Tensor]:
    """Return the s and z that put the least and the largest weight of each group on the ends of the grid."""
    low = torch.cat([chunk.weight.amin(1).float() for chunk in chunks])
    high = torch.cat([chunk.weight.amax(1).float() for chunk in chunks])
    narrowest, largest = _LIMITS[options.scale_dtype]
    width = high - low
    inverse = torch.where(width <= narrowest, 1.0, (2**options.bits - 1) / width).clamp_(max=largest)
    zeros = -low * inverse
    return inverse, zeros.round_() if options.rounds_zero else zeros


def _fit_zeros(chunks: Sequence[_Chunk], inverse: Tensor, zeros: Tensor, options: Options) -> None:
    """Take steps until the error falls no more, changing `zeros`; the last step's zeros stay."""
    beta, least = options.beta, math.inf
    for _ in range(options.iters):
        errors = [_step(chunk, inverse, zeros, beta, options) for chunk in chunks]
        error = float(torch.stack(errors).sum())
        if not error < least:
            return
        least = error
        beta *= options.kappa


def _step(chunk: _Chunk, inverse: Tensor, zeros: Tensor, beta: float, options: Options) -> Tensor:
    """Update the zeros of a chunk; return its Σ|W − Ŵ| from before."""
    s, power = inverse[chunk.groups], options.lp_norm
    ideal, nearest = _nearest(chunk, inverse, zeros, options)
    d = ideal.sub_(nearest)
    magnitude = torch.abs(d, out=nearest)
    error = (magnitude.sum(1) / s).sum(dtype=torch.float64)
    c = s.pow(2 - power) / beta
    if (magnitude.amax(1) > c.pow(1 / (2 - power))).any():
        bounded = torch.minimum(magnitude, magnitude.pow(power - 1).mul_(c[:, None]))
        d = torch.copysign(bounded, d)
    zeros[chunk.groups] -= d.mean(1)
    return error


def _nearest(chunk: _Chunk, inverse: Tensor, zeros: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return W·s + z and the integers nearest to it, both float32."""
    s, z = inverse[chunk.groups, None], zeros[chunk.groups, None]
    ideal = torch.addcmul(z, chunk.weight.float(), s)
    return ideal, ideal.round().clamp_(0, 2**options.bits - 1)


def _check_finite(scales: Tensor, zeros: Tensor, options: Options) -> None:
    for name, tensor in (("scale", scales), ("zero", zeros)):
        if not tensor.isfinite().all():
            wider = "" if options.scale_dtype == "float32" else "; scale_dtype='float32' takes any"
            raise WeightError(
                f"a {name} would be NaN or infinite in {options.scale_dtype}, expected finite weights, "
                f"each group about as wide as it is far from zero{wider}"
            )
