"""Codes that stand for short vectors, sums of entries of several codebooks: what additive quantizers write.

    Ŵ[o, v·j : v·j + v] = s[o] · (C_0[c[o, j, 0]] + C_1[c[o, j, 1]] + …)        v = vector_size

c are codes of up to 16 bits into `codebooks` tables of 2^bits vectors each, which belong to the layer: they
were learnt with it. Schemes are called by codebooks x bits: 1x16 and 2x8 with vectors of 8 have 2 bits a
weight, and the codebooks add 2^bits · 8 numbers each.

Tensors of a (out, in) matrix:

    codes      uint8 for up to 8 bits, else int16 of the same bits, (out, in / v, codebooks)
    codebooks  dtype (codebooks, 2^bits, v)
    scales     dtype (out,)

Of a code that is wider than its bits, the high bits are ignored: no tensor makes a kernel read elsewhere. The
entries are added in order and then scaled, each operation rounded, in float32 (in float64 if asked for).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from modq.errors import OptionError, ShapeError
from modq.kernels import dispatch
from modq.layouts import _slices as common
from modq.spec import FewRows, TensorSpec


@dataclass(frozen=True)
class VectorCodebook:
    """An (out, in) matrix of codes for vectors along its rows, each a sum of entries of learnt codebooks."""

    shape: tuple[int, int]
    codebooks: int
    bits: int
    dtype: torch.dtype
    vector_size: int = 8
    kernels: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("modq.kernels.cpu:VECTOR",)}

    def __post_init__(self) -> None:
        common.check_shape(self.shape)
        if not 1 <= self.bits <= 16:
            raise OptionError(f"bits={self.bits!r}, expected 1 to 16")
        if self.codebooks < 1:
            raise OptionError(f"codebooks={self.codebooks!r}, expected at least 1")
        if self.vector_size < 1:
            raise OptionError(f"vector_size={self.vector_size!r}, expected at least 1")
        if self.shape[1] % self.vector_size:
            raise ShapeError(
                f"in_features={self.shape[1]} is no multiple of vector_size={self.vector_size}; "
                "take a vector_size that divides it"
            )
        common.compute_dtype(self.dtype)

    @property
    def kind(self) -> str:
        """What the speed of decoding depends on."""
        return f"vector {self.codebooks}x{self.bits} of {self.vector_size}"

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:  # each product checks them
        return self.specs()

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a matrix in this layout."""
        code_dtype = torch.uint8 if self.bits <= 8 else torch.int16
        return {
            "codes": TensorSpec(self._code_shape, code_dtype),
            "codebooks": TensorSpec((self.codebooks, 2**self.bits, self.vector_size), self.dtype),
            "scales": TensorSpec((self.shape[0],), self.dtype),
        }

    def pack(self, codes: Tensor, codebooks: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Pack codes into tensors.

        Args:
            codes: (out, in / vector_size, codebooks) int32, from 0 to 2^bits - 1.
            codebooks: (codebooks, 2^bits, vector_size) in dtype.
            scales: (out,) in dtype.

        Raises:
            OptionError: a code names no entry.
        """
        specs = self.specs()
        common.check_tensor("codes", codes, TensorSpec(self._code_shape, torch.int32))
        common.check_tensor("codebooks", codebooks, specs["codebooks"])
        common.check_tensor("scales", scales, specs["scales"])
        low, high = (int(edge) for edge in codes.aminmax())
        if low < 0 or high >= 2**self.bits:
            raise OptionError(f"codes from {low} to {high}, expected from 0 to {2**self.bits - 1}")
        packed = {"codes": codes.to(specs["codes"].dtype), "codebooks": codebooks, "scales": scales}
        return {name: tensor.detach().clone().contiguous() for name, tensor in packed.items()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (out, in / vector_size, codebooks) int32."""
        common.check_tensors(tensors, self._specs)
        return self._indices(tensors["codes"])

    def dequantize(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense Ŵ[rows, columns], decoding no more than the vectors that it touches."""
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
        first, last = columns.start // self.vector_size, -(-columns.stop // self.vector_size)
        codes = self._indices(tensors["codes"][rows, first:last])
        values = self._entries(tensors, codes, 0, dtype)
        for book in range(1, self.codebooks):
            values.add_(self._entries(tensors, codes, book, dtype))
        values = values.view(len(codes), (last - first) * self.vector_size)
        values.mul_(tensors["scales"][rows, None].to(dtype))
        skip = columns.start - first * self.vector_size
        return values[:, skip : skip + columns.stop - columns.start]

    @property
    def _code_shape(self) -> tuple[int, int, int]:
        return (self.shape[0], self.shape[1] // self.vector_size, self.codebooks)

    def _indices(self, codes: Tensor) -> Tensor:
        return codes.int().bitwise_and_(2**self.bits - 1)

    def _entries(self, tensors: Mapping[str, Tensor], codes: Tensor, book: int, dtype: torch.dtype) -> Tensor:
        """Look the codes up in one codebook: (vectors, vector_size), a tensor of its own."""
        return tensors["codebooks"][book].index_select(0, codes[..., book].flatten()).to(dtype)
