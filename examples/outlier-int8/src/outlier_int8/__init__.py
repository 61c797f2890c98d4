"""8-bit integers with the outlier columns kept in bfloat16, as a quantizer of modq. This imports no torch."""

from dataclasses import dataclass

from modq import QuantizerInfo

INFO = QuantizerInfo(
    name="outlier-int8",
    summary="8-bit integers with a scale a row; the columns that matter most stay in bfloat16",
    implementation="outlier_int8.quantizer:OutlierInt8",
    options="outlier_int8:Options",
    bits=(8,),
    max_relative_error={8: 0.0085},
    calibration="optional",
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the outlier-int8 backend."""

    kept: float = 0.01
    """The share of columns that stay in bfloat16; at least one does."""

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= 1:
            raise ValueError(f"kept={self.kept!r}, expected a share from 0 to 1")
