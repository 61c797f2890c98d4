"""What a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Bits = Literal[2, 3, 4]
CodebookName = Literal["e8p", "uniform"]
RotationName = Literal["hadamard", "kronecker"]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the quipsharp backend: QuIP#; with codebook "uniform" and rotation "kronecker", QuIP."""

    bits: Bits = 2
    """Bits a weight."""

    codebook: CodebookName = "e8p"
    """What rotated weights are rounded to: points of the E8 lattice, eight at a time, or an even grid."""

    rotation: RotationName = "hadamard"
    """The orthogonal matrices around the codes: Hadamard, or random ones as a Kronecker product of two."""

    scale: float | None = None
    """The rms of the rotated weights in units of the codebook; None is a good one for these bits."""

    residual_scale: float | None = None
    """How much finer the second codes of e8p at 3 and 4 bits are; None is the published 2.04 and 3.45."""

    damping: float = 0.01
    """What is added to the diagonal of the Hessian, as a part of its mean."""

    tune_iters: int = 10
    """Passes of coordinate descent after the rounding; only with calibration."""

    tune_epochs: int = 0
    """Epochs of tuning scale vectors, norms and biases over each block as a whole; only with calibration."""

    tune_lr: float = 5e-4
    """Adam's learning rate for the scale vectors; that of norms and biases is a tenth of it."""

    rescale: bool = False
    """Whether to balance the columns of the weight with the inputs before the rotation."""

    seed: int = 0
    """Where the random signs, and the matrices of rotation "kronecker", come from."""

    part_of: tuple[int, ...] = ()
    """Of imported fused layers only: the rows of the whole fused matrix, and the first of this layer's."""

    def __post_init__(self) -> None:
        for name, choices in (("bits", Bits), ("codebook", CodebookName), ("rotation", RotationName)):
            if getattr(self, name) not in get_args(choices):
                expected = " or ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name}={getattr(self, name)!r}, expected {expected}")
        for name in ("scale", "residual_scale"):
            given = getattr(self, name)
            if given is not None and not 0 < given < float("inf"):
                raise ValueError(f"{name}={given!r}, expected a number above 0, or None")
        if self.residual_scale is not None and (self.codebook, self.bits) not in (("e8p", 3), ("e8p", 4)):
            raise ValueError("residual_scale is for codebook 'e8p' at 3 or 4 bits; leave it out")
        for name in ("damping", "tune_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a number above 0")
        for name in ("tune_iters", "tune_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected at least 0")
        if len(self.part_of) not in (0, 2) or not all(isinstance(n, int) and n >= 0 for n in self.part_of):
            raise ValueError(f"part_of={self.part_of!r}, expected (rows of the whole, first row), or none")
