"""Indices into a small table with a scale for each block of weights: what QLoRA's data types write.

    Ŵ.flat[k] = table[c[k]] · s[k // block_size]

c are codes of 1, 2, 3 or 4 bits. Blocks run over the flat, row-major matrix: some straddle rows where
block_size does not divide in_features, and the last is short where it does not divide the whole. With nested
scales (QLoRA's double quantization) the scales are themselves codes, of 8 bits, about an offset:

    s[j] = nested.table[d[j]] · t[j // nested.block_size] + offset

which is a codebook again, of a matrix of scales; this module reads it as one. The arithmetic is done in this
order in float32, each operation rounded, which makes it bit-equal to bitsandbytes.

Tensors of a (out, in) matrix with N = ceil(out·in / block_size) blocks:

    codes         uint8 (out, ceil(in·bits/8))              c, a bit stream along each row, see bitpack.py
    scales        float32 (N,)                              without nested scales; with them, instead:
    scale_codes   uint8 (N,)                                d
    scale_scales  float32 (ceil(N / nested.block_size),)    t
    scale_offset  float32 (1,)

Encoding takes absmax scales and the nearest entry; halfway between two, the lesser. The table need not be in
order: the search uses a sorted copy and maps back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modq.errors import OptionError, WeightError
from modq.kernels import dispatch
from modq.layouts import _slices as common
from modq.layouts.bitpack import decode_bits, pack_bits, packed_bytes, unpack_bits
from modq.materialize import BLOCK_ELEMENTS
from modq.spec import FewRows, TensorSpec

_BITS = {2: 1, 4: 2, 8: 3, 16: 4, 256: 8}
"""The code width for each length of a table."""


@dataclass(frozen=True, slots=True)
class NestedScales:
    """How scales are quantized too: an 8-bit table, and how many scales share a second-level scale.

    With `bins`, encoding first rounds to that many evenly spaced numbers in [-1, 1], as a search by lookup
    table does. It changes the choice only for numbers that are closer to a midpoint than a bin.
    """

    table: tuple[float, ...]
    block_size: int = 256
    bins: int | None = None

    def __post_init__(self) -> None:
        _check_table(self.table, (256,))
        _check_block_size(self.block_size)


@dataclass(frozen=True)
class Codebook:
    """An (out, in) matrix of indices into a table with a scale for each block of the flat matrix."""

    shape: tuple[int, int]
    table: tuple[float, ...]
    block_size: int
    nested: NestedScales | None = None
    kernels: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("modq.kernels.cpu:CODEBOOK",)}

    def __post_init__(self) -> None:
        common.check_shape(self.shape)
        _check_table(self.table, tuple(_BITS))
        _check_block_size(self.block_size)

    @property
    def bits(self) -> int:
        """The width of a code."""
        return _BITS[len(self.table)]

    @property
    def blocks(self) -> int:
        """How many blocks the matrix has."""
        return -(-self.shape[0] * self.shape[1] // self.block_size)

    @property
    def kind(self) -> str:
        """What the speed of decoding depends on."""
        return f"codebook {self.bits} bits"

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:  # each product checks them
        return self.specs()

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a matrix in this layout."""
        out_features, in_features = self.shape
        codes = TensorSpec((out_features, packed_bytes(in_features, self.bits)), torch.uint8)
        if self.nested is None:
            return {"codes": codes, "scales": TensorSpec((self.blocks,), torch.float32)}
        return {
            "codes": codes,
            "scale_codes": TensorSpec((self.blocks,), torch.uint8),
            "scale_scales": TensorSpec((-(-self.blocks // self.nested.block_size),), torch.float32),
            "scale_offset": TensorSpec((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a weight (out, in) of any float dtype, a few rows at a time.

        The scales are absmax: this is for tables whose largest magnitude is 1.
        """
        common.compute_dtype(weight.dtype)
        common.check_tensor("weight", weight, TensorSpec(self.shape, weight.dtype))
        weight = weight.detach()
        codes = torch.empty(self.specs()["codes"].shape, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(self.blocks, dtype=torch.float32, device=weight.device)
        for rows in self._whole_block_rows():
            nearest, block_scales = self._encode_run(weight[rows].float().flatten())
            codes[rows] = pack_bits(nearest.view(-1, self.shape[1]), self.bits)
            start = rows.start * self.shape[1] // self.block_size
            scales[start : start + len(block_scales)] = block_scales
        return _finite({"codes": codes, **self._pack_scales(scales)})

    def pack(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Pack codes (out, in) uint8 and scales (blocks,) float32, quantizing the scales if nested."""
        common.check_tensor("codes", codes, TensorSpec(self.shape, torch.uint8))
        common.check_tensor("scales", scales, TensorSpec((self.blocks,), torch.float32))
        return _finite({"codes": pack_bits(codes, self.bits), **self._pack_scales(scales.clone())})

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (out, in) uint8."""
        common.check_tensors(tensors, self._specs)
        return unpack_bits(tensors["codes"], self.bits, slice(0, self.shape[1]))

    def dequantize(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense Ŵ[rows, columns], decoding no more than that."""
        common.check_tensors(tensors, self._specs)
        return common.dequantize(self, tensors, dtype, rows, columns)

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Multiply: x @ Ŵ.T, or x @ Ŵ if `transpose`; any leading dimensions, the dtype of x."""
        common.check_tensors(tensors, self._specs)
        common.check_input(x, self.shape, transpose)
        return dispatch.multiply(self, x, tensors, transpose)

    def few_rows(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows | None:
        """Return what multiplies a few rows by these tensors: see `modq.spec.Layout`."""
        common.check_tensors(tensors, self._specs)
        return dispatch.few_rows(self, tensors, dtype)

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Decode a slice, computing in `dtype`."""
        in_features, height, width = self.shape[1], rows.stop - rows.start, columns.stop - columns.start
        values = decode_bits(tensors["codes"][rows], self.bits, columns, self.table, dtype)
        if in_features % self.block_size == 0:  # every row has blocks of its own
            self._scale(values, tensors, self.shape, rows, columns)
            return values
        if width == in_features:  # whole rows follow one another: the slice is a run of the flat matrix
            run = slice(rows.start * in_features, rows.stop * in_features)
            flat = values.reshape(1, -1)
            self._scale(flat, tensors, (1, self.shape[0] * in_features), slice(0, 1), run)
            return flat.view(height, width)
        return values.mul_(self._gather_scales(tensors, dtype, rows, columns))

    def _scale(
        self,
        values: Tensor,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        rows: slice,
        columns: slice,
    ) -> None:
        """Scale a slice in place, of a matrix of `shape` in which no block straddles rows."""
        touched = slice(columns.start // self.block_size, -(-columns.stop // self.block_size))
        grid = (shape[0], -(-shape[1] // self.block_size))
        scales = self._scales(tensors, grid, values.dtype, rows, touched)
        for part, scale in common.by_group(values, scales, self.block_size, columns.start % self.block_size):
            part.mul_(scale)

    def _gather_scales(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return one scale a weight, for a slice whose blocks begin at another column in every row."""
        device = tensors["codes"].device
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        block = (
            row * self.shape[1] + torch.arange(columns.start, columns.stop, device=device)
        ) // self.block_size
        scales = self._scales(tensors, (1, self.blocks), dtype, slice(0, 1), slice(0, self.blocks))
        return scales.flatten().index_select(0, block.flatten()).view_as(block)

    def _scales(
        self,
        tensors: Mapping[str, Tensor],
        grid: tuple[int, int],
        dtype: torch.dtype,
        rows: slice,
        columns: slice,
    ) -> Tensor:
        """Return a slice of the scales, seen as a matrix of shape `grid`."""
        if self.nested is None:
            return tensors["scales"].view(grid)[rows, columns].to(dtype)
        inner = Codebook(grid, self.nested.table, self.nested.block_size)
        codes = {"codes": tensors["scale_codes"].view(grid), "scales": tensors["scale_scales"]}
        return inner.decode(codes, dtype, rows, columns).add_(tensors["scale_offset"].to(dtype))

    def _pack_scales(self, scales: Tensor) -> dict[str, Tensor]:
        if self.nested is None:
            return {"scales": scales}
        offset = scales.mean().view(1)
        inner = Codebook((1, self.blocks), self.nested.table, self.nested.block_size)
        codes, scale_scales = inner._encode_run(scales - offset, self.nested.bins)
        return {"scale_codes": codes, "scale_scales": scale_scales, "scale_offset": offset}

    def _encode_run(self, run: Tensor, bins: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode a run of float32 that starts with a block: codes (n,) uint8 and absmax scales (blocks,)."""
        if bins is None and (encoded := dispatch.encoded(self, run)) is not None:
            return encoded
        padded = F.pad(run, (0, -len(run) % self.block_size)).view(-1, self.block_size)
        scales = padded.abs().amax(dim=1)
        # A block of zeros has scale 0; dividing by the least normal number instead keeps it zeros.
        unit = padded * (1 / scales.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
        if bins is not None:
            half = (bins - 1) / 2
            unit = ((unit + 1) * half).round() / half - 1
        return self._nearest(unit.flatten()[: len(run)]), scales

    def _nearest(self, unit: Tensor) -> Tensor:
        """Return the code of the nearest entry; a number halfway between two takes the lower one."""
        table = torch.tensor(self.table, dtype=torch.float32, device=unit.device)
        order = table.argsort(stable=True)
        numbers = table[order]
        places = torch.bucketize(unit, (numbers[1:] + numbers[:-1]) / 2, out_int32=True)
        return order.to(torch.uint8).index_select(0, places)

    def _whole_block_rows(self) -> list[slice]:
        """Cut the rows into slices that start with a block."""
        out_features, in_features = self.shape
        period = self.block_size // math.gcd(self.block_size, in_features)
        step = max(1, BLOCK_ELEMENTS // (in_features * period)) * period
        return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def _check_table(table: tuple[float, ...], lengths: tuple[int, ...]) -> None:
    if len(table) not in lengths:
        raise OptionError(f"a table of {len(table)} entries, expected {' or '.join(map(str, lengths))}")


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise OptionError(f"block_size={block_size!r}, expected at least 1")


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raise a WeightError if a scale is not a number that float32 can hold, else give the tensors back."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightError(f"{name!r} would hold NaN or Inf; expected a weight that is finite in float32")
    return tensors
