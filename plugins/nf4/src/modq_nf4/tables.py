"""The constants of NF4, FP4 and double quantization, bit-equal to bitsandbytes'.

NF4's 16 numbers are quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et
al. 2023, https://arxiv.org/abs/2305.14314). FP4 has a sign bit, over eight magnitudes in twelfths, which are
not in order.

The dynamic map (Dettmers 2016, https://arxiv.org/abs/1511.04561) holds 256 numbers. For e = 0 … 6, the
interval [0.1, 1] is cut into 2^e equal parts, whose midpoints times 10^(e−6) count with both signs; then 0
and 1.

    [0.1 ···· 1]·10^−6, [0.1 ·· | ·· 1]·10^−5, …, [0.1 | | | … 64 parts … | 1]·10^0

The map is computed here in Python's own arithmetic and rounded to float32 where bitsandbytes rounds: the
linspace of a tensor library may round otherwise on another machine.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import pairwise

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in _FP4_TWELFTHS)

CODES = {"nf4": NF4, "fp4": FP4}


@cache
def dynamic_map() -> tuple[float, ...]:
    """Return the 256 numbers for nested scales, in ascending order."""
    magnitudes = [
        _float32(_float32(10.0 ** (e - 6)) * midpoint) for e in range(7) for midpoint in _midpoints(2**e)
    ]
    return tuple(sorted([*magnitudes, *(-number for number in magnitudes), 0.0, 1.0]))


def _midpoints(parts: int) -> list[float]:
    """Return the midpoints of `parts` equal parts of [0.1, 1]."""
    edges = _edges(parts)
    return [_float32(_float32(a + b) / 2) for a, b in pairwise(edges)]


def _edges(parts: int) -> list[float]:
    """Cut [0.1, 1] as a float32 linspace does: from the nearer end, each edge with one rounding."""
    low, high = _float32(0.1), 1.0
    step = _float32(_float32(high - low) / parts)
    return [
        _float32(low + step * i if 2 * i <= parts else high - step * (parts - i)) for i in range(parts + 1)
    ]


def _float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])
