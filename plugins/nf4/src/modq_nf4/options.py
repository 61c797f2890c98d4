"""What a user may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

QuantType = Literal["nf4", "fp4"]
BLOCK_SIZES = tuple(2**k for k in range(5, 13))
"""32 to 4096, as in bitsandbytes."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the nf4 backend."""

    quant_type: QuantType = "nf4"
    """The code table: quantiles of a normal distribution (nf4), or small floating point numbers (fp4)."""

    block_size: int = field(default=64, metadata={"shorthand": "group_size"})
    """Weights that share a scale: a run of the flattened matrix."""

    double_quant: bool = True
    """Whether to quantize the scales too: they take 0.127 bits a weight instead of 0.5 (block_size 64)."""

    def __post_init__(self) -> None:
        if self.quant_type not in get_args(QuantType):
            raise ValueError(f"quant_type={self.quant_type!r}, expected 'nf4' or 'fp4'")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size!r}, expected a power of two from 32 to 4096")
