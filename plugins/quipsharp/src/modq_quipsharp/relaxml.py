"""QuIP# checkpoints of the paper's authors (relaxml on the hub), read as modq's weights.

Their modules are `qkv_proj` and `upgate_proj` (up first, then gate), which are fused, `o_proj` and
`down_proj`. Each holds

    Qidxs        int64 (m, n/32), n/16 or 3n/64   codes of 2, 4 or 3 bits, those of the second stage behind
    codebook_id  one integer                      7 E8P12, 17 E8P12RVQ4B, 18 E8P12RVQ3B
    SU, SV       float16 (n,), (m,)               fine-tuned, no mere signs
    Wscale       one float32
    fuse_scales  float32 (parts,)                 of fused modules: what each part's rows are multiplied by
    scaleWH      (n,)                             only if rescale_WH: what the inputs are divided by

An int64 of Qidxs holds 2 rows × 2 codes, slots i = 0 … 3 at (row i % 2, column i // 2): byte i is a code's
row in the table, and bit 32 + 4j + i is bit j of its sign byte. These words lie in tiles of 16 rows × 8
codes: (m/16, n/64, 8 row pairs, 4 column pairs). The codes of E81B are plain bytes, row by row.

The rotation of the outputs mixes the rows of all parts, so each part's weight refers to all codes of the
module (the same tensors, not copies) and says which rows are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modq.errors import CheckpointError
from modq.spec import ImportedLayer, QuantizedWeight
from modq_quipsharp.layout import layout_of
from modq_quipsharp.options import Options


@dataclass(frozen=True, slots=True)
class _Kind:
    """A codebook of theirs; `words` are the int64s that 64 weights take, in the first and second stage."""

    name: str
    version: int
    bits: int
    words: tuple[int, int]


_KINDS = {
    7: _Kind("E8P12", 1, 2, (2, 0)),
    17: _Kind("E8P12RVQ4B", 1, 4, (2, 2)),
    18: _Kind("E8P12RVQ3B", 0, 3, (2, 1)),
}


def read_module(
    tensors: Mapping[str, Tensor],
    parts: Sequence[tuple[str, int]],
    params: Mapping[str, Any],
    format_version: int = 1,
) -> dict[str, ImportedLayer]:
    """Turn the tensors of one module into the weights of its linears.

    Args:
        tensors: by what follows the module's name.
        parts: the name of each linear in it and its out_features, in order; one, if it is not fused.
        params: `quip_params` of config.json.
        format_version: what the weights shall say.

    Raises:
        CheckpointError: if it is of a kind that is not read, a tensor is missing, or sizes disagree.
    """
    _refuse_additions(tensors, params)
    kind = _kind(tensors, params)
    inputs, outputs = tensors["SU"].flatten(), tensors["SV"].flatten()
    shape = (len(outputs), len(inputs))
    if sum(rows for _, rows in parts) != shape[0]:
        told = " + ".join(f"{name} {rows}".strip() for name, rows in parts)
        raise CheckpointError(f"SV has {shape[0]} outputs, expected {told}; do config and tensors disagree?")
    scales = _scales(tensors, len(parts))
    shared = _unpack(tensors["Qidxs"], shape, kind)
    shared["input_scales"] = _half("SU", _rescaled(inputs, tensors))
    override = params.get("resid_scale_override", -1)
    layers, first = {}, 0
    for (name, rows), scale in zip(parts, scales.unbind(), strict=True):
        options = Options(
            bits=kind.bits,  # type: ignore[arg-type]  # one of the three widths
            residual_scale=float(override) if override > 0 and kind.bits > 2 else None,
            part_of=(shape[0], first) if len(parts) > 1 else (),
        )
        own = {
            "output_scales": _half("SV", outputs[first : first + rows]),
            "scale": scale.reshape(1),
        }
        layout = layout_of((rows, shape[1]), options)
        qweight = QuantizedWeight("quipsharp", format_version, layout.shape, {**shared, **own}, layout.meta)
        layers[name] = ImportedLayer(qweight, options)
        first += rows
    return layers


def unpack_e8p(words: Tensor) -> Tensor:
    """Return the codes in (m, n/32) int64, by rows: (m, n/8) int32 of 0 to 65535."""
    m, n = words.shape[0], words.shape[1] * 32
    slot = torch.arange(4, device=words.device)
    bit = torch.arange(8, device=words.device)[:, None]
    row = words[..., None] >> 8 * slot & 255
    signs = ((words[..., None, None] >> 32 + 4 * bit + slot & 1) << bit).sum(-2)
    # (16 rows, 64 columns, row pair, column pair, column of the pair, row of the pair)
    tiles = (row << 8 | signs).view(m // 16, n // 64, 8, 4, 2, 2)
    return tiles.permute(0, 2, 5, 1, 3, 4).reshape(m, n // 8).int()


def _unpack(words: Tensor, shape: tuple[int, int], kind: _Kind) -> dict[str, Tensor]:
    m, n = shape
    width = n // 64 * sum(kind.words)
    if m % 16 or n % 64 or words.dtype != torch.int64 or tuple(words.shape) != (m, width):
        raise CheckpointError(
            f"Qidxs is {words.dtype} of shape {tuple(words.shape)}, expected torch.int64 of {(m, width)} for "
            f"{kind.name} of {shape}, in multiples of (16, 64)"
        )
    first, second = words[:, : n // 64 * kind.words[0]], words[:, n // 64 * kind.words[0] :]
    tensors = {"codes": unpack_e8p(first).to(torch.int16)}
    if kind.bits == 4:
        tensors["residual"] = unpack_e8p(second).to(torch.int16)
    elif kind.bits == 3:
        tensors["residual"] = second.contiguous().view(torch.uint8)
    return tensors


def _refuse_additions(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> None:
    """Refuse what a module may have beside its codes and scales, whether tensors or `quip_params` show it."""
    for name, what in (("A", "low-rank factors"), ("B", "low-rank factors"), ("bias", "a bias")):
        if name in tensors:
            raise CheckpointError(f"a QuIP# module has {what} ({name}), which modq-quipsharp does not read")
    for name, what in (("lora_rank", "low-rank factors"), ("outlier_channel_split", "split channels")):
        if params.get(name):
            raise CheckpointError(
                f"config.json has {name} {params[name]!r}: {what}, which modq-quipsharp does not read"
            )
    if params.get("rescale_WH") and "scaleWH" not in tensors:
        raise CheckpointError("config.json has rescale_WH, and a module lacks scaleWH; is a shard missing?")


def _kind(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> _Kind:
    """Return which of their codebooks it is; refuse what is not read."""
    missing = [name for name in ("Qidxs", "codebook_id", "SU", "SV", "Wscale") if name not in tensors]
    if missing:
        raise CheckpointError(f"a QuIP# module lacks {', '.join(missing)}; is a shard missing?")
    number = int(tensors["codebook_id"])
    kind = _KINDS.get(number)
    known = ", ".join(f"{known} ({kind.name})" for known, kind in _KINDS.items())
    if kind is None:
        raise CheckpointError(
            f"codebook_id {number} ({params.get('codebook')!r}); modq-quipsharp reads {known}"
        )
    told = (params.get("codebook", kind.name), params.get("codebook_version", kind.version))
    if told != (kind.name, kind.version):
        raise CheckpointError(
            f"config.json has codebook {told[0]!r} of version {told[1]}, and codebook_id {number} is "
            f"{kind.name!r} of version {kind.version}; modq-quipsharp reads {known}"
        )
    return kind


def _scales(tensors: Mapping[str, Tensor], parts: int) -> Tensor:
    """Return one scale for each part."""
    scale = tensors["Wscale"].float().flatten()
    fused = tensors.get("fuse_scales")
    if fused is None:
        return scale.expand(parts)
    if fused.numel() != parts:
        raise CheckpointError(
            f"fuse_scales has {fused.numel()} numbers, expected {parts}, one for each linear"
        )
    return scale * fused.float().flatten()


def _rescaled(inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    if "scaleWH" not in tensors:
        return inputs
    return inputs.float() / tensors["scaleWH"].float().flatten()


def _half(name: str, scales: Tensor) -> Tensor:
    """Return scales as float16; theirs are, but for what is divided by scaleWH."""
    half = scales.half().contiguous()
    if not half.isfinite().all():
        raise CheckpointError(f"{name} has numbers beyond float16, expected at most 65504")
    return half
