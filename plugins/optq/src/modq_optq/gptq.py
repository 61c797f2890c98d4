"""GPTQ checkpoints, in and out, as AutoGPTQ and GPTQModel write them.

A linear of (out, in) with G groups is a handful of tensors, b bits a code:

    qweight   int32 (in·b/32, out)   codes, a little-endian bit stream down each column
    qzeros    int32 (G, out·b/32)    zeros, a little-endian bit stream along each row
    scales    float16 (G, out)       bfloat16 where the model is
    g_idx     int32 (in,)            the group of each input; may lack where it is i // group_size

In the first format ("gptq", or none named) qzeros hold z − 1, in the second ("gptq_v2") z. In the first, a
zero of 0 is a field of ones, and some kernels read it as 2^b: see `zero_wrap`.

A group whose inputs lie scattered (act-order) becomes a run: columns are sorted by group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modq import __version__
from modq.errors import CheckpointError, OptionError, ShapeError
from modq.layouts import pack_bits, unpack_bits
from modq.spec import ImportedLayer, QuantizedWeight
from modq_optq.layout import FORMAT_VERSION, layout_in, meta_of, transposed
from modq_optq.options import BITS, Options, ScaleDtype

WORD = 32
V2 = "gptq_v2"
_DTYPES: dict[torch.dtype, ScaleDtype] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def read_linear(tensors: Mapping[str, Tensor], config: Mapping[str, Any], format: str) -> ImportedLayer:
    """Turn the tensors of one linear into a quantized weight and its options.

    Args:
        tensors: by name, as above.
        config: the checkpoint's `quantization_config`.
        format: "gptq" or "gptq_v2".

    Raises:
        CheckpointError: if a tensor is missing, or tensors and config disagree.
    """
    bits, shape = _read_shape(tensors)
    settings, size = _fitting_settings(config, bits, shape[1], tensors["scales"].shape[0])
    columns = _sorted_columns(tensors.get("g_idx"), shape[1], size)
    wraps = format == V2 or bool(config.get("zero_wrap", True))
    zeros = _read_zeros(tensors["qzeros"], bits, 0 if format == V2 else 1, wraps)
    symmetric = bool(settings.get("sym", True)) and bool((zeros == 1 << bits - 1).all())
    order = _act_order(settings, is_sorted=columns is not None, is_single=size == shape[1])
    options = Options(
        bits=bits,
        group_size=settings.get("group_size"),
        symmetric=symmetric,
        **order,
        mse=bool(_told(config, "mse", 0.0)),
        damping=_damping(config),
        scale_dtype=_DTYPES[tensors["scales"].dtype],
        zero_wrap=wraps,
    )
    packed = {
        "codes": transposed(tensors["qweight"]).view(torch.uint8),
        "scales": transposed(tensors["scales"]),
    }
    if columns is not None:
        codes = unpack_bits(packed["codes"], bits, slice(0, shape[1]))
        packed["codes"] = pack_bits(codes.index_select(1, columns), bits)
        packed["position"] = columns.argsort().int()
    if not symmetric:
        by_row = transposed(zeros)
        packed["zeros"] = (
            pack_bits(by_row.to(torch.uint8), bits) if wraps else by_row.to(tensors["scales"].dtype)
        )
    return ImportedLayer(QuantizedWeight("optq", FORMAT_VERSION, shape, packed, meta_of(options)), options)


def write_linear(qweight: QuantizedWeight, format: str) -> dict[str, Tensor]:
    """Turn a quantized weight into the tensors of one linear, the inverse of `read_linear`.

    Raises:
        ShapeError, OptionError: if the format cannot hold it.
    """
    layout = layout_in(qweight)
    if any(size % WORD for size in layout.shape):
        raise ShapeError(
            f"format {format!r} packs codes and zeros into words of 32 bits and holds no weight of shape "
            f"{layout.shape}, only multiples of 32; leave that layer dense (modules_to_not_convert)"
        )
    if layout.scale_dtype not in _DTYPES:
        raise OptionError(
            f"format {format!r} holds no scales of {layout.scale_dtype}; "
            "quantize with scale_dtype='float16' or 'bfloat16'"
        )
    packed = qweight.tensors
    codes, places = packed["codes"], torch.arange(layout.shape[1], device=packed["codes"].device)
    if layout.permuted:
        places = packed["position"].long()
        codes = pack_bits(layout.unpack(packed).index_select(1, places), layout.bits)
    return {
        "qweight": transposed(codes.view(torch.int32)),
        "qzeros": _write_zeros(_zeros_of(qweight), layout.bits, format),
        "scales": transposed(packed["scales"]),
        "g_idx": (places // layout.group_size).int(),
    }


def make_config(layers: Mapping[str, Options], format: str, dense: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint of such linears, and of dense ones of these names.

    Layers that differ from most others are named under `dynamic`, and so are the dense ones.
    """
    base = Counter(layers.values()).most_common(1)[0][0]
    common = _settings_of(base)
    inside = [name for name in dense if name != "lm_head"]
    overrides: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in inside}
    for name, options in layers.items():
        differing = {k: v for k, v in _settings_of(options).items() if v != common[k]}
        if differing:
            overrides[f"+:^{re.escape(name)}$"] = differing
    config = {
        "quant_method": "gptq",
        **common,
        "lm_head": "lm_head" in layers,
        "checkpoint_format": format,
        "format": format,
        "pack_dtype": "int32",
        "damp_percent": base.damping,
        "true_sequential": True,
        "static_groups": base.static_groups,
        "dynamic": overrides or None,
        "meta": {
            "quantizer": [f"modq:{__version__}"],
            "damp_percent": base.damping,
            "static_groups": base.static_groups,
            "act_order": base.act_order,  # ours: sorted with static groups, no loader need know of it
            "act_group_aware": base.act_order == "group",
            "mse": 2.4 if base.mse else 0.0,
        },
    }
    if inside:  # where transformers, which knows no `dynamic`, looks
        config["modules_in_block_to_quantize"] = [list(layers)]
    return config


def _settings_of(options: Options) -> dict[str, Any]:
    return {
        "bits": options.bits,
        "group_size": options.group_size or -1,
        "sym": options.symmetric,
        "desc_act": options.act_order == "full" and not options.static_groups,
    }


def _read_shape(tensors: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
    """Return the bits and the shape (out, in), which the tensors tell by themselves."""
    if missing := [name for name in ("qweight", "qzeros", "scales") if name not in tensors]:
        raise CheckpointError(f"a GPTQ linear lacks {', '.join(missing)}; is a shard missing?")
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32 or tensor.ndim != 2:
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{name} is {given}, expected a torch.int32 matrix: no other packing is read"
            )
    if scales.dtype not in _DTYPES:
        raise CheckpointError(f"scales are {scales.dtype}, expected torch.float16 or torch.bfloat16")
    words, out_features = qweight.shape
    bits = WORD * qzeros.shape[1] // out_features
    shape = (out_features, words * WORD // max(bits, 1))
    if (
        bits not in BITS
        or qzeros.shape[1] * WORD != bits * out_features
        or words * WORD != bits * shape[1]
        or tuple(scales.shape) != (qzeros.shape[0], out_features)
    ):
        given = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in ("qweight", "qzeros", "scales"))
        raise CheckpointError(
            f"{given} are no shapes of one linear in 2, 3, 4 or 8 bits; is the file damaged?"
        )
    return bits, shape


def _fitting_settings(
    config: Mapping[str, Any], bits: int, in_features: int, groups: int
) -> tuple[Mapping[str, Any], int]:
    """Return the config as it holds for this linear, by an override or without, and the group size."""
    for settings in _all_settings(config):
        given = settings.get("group_size")
        size = in_features if given in (None, -1) else min(given, in_features)
        if settings.get("bits") == bits and -(-in_features // size) == groups:
            return settings, size
    said = f"bits={config.get('bits')!r}, group_size={config.get('group_size')!r}"
    overrides = len(config.get("dynamic") or {})
    raise CheckpointError(
        f"the tensors hold {bits} bits and {groups} groups of {in_features} inputs, quantization_config says "
        f"{said} and {overrides} overrides in `dynamic`: config and tensors disagree"
    )


def _sorted_columns(g_idx: Tensor | None, in_features: int, size: int) -> Tensor | None:
    """Return the inputs in the order of their groups, None if they lie in it."""
    if g_idx is None:
        return None
    regular = torch.arange(in_features, device=g_idx.device) // size
    if torch.equal(g_idx, regular.to(g_idx.dtype)):
        return None
    columns = g_idx.argsort(stable=True)
    if g_idx.shape != regular.shape or not torch.equal(g_idx[columns], regular.to(g_idx.dtype)):
        raise CheckpointError(
            f"g_idx of shape {tuple(g_idx.shape)} does not put {in_features} inputs into groups of {size}: "
            "config and tensors disagree"
        )
    return columns


def _all_settings(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config, then as each override of `dynamic` changes it; `-:` names layers that are dense."""
    yield dict(config)
    for pattern, changed in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:"):
            yield {**config, **changed}


def _read_zeros(qzeros: Tensor, bits: int, offset: int, wraps: bool) -> Tensor:
    """Return the zeros, (groups, out) int32."""
    fields = unpack_bits(
        qzeros.contiguous().view(torch.uint8), bits, slice(0, qzeros.shape[1] * WORD // bits)
    )
    zeros = fields.int() + offset
    return zeros & 2**bits - 1 if wraps else zeros


def _write_zeros(zeros: Tensor, bits: int, format: str) -> Tensor:
    if format == V2 and int(zeros.max()) >> bits:
        raise OptionError(f"format {V2!r} holds no zero of {int(zeros.max())} in {bits} bits; write 'gptq'")
    fields = zeros if format == V2 else zeros - 1
    return pack_bits((fields & 2**bits - 1).to(torch.uint8), bits).view(torch.int32)


def _zeros_of(qweight: QuantizedWeight) -> Tensor:
    """Return the zeros, (groups, out) int32."""
    layout, device = layout_in(qweight), qweight.tensors["codes"].device
    if layout.zeros == "symmetric":
        middle = 1 << layout.bits - 1
        return torch.full((layout.groups, layout.shape[0]), middle, dtype=torch.int32, device=device)
    zeros = qweight.tensors["zeros"]
    if layout.zeros == "integer":
        zeros = unpack_bits(zeros, layout.bits, slice(0, layout.groups))
    return transposed(zeros).int()


def _act_order(settings: Mapping[str, Any], is_sorted: bool, is_single: bool) -> dict[str, Any]:
    """Return the options of the order; of a single group it is all the same whether groups are static."""
    if is_sorted or settings.get("desc_act") or _told(settings, "act_order", None) == "full":
        static = bool(_told(settings, "static_groups", False)) if is_single else not is_sorted
        return {"act_order": "full", "static_groups": static}
    by_group = _told(settings, "act_group_aware", False)
    return {
        "act_order": "group" if by_group else "none",
        "static_groups": bool(_told(settings, "static_groups", False)),
    }


def _damping(config: Mapping[str, Any]) -> float:
    given = _told(config, "damp_percent", None)
    return given if isinstance(given, float) and 0 < given <= Options().max_damping else Options().damping


def _told(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return what the config or its `meta` says: writers differ in where they put it."""
    for source in (config, config.get("meta") or {}):
        if source.get(key) is not None:
            return source[key]
    return default
