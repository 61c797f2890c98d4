"""Backends for the core's own tests: one a layout, one with only the required hooks, one that needs data."""

from dataclasses import dataclass

from modq import QuantizerInfo


@dataclass(frozen=True)
class AffineOptions:
    bits: int = 4
    group_size: int = 32
    zeros: str = "integer"
    permuted: bool = False


@dataclass(frozen=True)
class BookOptions:
    block_size: int = 32
    nested: bool = False


@dataclass(frozen=True)
class NoOptions:
    pass


def _info(name, cls, options, **more):
    return QuantizerInfo(
        name=name,
        summary="for tests",
        implementation=f"modq_toys_hooks:{cls}",
        options=f"modq_toys:{options}",
        bits=(4,),
        max_relative_error={4: 1.0},
        **more,
    )


AFFINE = _info("toy-affine", "ToyAffine", "AffineOptions")
BOOK = _info("toy-book", "ToyBook", "BookOptions")
BARE = _info("toy-bare", "ToyBare", "NoOptions", multiple_of=(2, 4))
CALIBRATED = _info("toy-calibrated", "ToyCalibrated", "NoOptions", calibration="hessian")
BLOCK = _info("toy-block", "ToyBlock", "NoOptions", calibration="block")
