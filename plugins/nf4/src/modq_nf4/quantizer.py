"""The hooks of the nf4 backend: absmax blocks into a table of 16, all of it done by the codebook layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modq.layouts import Codebook, NestedScales
from modq.spec import ImportedLayer, QuantizedWeight, TensorSpec, hookimpl
from modq_nf4 import bitsandbytes
from modq_nf4.options import Options
from modq_nf4.tables import CODES, dynamic_map

FORMAT_VERSION = 1


class NF4:
    """NF4 and FP4 with optional double quantization."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> Mapping[str, TensorSpec]:
        """Name the tensors of a layer of this shape."""
        return _layout(shape, options).specs()

    @hookimpl
    def quantize(self, weight: Tensor, options: Options) -> QuantizedWeight:
        """Quantize as bitsandbytes does: the same codes and the same scales."""
        shape = (weight.shape[0], weight.shape[1])
        tensors = _layout(shape, options).encode(weight)
        return QuantizedWeight("nf4", FORMAT_VERSION, shape, tensors, asdict(options))

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Decode a slice, bit-equal to bitsandbytes."""
        return _layout_of(qweight).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def layout(self, shape: tuple[int, int], meta: Mapping[str, Any]) -> Codebook:
        """Name the layout, which multiplies."""
        return _layout(shape, Options(**meta))

    @hookimpl
    def import_layers(self, tensors: Mapping[str, Tensor]) -> Mapping[str, ImportedLayer]:
        """Read one linear of a bitsandbytes checkpoint."""
        return {"": bitsandbytes.read_linear(tensors, FORMAT_VERSION)}

    @hookimpl
    def export_layers(self, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> dict[str, Tensor]:
        """Write one linear as bitsandbytes holds it."""
        return bitsandbytes.write_linear(weights[""], dtype)

    @hookimpl
    def export_config(self, options: Options, dtype: torch.dtype, dense: Sequence[str]) -> dict[str, Any]:
        """Make the config that sends a checkpoint to bitsandbytes."""
        return bitsandbytes.make_config(options, dtype, dense)


def _layout_of(qweight: QuantizedWeight) -> Codebook:
    return _layout(qweight.shape, Options(**qweight.meta))


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, int], options: Options) -> Codebook:
    # bitsandbytes on a CPU looks scales up in 65536 bins; on CUDA it searches, and 0.2 % of its codes differ.
    nested = NestedScales(dynamic_map(), bins=65536) if options.double_quant else None
    return Codebook(shape, CODES[options.quant_type], options.block_size, nested)
