"""What a user may choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Bits = Literal[8, 4, 3, 2, 1]
Axis = Literal[1, 0]
ScaleDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the hqq backend; from `optimize` on they steer the solver, see solver.py."""

    bits: Bits = 4
    """The width of a code."""

    group_size: int | None = 64
    """Weights that share a scale and a zero. None or 0: a whole row (axis 1), a whole column (axis 0)."""

    axis: Axis = 1
    """1: a group is a run of inputs. 0: it mixes weights of many outputs; slower, a little more accurate."""

    scale_dtype: ScaleDtype = "float16"
    """What scales and zeros are stored in. float16 takes weights neither tiny nor huge; float32 any."""

    optimize: bool = True
    """Whether to fit the zeros. Without, this is rounding to the nearest of an even grid."""

    iters: int = 20
    """The most steps to take; they end earlier when the mean error stops falling."""

    lp_norm: float = 0.7
    """The p of the error |W - Ŵ|^p: the smaller, the less do outliers count."""

    beta: float = 10.0
    """The weight of the penalty that ties the split variable to the error."""

    kappa: float = 1.0
    """What beta is multiplied by after each step. The paper has 1.01, the package takes no such factor."""

    round_zero: bool | None = None
    """Whether the zeros start as integers; None: at 4 bits only, as the package does."""

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, get_args(Bits))
        _check_choice("axis", self.axis, get_args(Axis))
        _check_choice("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        if self.group_size is not None and self.group_size < 0:
            raise ValueError(f"group_size={self.group_size!r}, expected at least 1, or None for a whole row")
        if self.iters < 1:
            raise ValueError(f"iters={self.iters!r}, expected at least 1; optimize=False takes no step")
        if not 0 < self.lp_norm <= 1:
            raise ValueError(f"lp_norm={self.lp_norm!r}, expected more than 0 and at most 1")
        for name, value in (("beta", self.beta), ("kappa", self.kappa)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}, expected a positive number")

    @property
    def rounds_zero(self) -> bool:
        """Whether the zeros start as integers."""
        return self.bits == 4 if self.round_zero is None else self.round_zero

    def group_of(self, shape: tuple[int, int]) -> int:
        """Return the group size for a weight of this shape."""
        return self.group_size or shape[self.axis]


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}, expected {' or '.join(map(repr, choices))}")
