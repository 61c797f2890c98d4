"""The hooks of the optq backend: OPTQ's codes in the affine layout, and GPTQ checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modq.errors import WeightError
from modq.layouts import Affine
from modq.spec import Calibration, ImportedLayer, QuantizedWeight, TensorSpec, hookimpl
from modq_optq import gptq
from modq_optq.grid import Grid
from modq_optq.hessian import checked_hessian, inverse_factor
from modq_optq.layout import FORMAT_VERSION, layout_by_meta, layout_in, layout_of, meta_of, transposed
from modq_optq.options import Options
from modq_optq.solve import Order, Solution, full_order, group_order, natural_order, solve


class OPTQ:
    """OPTQ (GPTQ) with 2, 3, 4 or 8 bits."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> Mapping[str, TensorSpec]:
        """Name the tensors of a layer of this shape."""
        return layout_of(shape, options).specs()

    @hookimpl
    def quantize(self, weight: Tensor, options: Options, calibration: Calibration | None) -> QuantizedWeight:
        """Quantize column by column, and make up for each error in the columns that follow."""
        if calibration is None or calibration.hessian is None:
            raise WeightError(
                "optq needs the second moments of the layer's inputs (a Hessian); calibrate first"
            )
        shape = (weight.shape[0], weight.shape[1])
        layout = layout_of(shape, options)
        hessian = checked_hessian(calibration.hessian.to(weight.device), shape[1])
        importance = hessian.diagonal()
        order = _order(importance, layout.group_size, options)
        factor = inverse_factor(hessian, order.columns, options.damping, options.max_damping)
        # Where the input is always zero the weight has no effect: it shall not widen a group's grid.
        dense = weight.detach().float().masked_fill(importance == 0, 0)
        grid = Grid(options.bits, options.symmetric, options.mse, layout.scale_dtype)
        solution = solve(dense, factor, order, layout.group_size, grid, options.static_groups)
        return QuantizedWeight(
            "optq", FORMAT_VERSION, shape, _pack(solution, layout, order), meta_of(options)
        )

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Decode a slice."""
        return layout_in(qweight).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def layout(self, shape: tuple[int, int], meta: Mapping[str, Any]) -> Affine:
        """Name the layout, which multiplies."""
        return layout_by_meta(shape, meta)

    @hookimpl
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], format: str
    ) -> Mapping[str, ImportedLayer]:
        """Read one linear of a GPTQ checkpoint."""
        return {"": gptq.read_linear(tensors, config, format)}

    @hookimpl
    def export_layers(self, weights: Mapping[str, QuantizedWeight], format: str) -> dict[str, Tensor]:
        """Write one linear as GPTQ holds it."""
        return gptq.write_linear(weights[""], format)

    @hookimpl
    def export_config(
        self, layers: Mapping[str, Options], format: str, dense: Sequence[str]
    ) -> dict[str, Any]:
        """Make the config that sends a checkpoint to what reads GPTQ."""
        return gptq.make_config(layers, format, dense)


def _order(importance: Tensor, group_size: int, options: Options) -> Order:
    if options.act_order == "full":
        return full_order(importance, group_size, options.static_groups)
    if options.act_order == "group":
        return group_order(importance, group_size)
    return natural_order(importance.shape[0], group_size, importance.device)


def _pack(solution: Solution, layout: Affine, order: Order) -> dict[str, Tensor]:
    zeros = position = None
    if layout.zeros != "symmetric":
        dtype = torch.uint8 if layout.zeros == "integer" else layout.scale_dtype
        zeros = transposed(solution.zeros).to(dtype)
    if layout.permuted:
        position = order.places[order.columns.argsort()].int()
    scales = transposed(solution.scales).to(layout.scale_dtype)
    return layout.pack(transposed(solution.codes), scales, zeros, position)
