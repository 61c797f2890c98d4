"""Groups over the flat matrix: the layout of HQQ where a group is not a part of one row.

HQQ lays its groups over the flattened (out, in) matrix. Of a weight with flat index f = o·in + i,

    axis 1    g = f // group_size      runs; the last may be short
    axis 0    g = f % groups           every so manieth weight: a group holds weights of many rows

with groups = ceil(out·in / group_size), and

    Ŵ[o, i] = s[g]·(q[o, i] − z[g])

Where group_size divides in_features, axis 1 is the core's affine layout, whose kernels serve it; the rest is
here. Where group_size does not divide the matrix, the package refuses; here the last run is short (axis 1),
or some groups have a weight less (axis 0).

Tensors:

    codes     uint8 (out, ceil(in·bits/8))    q, a stream of bits along each row, as in the core's layouts
    scales    scale_dtype (groups,)
    zeros     scale_dtype (groups,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modq.layouts import pack_bits, unpack_bits
from modq.materialize import BLOCK_ELEMENTS, blocks, blockwise_matmul
from modq.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Grouped:
    """An (out, in) matrix of integers with a scale and a zero for each group of the flat matrix."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    axis: int
    scale_dtype: torch.dtype

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a matrix in this layout."""
        out_features, in_features = self.shape
        per_group = TensorSpec((self.groups,), self.scale_dtype)
        codes = TensorSpec((out_features, -(-in_features * self.bits // 8)), torch.uint8)
        return {"codes": codes, "scales": per_group, "zeros": per_group}

    @property
    def groups(self) -> int:
        """How many groups the matrix has."""
        return count_groups(self.shape[0] * self.shape[1], self.group_size)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """Pack codes (out, in) uint8, scales and zeros (groups,) into tensors."""
        return {"codes": pack_bits(codes, self.bits), "scales": scales, "zeros": zeros}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (out, in) uint8."""
        return unpack_bits(tensors["codes"], self.bits, slice(0, self.shape[1]))

    def dequantize(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense Ŵ[rows, columns], decoding no more than that, a few rows at a time."""
        (first, last, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        height, width = last - first, right - left
        dense = torch.empty((height, width), dtype=dtype, device=tensors["codes"].device)
        for part in blocks(height, width, BLOCK_ELEMENTS) if height * width else ():
            lines = slice(first + part.start, first + part.stop)
            dense[part] = self._decode(tensors, dtype, lines, slice(left, right))
        return dense

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Multiply: x @ Ŵ.T, or x @ Ŵ if `transpose`; any leading dimensions, the dtype of x."""

        def dequantize_block(rows: slice, columns: slice) -> Tensor:
            return self._decode(tensors, x.dtype, rows, columns).to(x.dtype)

        return blockwise_matmul(x, dequantize_block, self.shape, transpose)

    def few_rows(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Decline: there is no kernel for this layout."""

    def _decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Decode a slice, in float64 for a result in float64, else in float32."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        values = unpack_bits(tensors["codes"][rows], self.bits, columns).to(compute)
        zeros, scales = self._spread((tensors["zeros"], tensors["scales"]), rows, columns)
        return values.sub_(zeros).mul_(scales)

    def _spread(self, per_group: tuple[Tensor, ...], rows: slice, columns: slice) -> list[Tensor]:
        """Turn numbers of groups into numbers of the weights of a slice."""
        out_features, in_features = self.shape
        row = torch.arange(rows.start, rows.stop, device=per_group[0].device)
        if self.axis == 0 and out_features % self.group_size == 0:  # groups of weights in one column each
            line = row % (out_features // self.group_size)
            return [each.view(-1, in_features)[:, columns].index_select(0, line) for each in per_group]
        if self.axis == 1 and columns.stop - columns.start == in_features:  # whole rows are one run
            run = slice(rows.start * in_features, rows.stop * in_features)
            return [self._run(each, run).view(-1, in_features) for each in per_group]
        column = torch.arange(columns.start, columns.stop, device=row.device)
        flat = row[:, None] * in_features + column
        group = flat // self.group_size if self.axis == 1 else flat % self.groups
        return [each.index_select(0, group.flatten()).view_as(group) for each in per_group]

    def _run(self, per_group: Tensor, run: slice) -> Tensor:
        """Repeat numbers of groups along a run of the flat matrix, for axis 1."""
        first, last = run.start // self.group_size, -(-run.stop // self.group_size)
        repeated = per_group[first:last, None].expand(-1, self.group_size).reshape(-1)
        return repeated[run.start - first * self.group_size :][: run.stop - run.start]


def count_groups(numel: int, group_size: int) -> int:
    """Return how many groups so many weights have."""
    return -(-numel // group_size)


def split_groups(flat: Tensor, group_size: int, axis: int) -> list[Tensor]:
    """View a flat matrix by its groups: one (groups, size) view for each size that occurs, in order."""
    numel = flat.numel()
    groups = count_groups(numel, group_size)
    if axis == 1:
        whole = numel // group_size * group_size
        views = [flat[:whole].view(-1, group_size), flat[whole:].view(1, -1)]
    else:
        size = -(-numel // groups)
        longer = numel - (size - 1) * groups  # the groups that have a weight in the last line
        views = [
            flat.as_strided((longer, size), (1, groups)),
            flat[longer:].as_strided((groups - longer, size - 1), (1, groups)),
        ]
    return [view for view in views if view.numel()]
