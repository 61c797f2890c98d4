"""NF4 and FP4 with optional double quantization (QLoRA) as a quantizer of modq. This imports no torch."""

from modq.spec import QuantizerInfo

INFO = QuantizerInfo(
    name="nf4",
    summary="NF4 and FP4 with double quantization (QLoRA), the format of bitsandbytes",
    implementation="modq_nf4.quantizer:NF4",
    options="modq_nf4.options:Options",
    bits=(4,),
    max_relative_error={4: 0.13},
)
