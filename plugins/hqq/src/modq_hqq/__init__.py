"""HQQ (half-quadratic quantization) as a quantizer of modq. This imports no torch."""

from modq.spec import Format, QuantizerInfo

INFO = QuantizerInfo(
    name="hqq",
    summary="HQQ: integers of 1 to 8 bits, zeros fitted to the weights alone, no data needed",
    implementation="modq_hqq.quantizer:HQQ",
    options="modq_hqq.options:Options",
    bits=(1, 2, 3, 4, 8),
    api=(1, 1),
    max_relative_error={1: 1.55, 2: 0.455, 3: 0.193, 4: 0.092, 8: 0.0055},
    formats=(
        Format(
            name="hqq",
            when={"quant_method": "hqq"},
            tensors=(
                "W_q",
                "scale",
                "zero",
                "nbits",
                "group_size",
                "axis",
                "shape",
                "packing",
                "unpack_view_dtype",
                "compute_dtype",
                "view_as_float",
                "quant_scale",
                "quant_zero",
                "offload_meta",
                "channel_wise",
                "optimize",
                "round_zero",
                "encoded_state_dict",
                "stores_quant_config",
                # quantized scales and zeros, which are refused: they must come here to be seen
                "scale_q",
                "zero_q",
                "zero_scale",
            ),
            marker="W_q",
            native=(),  # transformers 5 lost its reader: with hqq installed too it leaves the linears random
        ),
    ),
)
