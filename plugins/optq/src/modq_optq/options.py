"""What a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ActOrder = Literal["none", "full", "group"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the optq backend."""

    bits: int = 4
    """Bits of a weight's code: 2, 3, 4 or 8."""

    group_size: int | None = 128
    """Weights of a row that share a scale; None or -1 for the whole row."""

    symmetric: bool = True
    """Whether zero is the middle code. If not, each group has a zero of its own, as wide as a code."""

    act_order: ActOrder = "group"
    """In which order columns are quantized, those with large inputs first: "none" as they come, "full" sorted
    (desc_act), "group" sorted inside the groups and the groups among themselves, at no cost in use."""

    static_groups: bool = False
    """Whether the scales are taken from the weights as given, instead of when a group's turn comes."""

    mse: bool = False
    """Whether to search each scale for the least rounding error, summed as |error|^2.4: slower."""

    damping: float = 0.01
    """What is added to the Hessian's diagonal, as a part of its mean; doubled until it can be factorized."""

    max_damping: float = 1.0
    """Beyond this damping the Hessian is refused."""

    scale_dtype: ScaleDtype = "float16"
    """What the scales are stored in."""

    zero_wrap: bool = True
    """Whether a zero of -1 in a GPTQ v1 checkpoint, a field of ones, stands for 0. False: for 2^bits."""

    def __post_init__(self) -> None:
        if self.group_size == -1:
            object.__setattr__(self, "group_size", None)  # one spelling for what is one thing
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}, expected 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size!r}, expected at least 1, or None for the whole row"
            )
        if self.act_order not in get_args(ActOrder):
            raise ValueError(f"act_order={self.act_order!r}, expected 'none', 'full' or 'group'")
        if self.scale_dtype not in get_args(ScaleDtype):
            given = self.scale_dtype
            raise ValueError(f"scale_dtype={given!r}, expected 'float16', 'bfloat16' or 'float32'")
        if not 0 < self.damping <= self.max_damping:
            pair = f"damping={self.damping!r}, max_damping={self.max_damping!r}"
            raise ValueError(f"{pair}, expected 0 < damping <= max_damping")
