"""OPTQ (GPTQ) as a quantizer of modq, and GPTQ checkpoints in and out. This imports no torch."""

from modq.spec import Format, QuantizerInfo

_TENSORS = ("weight", "qweight", "qzeros", "scales", "g_idx")

INFO = QuantizerInfo(
    name="optq",
    summary="OPTQ (GPTQ): 2, 3, 4 and 8 bits, rounded so that each error is made up for by later columns",
    implementation="modq_optq.quantizer:OPTQ",
    options="modq_optq.options:Options",
    bits=(2, 3, 4, 8),
    api=(1, 1),
    calibration="hessian",
    max_relative_error={2: 0.62, 3: 0.27, 4: 0.125, 8: 0.0075},
    formats=(
        Format(
            name="gptq",
            when={"quant_method": "gptq", "checkpoint_format": (None, "gptq")},
            tensors=_TENSORS,
            marker="qweight",
            native=("gptqmodel",),
        ),
        Format(
            name="gptq_v2",
            when={"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
            tensors=_TENSORS,
            marker="qweight",
            native=("gptqmodel",),
        ),
    ),
)
