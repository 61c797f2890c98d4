"""QuIP# and the original QuIP as a quantizer of modq. This imports no torch."""

from modq.spec import Format, QuantizerInfo

INFO = QuantizerInfo(
    name="quipsharp",
    summary="QuIP#: lattice codes of 2, 3 or 4 bits behind random Hadamard rotations; also the original QuIP",
    implementation="modq_quipsharp.quantizer:QuipSharp",
    options="modq_quipsharp.options:Options",
    bits=(2, 3, 4),
    api=(1, 1),
    max_relative_error={2: 0.325, 3: 0.185, 4: 0.105},
    calibration="optional",
    multiple_of=(1, 8),
    formats=(
        Format(
            name="quip#",
            when={},
            tensors=(
                "Qidxs",
                "codebook_id",
                "SU",
                "SV",
                "Wscale",
                "fuse_scales",
                "scaleWH",
                # low-rank factors, which are refused: they must come here to be seen
                "A",
                "B",
            ),
            marker="Qidxs",
            native=(),  # no package loads them into transformers' own models
            config_key="quip_params",
            fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")},
            written=False,
        ),
    ),
)
