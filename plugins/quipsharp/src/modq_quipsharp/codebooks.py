"""What rotated weights are rounded to, how the codes are stored, and what they stand for.

A codebook rounds runs of `block` weights, that stand beside one another in a row, to the nearest of its
points, and names the point by one or two codes:

    E8P, 2 bits   e8p(c)                        codes     int16 (out, in/8)
    E8P, 3 bits   e8p(c) + e81b(d) / r          and       residual  uint8 (out, in/8)
    E8P, 4 bits   e8p(c) + e8p(d) / r           and       residual  int16 (out, in/8)
    Grid          c − (2^bits − 1) / 2          codes     uint8 (out, ceil(in·bits/8)), a bit stream by rows

d is chosen for what c leaves over. A 16-bit code is stored as the int16 of the same bits. Points are decoded
in units of `unit`: small integers, for which the caller corrects by one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from modq.kernels import dispatch
from modq.layouts import decode_bits, pack_bits, packed_bytes
from modq.materialize import BLOCK_ELEMENTS, blocks
from modq.spec import TensorSpec
from modq_quipsharp import cpu
from modq_quipsharp.constants import constant
from modq_quipsharp.e8 import e8p_table, e81b_points, e81b_table
from modq_quipsharp.nearest import nearest_e8p

RUNS_AT_ONCE = 1 << 14
"""How many runs of 8 are rounded at once: what that takes should stay in the cache."""


class Codebook(Protocol):
    """A set of points and how they are named."""

    block: ClassVar[int]
    unit: ClassVar[float]
    kernels: ClassVar[Mapping[str, tuple[str, ...]]]

    @property
    def kind(self) -> str:
        """What decides how fast codes are decoded; see `modq.kernels.dispatch`."""

    @property
    def stages(self) -> int:
        """How many codes name a point."""

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the tensors for a matrix of this shape."""

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round (n, block) float32: the points, and their codes (n, codes a point) int32."""

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Turn codes (out, in/block, codes a point) int32 into tensors."""

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return a dense slice of the matrix in units of `unit`, a fresh tensor."""


@dataclass(frozen=True, slots=True)
class E8P:
    """Points of the E8 lattice, after Tseng et al. 2024: 2 bits a weight, 3 or 4 with a second code."""

    bits: int
    residual_scale: float
    block: ClassVar[int] = 8
    unit: ClassVar[float] = 0.25
    kernels: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("modq_quipsharp.cpu:E8P_KERNEL",)}

    @property
    def kind(self) -> str:
        """What decides how fast codes are decoded."""
        return f"e8p {self.bits} bits"

    @property
    def stages(self) -> int:
        """How many codes name a point."""
        return 1 if self.bits == 2 else 2

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the tensors for a matrix of this shape."""
        runs = (shape[0], shape[1] // 8)
        specs = {"codes": TensorSpec(runs, torch.int16)}
        if self.bits > 2:
            specs["residual"] = TensorSpec(runs, torch.uint8 if self.bits == 3 else torch.int16)
        return specs

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round to the nearest point, and what is left over to the nearest of the finer ones."""
        found = cpu.nearest(self, x)
        if found is not None:
            return found
        points, codes = torch.empty_like(x), x.new_empty((len(x), self.stages), dtype=torch.int32)
        for part in blocks(len(x), 1, RUNS_AT_ONCE):
            self._round(x[part], points[part], codes[part])
        return points, codes

    def _round(self, x: Tensor, points: Tensor, codes: Tensor) -> None:
        codes[:, 0] = nearest_e8p(x)
        points.copy_(_points(e8p_table(x.device), codes[:, 0])).mul_(0.25)
        if self.bits > 2:
            left = (x - points).mul_(self.residual_scale)
            codes[:, 1] = nearest_e8p(left) if self.bits == 4 else _nearest_e81b(left)
            finer = _points(self._residual_table(x.device), codes[:, 1]).to(x.dtype).mul_(0.25)
            points.add_(finer.mul_(1 / self.residual_scale))

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Store each code as int16 or uint8."""
        specs = self.specs((codes.shape[0], 8 * codes.shape[1]))
        return {name: codes[..., i].to(spec.dtype) for i, (name, spec) in enumerate(specs.items())}

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Look all codes up that the slice touches."""
        first, last = columns.start // 8, -(-columns.stop // 8)
        codes = tensors["codes"][rows, first:last]
        values = _points(e8p_table(codes.device), _indices(codes)).view(len(codes), -1).to(dtype)
        if self.bits > 2:
            finer = tensors["residual"][rows, first:last]
            # Not by add_ with alpha: it rounds once in vectors and twice in what is left of them.
            for part in blocks(len(codes), values.shape[1], BLOCK_ELEMENTS // 8):
                added = _points(self._residual_table(codes.device), _indices(finer[part])).to(dtype)
                values[part].add_(added.mul_(1 / self.residual_scale).view_as(values[part]))
        skip = columns.start - 8 * first
        return values[:, skip : skip + columns.stop - columns.start]

    def _residual_table(self, device: torch.device) -> Tensor:
        return e8p_table(device) if self.bits == 4 else e81b_table(device)


@dataclass(frozen=True, slots=True)
class Grid:
    """2^bits numbers at a distance of 1, symmetric about 0, after Chee et al. 2023."""

    bits: int
    block: ClassVar[int] = 1
    unit: ClassVar[float] = 1.0
    stages: ClassVar[int] = 1
    kernels: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def kind(self) -> str:
        """What decides how fast codes are decoded."""
        return f"grid {self.bits} bits"

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the tensors for a matrix of this shape."""
        return {"codes": TensorSpec((shape[0], packed_bytes(shape[1], self.bits)), torch.uint8)}

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round to the grid."""
        middle = (2**self.bits - 1) / 2
        codes = (x + middle).round_().clamp_(0, 2**self.bits - 1)
        return codes - middle, codes.int()

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Store a bit stream for each row."""
        return {"codes": pack_bits(codes.squeeze(-1).to(torch.uint8), self.bits)}

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Look the codes up."""
        table = tuple(code - (2**self.bits - 1) / 2 for code in range(2**self.bits))
        return decode_bits(tensors["codes"][rows], self.bits, columns, table, dtype)


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix of points, as `modq.kernels.dispatch` takes it.

    `half` tells that the other factor, though float32, is no more exact than half precision, and need be held
    no finer than by 15 bits below the largest number of each block.
    """

    shape: tuple[int, int]
    points: Codebook
    half: bool = False

    @property
    def kernels(self) -> Mapping[str, tuple[str, ...]]:
        """Import paths of what computes with it, by device type."""
        return self.points.kernels

    @property
    def kind(self) -> str:
        """What decides how fast codes are decoded."""
        return self.points.kind + (", half precision" if self.half else "")

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return a dense slice in units of the codebook, in plain torch."""
        return self.points.decode(tensors, dtype, rows, columns)

    def dense(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Return a dense slice in units of the codebook, by the best way there is."""
        found = dispatch.dequantized(self, tensors, dtype, rows, columns)
        return self.decode(tensors, dtype, rows, columns) if found is None else found

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Multiply: x @ Ŵ.T, or x @ Ŵ if `transpose`; x (m, depth)."""
        return dispatch.multiply(self, x, tensors, transpose)


def _indices(codes: Tensor) -> Tensor:
    """Return stored codes as int32 from 0."""
    return codes.int() & 0xFFFF


def _points(table: Tensor, codes: Tensor) -> Tensor:
    """Return the points of codes, in quarters: (n,) int32 -> (n, 8) int8."""
    return table.index_select(0, codes.flatten()).view(torch.int8).view(-1, 8)


def _nearest_e81b(x: Tensor) -> Tensor:
    """Return the codes of the nearest points of E81B, tried one by one."""
    points = constant("e81b points", lambda: e81b_points() / 4, x.device, x.dtype)
    return (x @ (2 * points).T - points.square().sum(1)).argmax(-1).int()
