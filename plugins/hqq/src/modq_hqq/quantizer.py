"""The hooks of the hqq backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modq.layouts import Affine
from modq.spec import JSON, ImportedLayer, QuantizedWeight, TensorSpec, hookimpl
from modq_hqq import checkpoint
from modq_hqq.grouped import Grouped, split_groups
from modq_hqq.options import Options
from modq_hqq.solver import quantize_groups

FORMAT_VERSION = 1


class HQQ:
    """Half-quadratic quantization: groups of integers with float scales and zeros."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> Mapping[str, TensorSpec]:
        """Name the tensors of a layer of this shape."""
        return _layout(shape, options).specs()

    @hookimpl
    def quantize(self, weight: Tensor, options: Options) -> QuantizedWeight:
        """Fit the zeros to the weight alone."""
        shape = (weight.shape[0], weight.shape[1])
        codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
        scales, zeros = quantize_groups(
            split_groups(weight.reshape(-1), options.group_of(shape), options.axis),
            split_groups(codes.view(-1), options.group_of(shape), options.axis),
            options,
        )
        return _packed(shape, options, codes, scales, zeros)

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Decode a slice."""
        return _layout_of(qweight).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def layout(self, shape: tuple[int, int], meta: Mapping[str, Any]) -> Affine | Grouped:
        """Name the layout, which multiplies."""
        return _layout(shape, Options(**meta))

    @hookimpl
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, JSON]
    ) -> Mapping[str, ImportedLayer]:
        """Read one linear of an HQQ checkpoint."""
        linear = checkpoint.read_linear(tensors, config)
        qweight = _packed(linear.shape, linear.options, linear.codes, linear.scales, linear.zeros)
        return {"": ImportedLayer(qweight, linear.options)}

    @hookimpl
    def export_layers(self, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> dict[str, Tensor]:
        """Write one linear as HQQ holds it."""
        qweight = weights[""]
        options, tensors = Options(**qweight.meta), qweight.tensors
        codes = _layout_of(qweight).unpack(tensors)
        linear = checkpoint.Linear(qweight.shape, options, codes, tensors["scales"], tensors["zeros"])
        return checkpoint.write_linear(linear, dtype)

    @hookimpl
    def export_config(self, dense: Sequence[str], layers: Mapping[str, Options]) -> dict[str, Any]:
        """Make the config of an HQQ checkpoint."""
        return checkpoint.make_config(layers, dense)


def _packed(
    shape: tuple[int, int], options: Options, codes: Tensor, scales: Tensor, zeros: Tensor
) -> QuantizedWeight:
    """Make the quantized weight of codes (out, in), and of scales and zeros in the order of the groups."""
    layout = _layout(shape, options)
    per_group = layout.specs()["scales"].shape
    tensors = layout.pack(codes, scales.reshape(per_group), zeros.reshape(per_group))
    return QuantizedWeight("hqq", FORMAT_VERSION, shape, tensors, asdict(options))


def _layout_of(qweight: QuantizedWeight) -> Affine | Grouped:
    return _layout(qweight.shape, Options(**qweight.meta))


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, int], options: Options) -> Affine | Grouped:
    group_size, dtype = options.group_of(shape), getattr(torch, options.scale_dtype)
    if options.axis == 1 and shape[1] % group_size == 0:
        return Affine(shape, options.bits, group_size, "float", dtype)
    return Grouped(shape, options.bits, group_size, options.axis, dtype)
