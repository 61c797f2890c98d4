"""HQQ's checkpoints in safetensors, in and out, without the hqq package.

A linear there is a handful of tensors, here named by what follows the linear's own name. Its codes are those
of the matrix of groups, (groups, group_size) for axis 1 and (group_size, groups) for axis 0, which is the
flat weight seen anew:

    W_q                   the codes; a word holds one of each k-th part of the rows, from its high bits down:
                          8 bits uint8, 4 and 2 and 1 bits uint8 with k = 2, 4, 8, 3 bits int32 with k = 10
                          (rows filled up with zeros); the bytes may be viewed as floats
    scale, zero           Ŵ = (q − zero)·scale, (groups, 1) for axis 1 and (1, groups) for axis 0
    nbits, group_size, axis, shape, packing, view_as_float, …
                          what they say, as numbers; texts as their ASCII codes

hqq runs such texts as Python; here they are compared with what they may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modq.errors import CheckpointError, OptionError, ShapeError
from modq.spec import JSON
from modq_hqq.options import Options

PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
_NEEDED = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing")
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear of either side: codes (out, in) uint8; scales and zeros in the order of the groups."""

    shape: tuple[int, int]
    options: Options
    codes: Tensor
    scales: Tensor
    zeros: Tensor


def read_linear(tensors: Mapping[str, Tensor], config: Mapping[str, JSON]) -> Linear:
    """Read the tensors of one linear.

    Raises:
        CheckpointError: if a tensor is missing or not what it should be, or they and the config disagree.
    """
    _refuse_quantized_numbers(tensors, config)
    if missing := [name for name in _NEEDED if name not in tensors]:
        raise CheckpointError(f"an hqq linear lacks {', '.join(missing)}; is a shard missing?")
    shape = _read_shape(tensors["shape"])
    options = _read_options(tensors)
    _check_config(options, config)
    matrix = _grouped_shape(shape, options)
    if matrix is None:
        raise CheckpointError(f"group_size={options.group_size} does not divide the weights of shape {shape}")
    groups = matrix[1 - options.axis]
    for name in ("scale", "zero"):
        if tensors[name].numel() != groups:
            given = tensors[name].numel()
            raise CheckpointError(f"{name} holds {given} numbers, expected {groups}, one for each group")
    codes = unpack_rows(_words(tensors["W_q"], matrix, options.bits), options.bits)[: matrix[0]]
    return Linear(shape, options, codes.reshape(shape), tensors["scale"].flatten(), tensors["zero"].flatten())


def write_linear(linear: Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Write the tensors of one linear, the inverse of `read_linear`.

    Args:
        linear: its codes, scales and zeros.
        dtype: what hqq shall dequantize to: the model's dtype.
    """
    options, matrix = linear.options, _grouped_shape(linear.shape, linear.options)
    if matrix is None:
        raise ShapeError(
            f"group_size={options.group_size} does not divide the weights of shape {linear.shape}, which hqq "
            "needs; save it as modq"
        )
    per_group = (matrix[0], 1) if options.axis == 1 else (1, matrix[1])
    words = pack_rows(linear.codes.view(matrix), options.bits)
    return {
        "W_q": words,
        "scale": linear.scales.reshape(per_group),
        "zero": linear.zeros.reshape(per_group),
        "nbits": _number(options.bits),
        "group_size": _number(options.group_of(linear.shape)),
        "axis": _number(options.axis),
        "shape": torch.tensor(linear.shape),
        "packing": _text(PACKINGS[options.bits]),
        "unpack_view_dtype": _text(str(words.dtype)),
        "compute_dtype": _text(str(dtype)),
        "optimize": _flag(options.optimize),
        "round_zero": _flag(options.rounds_zero),
        **{name: _flag(True) for name in ("channel_wise", "encoded_state_dict", "stores_quant_config")},
        **{name: _flag(False) for name in ("view_as_float", "quant_scale", "quant_zero", "offload_meta")},
    }


def make_config(layers: Mapping[str, Options], dense: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint.

    Args:
        layers: the options of the quantized linears, by name.
        dense: the names of the others.

    Raises:
        OptionError: if linears of one tag differ: HQQ has no words for that.
    """
    tags: dict[str, dict[str, Any]] = {}
    for name, options in layers.items():
        if tags.setdefault(linear_tag(name), _entry(options)) != _entry(options):
            raise _one_kind_only(linear_tag(name), "differ")
    skipped = list(dict.fromkeys(map(linear_tag, dense)))
    for tag in skipped:
        if tag in tags:
            raise _one_kind_only(tag, "are quantized in part")
    entries = list(tags.values())
    alike = all(entry == entries[0] for entry in entries)
    return {"quant_method": "hqq", "quant_config": entries[0] if alike else tags, "skip_modules": skipped}


def _entry(options: Options) -> dict[str, Any]:
    return {
        "weight_quant_params": {
            "nbits": options.bits,
            "channel_wise": True,
            "group_size": options.group_size or None,
            "optimize": options.optimize,
            "round_zero": options.rounds_zero,
            "axis": options.axis,
            "view_as_float": False,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def _one_kind_only(tag: str, deed: str) -> OptionError:
    return OptionError(
        f"the linears {tag!r} {deed}, and hqq has one setting for each kind of linear; "
        "quantize them alike, or save the model as modq"
    )


def linear_tag(name: str) -> str:
    """Return what HQQ configs call a linear: its name without `model`, `layers` and numbers.

    >>> linear_tag("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
    """
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("model", "layers") and not part.isnumeric())


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Unpack words (rows, n) into codes (k·rows, n) uint8, k of them in a word."""
    shifts = _shifts(bits)
    return torch.cat([(words >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts])


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, n) uint8 into words, the inverse of `unpack_rows`; 3 bits fill up with zeros.

    Raises:
        ShapeError: if the rows are no multiple of the codes in a word, other than at 3 bits.
    """
    shifts = _shifts(bits)
    rows = codes.shape[0]
    if bits == 3:
        codes = F.pad(codes, (0, 0, 0, -rows % len(shifts))).int()
    elif rows % len(shifts):
        raise ShapeError(
            f"hqq packs {len(shifts)} rows of groups into one at {bits} bits, and the weight has {rows}; "
            "save it as modq"
        )
    words = codes.new_zeros((codes.shape[0] // len(shifts), codes.shape[1]))
    for part, shift in zip(codes.chunk(len(shifts)), shifts, strict=True):
        words |= part << shift
    return words


def _grouped_shape(shape: tuple[int, int], options: Options) -> tuple[int, int] | None:
    """Return the shape of the matrix of groups, None where they do not divide the weight."""
    group_size = options.group_of(shape)
    groups, rest = divmod(shape[0] * shape[1], group_size)
    if rest:
        return None
    return (groups, group_size) if options.axis == 1 else (group_size, groups)


def _shifts(bits: int) -> range:
    """Where the codes of a word stand, from the high one down."""
    top = 27 if bits == 3 else 8 - bits
    return range(top, -1, -bits)


def _refuse_quantized_numbers(tensors: Mapping[str, Tensor], config: Mapping[str, JSON]) -> None:
    """Refuse quantized scales and zeros, which hqq itself gave up, by the name of what shows them."""
    for name in ("scale", "zero"):
        flag, told = f"quant_{name}", f"{name}_quant_params"
        signs = [key for key in (f"{name}_q", "zero_scale") if key in tensors]
        signs += [flag] if flag in tensors and _read_number(flag, tensors[flag]) else []
        signs += [told] if name not in tensors and any(params.get(told) for params in _params(config)) else []
        if signs:
            raise CheckpointError(
                f"the {name}s are quantized or packed away ({signs[0]}), which modq-hqq does not read; "
                "quantize the model again with plain ones"
            )


def _read_options(tensors: Mapping[str, Tensor]) -> Options:
    widths = {packing: bits for bits, packing in PACKINGS.items()}
    packing, nbits = _read_text("packing", tensors), _read_number("nbits", tensors["nbits"])
    if widths.get(packing) != nbits:
        known = ", ".join(f"{bits} with {name}" for bits, name in PACKINGS.items())
        raise CheckpointError(f"nbits={nbits} with packing={packing!r}, expected {known}")
    if "channel_wise" in tensors and not _read_number("channel_wise", tensors["channel_wise"]):
        raise CheckpointError("channel_wise is false, expected a scale for each group: quantize again so")
    scale, zero = tensors["scale"].dtype, tensors["zero"].dtype
    if scale != zero or scale not in _SCALE_DTYPES:
        known = ", ".join(map(str, _SCALE_DTYPES))
        raise CheckpointError(f"scale is {scale} and zero {zero}, expected both in one of {known}")
    flags = [name for name in ("optimize", "round_zero") if name in tensors]
    given: dict[str, Any] = {
        "bits": nbits,
        "group_size": _read_number("group_size", tensors["group_size"]),
        "axis": _read_number("axis", tensors["axis"]),
        "scale_dtype": _SCALE_DTYPES[scale],
        **{name: bool(_read_number(name, tensors[name])) for name in flags},
    }
    try:
        return Options(**given)
    except ValueError as error:
        raise CheckpointError(f"an hqq linear has {error}") from None


def _check_config(options: Options, config: Mapping[str, JSON]) -> None:
    """Refuse tensors that the config does not announce: it has one entry, or one for each kind of linear."""
    told = [params["weight_quant_params"] for params in _params(config)]
    found = {"nbits": options.bits, "group_size": options.group_size, "axis": options.axis}
    if told and not any(all(entry.get(key) in (None, found[key]) for key in found) for entry in told):
        shown = "; ".join(str({key: entry.get(key) for key in found}) for entry in told)
        raise CheckpointError(f"config and tensors disagree: the tensors have {found}, the config {shown}")


def _params(config: Mapping[str, JSON]) -> list[Mapping[str, JSON]]:
    """Return the entries of a config of either form: one for all linears, or one for each tag."""
    stored = config.get("quant_config")
    if not isinstance(stored, Mapping):
        return []
    entries = [stored] if "weight_quant_params" in stored else stored.values()
    return [
        e for e in entries if isinstance(e, Mapping) and isinstance(e.get("weight_quant_params"), Mapping)
    ]


def _words(stored: Tensor, matrix: tuple[int, int], bits: int) -> Tensor:
    """Check the packed codes of a matrix of groups, and view them as integers if they are floats."""
    dtype = torch.int32 if bits == 3 else torch.uint8
    shape = (-(-matrix[0] // len(_shifts(bits))), matrix[1])
    words = stored
    if stored.is_floating_point() and stored.nbytes == shape[0] * shape[1] * dtype.itemsize:
        words = stored.flatten().view(torch.uint8).view(dtype).view(shape)
    if words.dtype != dtype or tuple(words.shape) != shape:
        given = f"{words.dtype} of shape {tuple(words.shape)}"
        raise CheckpointError(f"W_q is {given}, expected {dtype} of shape {shape} at {bits} bits")
    return words


def _read_shape(stored: Tensor) -> tuple[int, int]:
    sizes = stored.flatten().tolist()
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"shape is {sizes}, expected (out_features, in_features)")
    return sizes[0], sizes[1]


def _read_number(name: str, stored: Tensor) -> int:
    """Read a flag or a whole number; hqq stores such as 0-d tensors."""
    value = float(stored) if stored.numel() == 1 else math.nan
    if not value.is_integer():
        given = f"of shape {tuple(stored.shape)}" if stored.numel() != 1 else f"{value:g}"
        raise CheckpointError(f"{name} is {given}, expected one whole number")
    return int(value)


def _read_text(name: str, tensors: Mapping[str, Tensor]) -> str:
    codes = tensors[name].flatten().tolist()
    if not all(isinstance(code, int) and 32 <= code < 127 for code in codes):
        raise CheckpointError(f"{name} is no text in ASCII codes; is the file damaged?")
    return "".join(map(chr, codes))


def _number(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def _flag(value: bool) -> Tensor:
    return torch.tensor(value, dtype=torch.uint8)


def _text(value: str) -> Tensor:
    return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
