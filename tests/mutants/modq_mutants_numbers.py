"""Mistakes in what is computed."""

from __future__ import annotations

import math

import torch
from modq_mutant_register import caught_by
from modq_sound import TOP, Sound
from torch import Tensor

from modq import Calibration, QuantizedWeight, hookimpl
from modq.materialize import blocks


@caught_by("declared_error_is_the_measured_one", r"relative error of Ŵ is 1.4")
class SwappedNibbles(Sound):
    """The even column is read from the high half of the byte."""

    def unpack(self, packed: Tensor) -> Tensor:
        return torch.stack((packed >> 4, packed & TOP), 2).flatten(1)


@caught_by("declared_error_is_the_measured_one", r"relative error of Ŵ")
class ScaleOfTheNextGroup(Sound):
    """Groups are counted from one: each is decoded with its neighbour's scale."""

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor, size: int, start: int = 0) -> Tensor:
        return super().values(codes, scales.roll(-1, 1), zeros, size, start)


@caught_by("declared_error_is_the_measured_one", r"relative error of Ŵ")
class ZeroPointOffByOne(Sound):
    """The zero point is stored less one, as the first GPTQ format did, and read as it stands."""

    def decode(self, qweight: QuantizedWeight, rows: slice, columns: slice) -> Tensor:
        zeros = qweight.tensors["zeros"].float() - 1
        tensors = {**qweight.tensors, "zeros": zeros}
        return super().decode(
            QuantizedWeight(self.NAME, 1, qweight.shape, tensors, qweight.meta), rows, columns
        )


@caught_by("slices_equal_the_whole", r"differs from the whole")
class IgnoresTheColumns(Sound):
    """dequantize() cuts the rows and leaves the columns whole from the left."""

    def decode(self, qweight: QuantizedWeight, rows: slice, columns: slice) -> Tensor:
        return super().decode(qweight, rows, slice(0, columns.stop - columns.start))


@caught_by("slices_equal_the_whole", r"differs from the whole")
class GroupsCountedFromTheSlice(Sound):
    """The group of a column is counted from the slice's start instead of the row's."""

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor, size: int, start: int = 0) -> Tensor:
        return super().values(codes, scales, zeros, size, 0)


@caught_by("every_row_and_column_is_kept")
class DropsTheRaggedTail(Sound):
    """The last, shorter group gets no codes."""

    def codes(self, exact: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
        found = super().codes(exact, scales, zeros, size)
        found[:, exact.shape[1] // size * size :] = 0
        return found


@caught_by("dequantize_gives_the_dtype_asked_for", r"is torch.float32 .* expected torch.float64")
class AlwaysFloat32(Sound):
    """dequantize() returns what it computed in."""

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        return self.decode(qweight, rows, columns)


@caught_by("dequantize_gives_the_dtype_asked_for")
class RoundsToHalfOnTheWay(Sound):
    """The table of values is in float16, whatever dtype is asked for; float64 alone was computed."""

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        exact = self.decode(qweight, rows, columns)
        return exact.double() if dtype == torch.float64 else exact.half().to(dtype)


@caught_by("the_product_is_as_close_as_the_dense_one", r"torch.bfloat16")
class AddsUpInBfloat16(Sound):
    """The product is added up over slices of the inner dimension, in the dtype of x."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        depth = qweight.shape[0 if transpose else 1]
        y = x.new_zeros((*x.shape[:-1], qweight.shape[1 if transpose else 0]))
        for part in blocks(depth, 1, 8):
            rows, columns = (
                (part, slice(0, qweight.shape[1])) if transpose else (slice(0, qweight.shape[0]), part)
            )
            dense = self.decode(qweight, rows, columns).to(x.dtype)
            y += x[..., part] @ (dense if transpose else dense.T)
        return y


@caught_by("the_transposed_product_is_as_close_as_the_dense_one", r"which gives dX")
class TransposeByReshape(Sound):
    """The transposed product reshapes where it should transpose: right for no matrix but symmetric ones."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        if not transpose:
            return super().matmul(x, qweight, transpose)
        dense = self.decode(qweight, slice(0, qweight.shape[0]), slice(0, qweight.shape[1])).to(x.dtype)
        return x @ dense.T.reshape(qweight.shape)


@caught_by("leading_dimensions_are_kept")
class TwoDimensionsOnly(Sound):
    """matmul() was only ever tried on a batch of rows."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        _rows, _ = x.shape
        return super().matmul(x, qweight, transpose)


@caught_by("x_may_be_strided", r"x is transposed")
class ReadsMemoryInOrder(Sound):
    """A kernel reads x as if it were contiguous."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
        return super().matmul(torch.as_strided(x, x.shape, strides), qweight, transpose)


@caught_by("the_product_is_as_close_as_the_dense_one")
class DropsTheLastRows(Sound):
    """A kernel works on 16 rows at a time, and leaves the rest."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        y = super().matmul(x, qweight, transpose)
        if y is not None and y.dim() == 2 and y.shape[0] > 16:
            y[y.shape[0] // 16 * 16 :] = 0
        return y


@caught_by("the_product_is_as_close_as_the_dense_one", r"NaN or infinite")
class OverflowsInHalf(Sound):
    """The scale is taken out of the sum, which then leaves the range of float16."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        if x.dtype != torch.float16:
            return super().matmul(x, qweight, transpose)
        y = super().matmul(x * 4096, qweight, transpose)
        return None if y is None else y / 4096


@caught_by("the_product_is_as_close_as_the_dense_one", r"is off by 1 ")
class ZerosInsteadOfDeclining(Sound):
    """What it has no kernel for, it answers with zeros instead of None."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        if x.dtype == torch.float32:
            return super().matmul(x, qweight, transpose)
        return x.new_zeros((*x.shape[:-1], qweight.shape[1 if transpose else 0]))


@caught_by("the_product_is_as_close_as_the_dense_one", r"is torch.float32 .* expected torch.bfloat16")
class ProductInFloat32(Sound):
    """The product is returned in the dtype that it was computed in."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        return super().matmul(x.float() if x.dtype == torch.bfloat16 else x, qweight, transpose)


@caught_by("calibration_lowers_the_weighted_error", r"is calibration.hessian used")
class IgnoresTheCalibration(Sound):
    """It asks for calibration and makes nothing of it."""

    def importance(self, exact: Tensor, calibration: Calibration | None) -> Tensor | None:
        return None


@caught_by("calibration_lowers_the_weighted_error", r"is calibration.hessian used")
class InvertsTheHessian(Sound):
    """Columns that matter most count least."""

    def importance(self, exact: Tensor, calibration: Calibration | None) -> Tensor | None:
        found = super().importance(exact, calibration)
        return None if found is None else 1 / found
