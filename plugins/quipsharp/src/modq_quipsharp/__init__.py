"""QuIP# and the original QuIP as a quantizer of modq. This imports no torch."""

from modq.spec import QuantizerInfo

INFO = QuantizerInfo(
    name="quipsharp",
    summary="QuIP#: lattice codes of 2, 3 or 4 bits behind random Hadamard rotations; also the original QuIP",
    implementation="modq_quipsharp.quantizer:QuipSharp",
    options="modq_quipsharp.options:Options",
    bits=(2, 3, 4),
    max_relative_error={2: 0.325, 3: 0.185, 4: 0.105},
    calibration="optional",
    multiple_of=(1, 8),
)
