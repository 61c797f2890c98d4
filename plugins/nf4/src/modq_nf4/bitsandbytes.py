"""bitsandbytes' 4-bit checkpoints, in and out, without bitsandbytes.

A linear there is a handful of tensors, here named by what follows the linear's own name:

    weight                    codes of the flat matrix, the first of two in the high half of a byte: (n, 1)
                              bytes, as uint8 or viewed in another dtype
    weight.absmax             the scales, float32; or their codes, uint8, if nested
    weight.quant_map          the table of 16
    weight.nested_absmax      second-level scales, if nested
    weight.nested_quant_map   the table of 256, if nested
    weight.quant_state.bitsandbytes__nf4 (or fp4)
                              JSON as a tensor of characters: block size, shape, dtype, offset of the scales

The numbers have the same bits as ours; only the packing differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from modq.errors import CheckpointError
from modq.layouts import pack_bits, unpack_bits
from modq.spec import ImportedLayer, QuantizedWeight
from modq_nf4.options import Options
from modq_nf4.tables import CODES, dynamic_map

STATE = "weight.quant_state.bitsandbytes__"
"""The name of the JSON, but for the quant_type that ends it."""

NESTED_BLOCK = 256


def read_linear(tensors: Mapping[str, Tensor], format_version: int) -> ImportedLayer:
    """Turn the tensors of one linear into a quantized weight and its options.

    Raises:
        CheckpointError: if a tensor is missing, or is not what NF4 and FP4 have.
    """
    state = _read_state(tensors)
    shape = (state["shape"][0], state["shape"][1])
    nested = "weight.nested_absmax" in tensors
    options = Options(state["quant_type"], state["blocksize"], nested)
    _check_table("weight.quant_map", tensors, CODES[options.quant_type])
    packed = {"codes": _read_codes(tensors["weight"], shape)}
    absmax = tensors["weight.absmax"]
    if nested:
        _check_table("weight.nested_quant_map", tensors, dynamic_map())
        _check_nested_block(state)
        packed["scale_codes"] = absmax
        packed["scale_scales"] = tensors["weight.nested_absmax"].float()
        packed["scale_offset"] = torch.tensor([state["nested_offset"]], device=absmax.device)
    else:
        packed["scales"] = absmax.float()
    return ImportedLayer(QuantizedWeight("nf4", format_version, shape, packed, asdict(options)), options)


def write_linear(qweight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Turn a quantized weight into the tensors of one linear, the inverse of `read_linear`.

    Args:
        qweight: an nf4 weight.
        dtype: what bitsandbytes shall dequantize to: the model's dtype.
    """
    options = Options(**qweight.meta)
    state: dict[str, Any] = {
        "quant_type": options.quant_type,
        "blocksize": options.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(qweight.shape),
    }
    tensors = {
        "weight": _write_codes(qweight.tensors["codes"], qweight.shape),
        "weight.quant_map": torch.tensor(CODES[options.quant_type]),
    }
    if options.double_quant:
        offset = qweight.tensors["scale_offset"].item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors["weight.absmax"] = qweight.tensors["scale_codes"]
        tensors["weight.nested_absmax"] = qweight.tensors["scale_scales"]
        tensors["weight.nested_quant_map"] = torch.tensor(dynamic_map())
    else:
        tensors["weight.absmax"] = qweight.tensors["scales"]
    tensors[STATE + options.quant_type] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def make_config(options: Options, dtype: torch.dtype, dense: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint of such linears, and of dense ones of these names."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }


def _read_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    name = next((name for name in tensors if name.startswith(STATE)), None)
    needed = ("weight", "weight.absmax", "weight.quant_map")
    missing = [*(n for n in needed if n not in tensors), *([] if name else [f"{STATE}nf4"])]
    if missing or name is None:
        raise CheckpointError(f"a bitsandbytes linear lacks {', '.join(missing)}; is a shard missing?")
    try:
        state: dict[str, Any] = json.loads(bytes(tensors[name].cpu().tolist()))
        (_, _), _, _ = state["shape"], state["quant_type"], state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is not the JSON of a 4-bit linear ({error!r}); is the file damaged?"
        ) from None
    return state


def _check_nested_block(state: Mapping[str, Any]) -> None:
    if state.get("nested_blocksize") != NESTED_BLOCK or "nested_offset" not in state:
        given = state.get("nested_blocksize")
        raise CheckpointError(f"nested_blocksize={given!r}, expected {NESTED_BLOCK} and a nested_offset")


def _check_table(name: str, tensors: Mapping[str, Tensor], expected: tuple[float, ...]) -> None:
    table = tensors.get(name)
    if table is None or not torch.equal(table.float().cpu(), torch.tensor(expected)):
        raise CheckpointError(f"{name} is not the table of bitsandbytes; modq-nf4 reads no other")


def _read_codes(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = stored.contiguous().view(-1).view(torch.uint8)
    count = shape[0] * shape[1]
    if flat.numel() < (count + 1) // 2:
        raise CheckpointError(f"weight holds {2 * flat.numel()} codes, expected the {count} of shape {shape}")
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[:count]
    return pack_bits(codes.view(shape), 4)


def _write_codes(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    codes = unpack_bits(packed, 4, slice(0, shape[1])).flatten()
    if codes.numel() % 2:
        codes = torch.cat((codes, codes.new_zeros(1)))
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
