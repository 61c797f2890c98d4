"""The hooks of the outlier-int8 backend.

    Ŵ[o, i] = v[o, j]             where i = c[j], a column that is kept
    Ŵ[o, i] = s[o] · q[o, i]      elsewhere

A few inputs of a language model are far larger than the rest (LLM.int8(), arXiv 2208.07339), so errors in
their columns count most. Kept are the columns with the largest |W[:, i]|² · E[xᵢ²]; without data, E[xᵢ²] is
taken for 1. The integers need no packing, so no layout of modq is used; the products are modq's own, block by
block.

Tensors: codes int8 (out, in), scales float32 (out,), columns int32 (k,) in order, values bfloat16 (out, k).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modq import Calibration, QuantizedWeight, TensorSpec, hookimpl
from modq.errors import WeightError
from outlier_int8 import Options


class OutlierInt8:
    """Rounds all but the outlier columns."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> Mapping[str, TensorSpec]:
        """Name the tensors of a layer of this shape."""
        rows, kept = shape[0], _kept(shape, options)
        return {
            "codes": TensorSpec(shape, torch.int8),
            "scales": TensorSpec((rows,), torch.float32),
            "columns": TensorSpec((kept,), torch.int32),
            "values": TensorSpec((rows, kept), torch.bfloat16),
        }

    @hookimpl
    def quantize(self, weight: Tensor, options: Options, calibration: Calibration | None) -> QuantizedWeight:
        """Keep the columns that matter most, and put the largest of the others in each row on ±127."""
        shape = (weight.shape[0], weight.shape[1])
        matrix = weight.float()
        columns = _importance(matrix, calibration).topk(_kept(shape, options)).indices.sort().values
        rest = matrix.index_fill(1, columns, 0)
        scales = (rest.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        tensors = {
            "codes": (rest / scales[:, None]).round().to(torch.int8),
            "scales": scales,
            "columns": columns.to(torch.int32),
            "values": matrix[:, columns].to(torch.bfloat16),
        }
        if not (tensors["scales"].isfinite().all() and tensors["values"].isfinite().all()):
            raise WeightError("a weight is beyond bfloat16, expected none above 3e38; scale the matrix down")
        return QuantizedWeight("outlier-int8", 1, shape, tensors)

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Scale a slice of the codes, and put the kept columns that lie in it in their places."""
        tensors, wide = qweight.tensors, torch.float64 if dtype == torch.float64 else torch.float32
        dense = tensors["codes"][rows, columns].to(wide).mul_(tensors["scales"][rows, None].to(wide))
        inside = (tensors["columns"] >= columns.start) & (tensors["columns"] < columns.stop)
        places = tensors["columns"][inside].long() - columns.start
        dense[:, places] = tensors["values"][rows][:, inside].to(wide)
        return dense.to(dtype)


def _kept(shape: tuple[int, int], options: Options) -> int:
    return max(1, round(options.kept * shape[1]))


def _importance(matrix: Tensor, calibration: Calibration | None) -> Tensor:
    """Say how much each column counts, (in,)."""
    squares = matrix.square().sum(0)
    if calibration is None or calibration.hessian is None:
        return squares
    return squares * calibration.hessian.diagonal().to(squares)
