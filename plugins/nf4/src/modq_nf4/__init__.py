"""NF4 and FP4 with optional double quantization (QLoRA) as a quantizer of modq. This imports no torch."""

from modq.spec import Format, QuantizerInfo

INFO = QuantizerInfo(
    name="nf4",
    summary="NF4 and FP4 with double quantization (QLoRA), the format of bitsandbytes",
    implementation="modq_nf4.quantizer:NF4",
    options="modq_nf4.options:Options",
    bits=(4,),
    api=(1, 1),
    max_relative_error={4: 0.13},
    formats=(
        Format(
            name="bitsandbytes",
            when={"quant_method": "bitsandbytes", "load_in_4bit": True},
            tensors=(
                "weight",
                "weight.absmax",
                "weight.quant_map",
                "weight.nested_absmax",
                "weight.nested_quant_map",
                "weight.quant_state.bitsandbytes__nf4",
                "weight.quant_state.bitsandbytes__fp4",
            ),
            marker="weight.absmax",
            native=("bitsandbytes",),
        ),
    ),
)
