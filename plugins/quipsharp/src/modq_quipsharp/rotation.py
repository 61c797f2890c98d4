"""The orthogonal matrices U around the codes, applied to vectors without building them.

**hadamard**: U = (H_K ⊗ F) / √n, F the Walsh-Hadamard matrix of n/K, a power of two. H_K are the Hadamard
matrices that QuIP# takes from Sloane's tables, built here by their constructions, with K four times the odd
part of n. Entries are ±1/√n, the best that a rotation can do to spread a weight.

For an n with no such K in the list, U = D ⊗ F/√(n/o), where o is the odd part of n and D the orthonormal
Hartley matrix, D[i, j] = (cos(2πij/o) + sin(2πij/o)) / √o: symmetric, defined for every o, with entries below
√(2/n), computed by FFT where o is large. QuIP# has no fallback; such n are refused there.

**kronecker** (QuIP, Chee et al. 2023, https://arxiv.org/abs/2307.13304): U = Q₁ ⊗ Q₂, both random
orthogonal, of sizes a·b = n near each other: the prime factors of n at even and at odd places. The random
numbers come from a hash and not from torch's generator, since the matrices are part of what a file means and
must be the same with any version. QuIP permutes the vectors too; here, random signs for each layer stand for
that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from modq.errors import ShapeError
from modq.layouts import hadamard_factors, hadamard_transform, kronecker
from modq_quipsharp.constants import constant
from modq_quipsharp.hadamard import SIZES, hadamard_matrix

LARGEST_FIRST = 256
"""The size up to which a Hartley matrix is multiplied by; from there on an FFT takes less time."""

LARGEST_RANDOM = 4096
"""The size up to which a random factor is made: beyond, it would cost as much as the layer."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix U of one size."""

    size: int
    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind == "kronecker" and max(_near_halves(self.size)) > LARGEST_RANDOM:
            raise ShapeError(
                f"rotation 'kronecker' of size {self.size} needs a random matrix of "
                f"{max(_near_halves(self.size))}, at most {LARGEST_RANDOM}; use rotation 'hadamard'"
            )

    def apply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """Return U v, or Uᵀ v if `transpose`, for each vector v along the last dimension of x."""
        if self.kind == "kronecker":
            factors = [
                constant(
                    ("random", k, place, self.seed), partial(_random, k, place, self.seed), x.device, x.dtype
                )
                for place, k in enumerate(_near_halves(self.size))
            ]
        else:
            first = self.first(x.dtype, x.device)
            if first is None:
                return self._hartley(x)
            factors = [first, *hadamard_factors(self.size // len(first), x.dtype, x.device)]
        return kronecker(x, [factor.T for factor in factors] if transpose else factors)

    def first(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the first factor (k, k) of U = first ⊗ F, F the Walsh-Hadamard matrix of size/k.

        None where U is not of this kind, and for factors too large to multiply by.
        """
        if self.kind == "kronecker":
            return None
        name, k = _first_factor(self.size)
        build = _hadamard if name == "hadamard" else _hartley_matrix
        return constant((name, k), partial(build, k), device, dtype) if k <= LARGEST_FIRST else None

    def _hartley(self, x: Tensor) -> Tensor:
        """Apply the fallback by FFT; it is its own transpose and inverse."""
        odd = odd_part(self.size)
        spread = hadamard_transform(x.reshape(-1, odd, self.size // odd))
        return _hartley_transform(spread).reshape(x.shape)


@cache
def _first_factor(n: int) -> tuple[str, int]:
    """Return which matrix stands before the Walsh-Hadamard matrix for vectors of n, and its size."""
    odd = odd_part(n)
    k = 1 if odd == 1 else 4 * odd
    return ("hadamard", k) if k in SIZES and n % k == 0 else ("hartley", odd)


def odd_part(n: int) -> int:
    """Return n without its factors of two."""
    return n // (n & -n)


def _hadamard(k: int) -> Tensor:
    return hadamard_matrix(k).double() / math.sqrt(k)


def _hartley_matrix(odd: int) -> Tensor:
    index = torch.arange(odd)
    angle = (index[:, None] * index % odd).double() * (2 * math.pi / odd)
    return (angle.cos() + angle.sin()) / math.sqrt(odd)


def _hartley_transform(x: Tensor) -> Tensor:
    """Apply the orthonormal Hartley matrix along the second dimension of (rows, odd, n)."""
    half = torch.fft.rfft(x, dim=1, norm="ortho")
    mirrored = (half.real[:, 1:] + half.imag[:, 1:]).flip(1)  # the other half of the spectrum is conjugate
    return torch.cat((half.real - half.imag, mirrored), dim=1)


def _near_halves(n: int) -> tuple[int, int]:
    """Return a·b = n: the products of n's prime factors, in order, at even and at odd places."""
    primes, rest, divisor = [], n, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    primes += [rest] if rest > 1 else []
    return math.prod(primes[::2]), math.prod(primes[1::2])


def _random(size: int, place: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix in float64: the Q of normal numbers, with R's diagonal positive."""
    index = torch.arange(size * size, dtype=torch.int64)
    salt = (seed * 2 + place) * (1 << 40)
    radius = (-2 * _uniform(2 * index + salt).log()).sqrt()
    normal = radius * (2 * math.pi * _uniform(2 * index + 1 + salt)).cos()
    q, r = torch.linalg.qr(normal.view(size, size))
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal


def _uniform(index: Tensor) -> Tensor:
    """Hash int64 numbers into (0, 1): the finalizer of splitmix64, whose products wrap around."""
    z = index * -7046029254386353131  # 0x9e3779b97f4a7c15
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94d049bb133111eb
    return (_shift(z ^ _shift(z, 31), 11).double() + 0.5) * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros."""
    return z >> bits & (1 << 64 - bits) - 1
