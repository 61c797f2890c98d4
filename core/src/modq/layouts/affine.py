"""Integers with a scale and a zero for each group of inputs: what most integer quantizers write.

    Ŵ[o, i] = s[o, g] · (q[o, p] − z[o, g])        p = i, or position[i] if the layout is permuted
                                                   g = p // group_size

q are integers of 1, 2, 3, 4 or 8 bits, s any numbers (negative ones included), and z one of

    symmetric   2^(bits−1) everywhere, held by no tensor
    integer     integers of the width of q
    float       any numbers, in the dtype of the scales

The last group is short where group_size does not divide in_features. A permuted layout keeps the columns in
the order in which they were quantized (act-order), so that a group is always a run of neighbours:
position[i] is where column i stands.

Tensors of a (out, in) matrix with G = ceil(in / group_size) groups:

    codes     uint8 (out, ceil(in·bits/8))    q, a bit stream along each row, see bitpack.py
    scales    scale_dtype (out, G)
    zeros     integer: uint8 (out, ceil(G·bits/8)), a bit stream too; float: scale_dtype (out, G)
    position  permuted: int32 (in,)

In a product a permutation costs next to nothing: with the activations permuted (x in one direction, the
result in the other) Ŵ stays in stored order. Gathering Ŵ's columns instead would touch every weight again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from modq.errors import OptionError
from modq.kernels import dispatch
from modq.layouts import _slices as common
from modq.layouts.bitpack import (
    check_width,
    decode_bits,
    pack_bits,
    packed_bytes,
    unpack_bits,
    unpack_bits_at,
)
from modq.spec import FewRows, TensorSpec

Zeros = Literal["symmetric", "integer", "float"]


@dataclass(frozen=True)
class Affine:
    """An (out, in) matrix of integers with a scale and a zero for each group of inputs."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    zeros: Zeros
    scale_dtype: torch.dtype
    permuted: bool = False
    kernels: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("modq.kernels.cpu:AFFINE",)}

    def __post_init__(self) -> None:
        common.check_shape(self.shape)
        check_width(self.bits)
        if self.group_size < 1:
            raise OptionError(f"group_size={self.group_size!r}, expected at least 1")
        if self.zeros not in get_args(Zeros):
            raise OptionError(f"zeros={self.zeros!r}, expected {' or '.join(map(repr, get_args(Zeros)))}")
        common.compute_dtype(self.scale_dtype)

    @property
    def groups(self) -> int:
        """How many groups a row has."""
        return -(-self.shape[1] // self.group_size)

    @property
    def kind(self) -> str:
        """What the speed of decoding depends on."""
        return f"affine {self.bits} bits"

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:  # each product checks them
        return self.specs()

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a matrix in this layout."""
        out_features, in_features = self.shape
        scales = TensorSpec((out_features, self.groups), self.scale_dtype)
        specs = {
            "codes": TensorSpec((out_features, packed_bytes(in_features, self.bits)), torch.uint8),
            "scales": scales,
        }
        if self.zeros == "integer":
            specs["zeros"] = TensorSpec((out_features, packed_bytes(self.groups, self.bits)), torch.uint8)
        elif self.zeros == "float":
            specs["zeros"] = scales
        if self.permuted:
            specs["position"] = TensorSpec((in_features,), torch.int32)
        return specs

    def pack(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, position: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pack one uint8 a weight into tensors.

        Args:
            codes: (out, in) uint8, in stored order.
            scales: (out, groups) in scale_dtype: round them before the codes are chosen, not here.
            zeros: (out, groups), uint8 if integer, scale_dtype if float, None if symmetric.
            position: (in,) int32, where each column stands, if permuted.
        """
        common.check_tensor("codes", codes, TensorSpec(self.shape, torch.uint8))
        common.check_tensor("scales", scales, self.specs()["scales"])
        tensors = {"codes": pack_bits(codes, self.bits), "scales": scales.clone()}
        _check_given("zeros", zeros, self.zeros != "symmetric", f"zeros={self.zeros!r}")
        _check_given("position", position, self.permuted, f"permuted={self.permuted}")
        if zeros is not None:
            tensors["zeros"] = self._pack_zeros(zeros)
        if position is not None:
            tensors["position"] = self._checked_position(position)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (out, in) uint8, in stored order."""
        common.check_tensors(tensors, self._specs)
        return unpack_bits(tensors["codes"], self.bits, slice(0, self.shape[1]))

    def dequantize(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense Ŵ[rows, columns], decoding no more than that."""
        common.check_tensors(tensors, self._specs)
        decode = self._decode_permuted if self.permuted else None
        return common.dequantize(self, tensors, dtype, rows, columns, decode)

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Multiply: x @ Ŵ.T, or x @ Ŵ if `transpose`; any leading dimensions, the dtype of x."""
        common.check_tensors(tensors, self._specs)
        common.check_input(x, self.shape, transpose)
        if self.permuted and not transpose:
            x = torch.empty_like(x).index_copy_(-1, tensors["position"].long(), x)
        y = dispatch.multiply(self, x, tensors, transpose)
        return y.index_select(-1, tensors["position"]) if self.permuted and transpose else y

    def few_rows(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows | None:
        """Return what multiplies a few rows by these tensors: see `modq.spec.Layout`."""
        common.check_tensors(tensors, self._specs)
        if self.permuted:  # x is to be gathered first
            return None
        return dispatch.few_rows(self, tensors, dtype)

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Decode a slice of the matrix in stored order, computing in `dtype`."""
        values = decode_bits(tensors["codes"][rows], self.bits, columns, self._integers(), dtype)
        groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
        offset = columns.start % self.group_size
        if self.zeros != "symmetric":
            zeros = self._decode_zeros(tensors, dtype, rows, groups)
            for part, zero in common.by_group(values, zeros, self.group_size, offset):
                part.sub_(zero)
        scales = tensors["scales"][rows, groups].to(dtype)
        for part, scale in common.by_group(values, scales, self.group_size, offset):
            part.mul_(scale)
        return values

    def _decode_permuted(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Decode a slice in the order of the inputs: gather each column from where it stands."""
        places = tensors["position"][columns]
        groups = places // self.group_size
        values = unpack_bits_at(tensors["codes"][rows], self.bits, places).to(dtype)
        if self.zeros == "symmetric":
            values.sub_(self._middle)
        else:
            zeros = self._decode_zeros(tensors, dtype, rows, slice(0, self.groups))
            values.sub_(zeros.index_select(1, groups))
        return values.mul_(tensors["scales"][rows].to(dtype).index_select(1, groups))

    @property
    def _middle(self) -> int:
        return 1 << self.bits - 1

    def _integers(self) -> tuple[float, ...]:
        """What the codes stand for before scales and zero tensors."""
        zero = self._middle if self.zeros == "symmetric" else 0
        return tuple(float(code - zero) for code in range(2**self.bits))

    def _decode_zeros(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, groups: slice
    ) -> Tensor:
        if self.zeros == "float":
            return tensors["zeros"][rows, groups].to(dtype)
        integers = tuple(float(code) for code in range(2**self.bits))
        return decode_bits(tensors["zeros"][rows], self.bits, groups, integers, dtype)

    def _pack_zeros(self, zeros: Tensor) -> Tensor:
        if self.zeros == "integer":
            common.check_tensor("zeros", zeros, TensorSpec((self.shape[0], self.groups), torch.uint8))
            return pack_bits(zeros, self.bits)
        common.check_tensor("zeros", zeros, self.specs()["zeros"])
        return zeros.clone()

    def _checked_position(self, position: Tensor) -> Tensor:
        common.check_tensor("position", position, self.specs()["position"])
        places = torch.arange(self.shape[1], dtype=torch.int32, device=position.device)
        if not torch.equal(position.sort().values, places):
            raise OptionError(f"position is no permutation, expected each of 0 to {self.shape[1] - 1} once")
        return position.clone()


def _check_given(name: str, tensor: Tensor | None, needed: bool, because: str) -> None:
    if (tensor is not None) != needed:
        given, expected = ("None", "a tensor") if needed else ("a tensor", "None")
        raise OptionError(f"{name} is {given}, expected {expected} in a layout with {because}")
