"""Backends that work on blocks as a whole: one mends what `quantize` made, one makes all of it there."""

from __future__ import annotations

from dataclasses import dataclass

from modq import QuantizerInfo


@dataclass(frozen=True)
class Options:
    """`mend=False` has the hook decline; `wrong` has it break the contract in one way."""

    mend: bool = True
    wrong: str = ""


MENDING = QuantizerInfo(
    name="mending",
    summary="for tests",
    implementation="modq_in_blocks_hooks:Mending",
    options="modq_in_blocks:Options",
    bits=(16,),
    max_relative_error={16: 1.0},
    calibration="optional",
)

AT_ONCE = QuantizerInfo(
    name="at-once",
    summary="for tests",
    implementation="modq_in_blocks_hooks:AtOnce",
    options="modq_in_blocks:Options",
    bits=(16,),
    max_relative_error={16: 1.0},
    calibration="block",
)
