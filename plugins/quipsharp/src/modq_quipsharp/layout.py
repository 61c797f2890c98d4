"""How a rotated weight lies in tensors, and products with it that rotate the activations instead.

    W = diag(SV) · U_m · Ŵ · U_nᵀ · diag(SU) · scale        (m, n)

Ŵ are the points of a codebook, U rotations. With vectors as rows, a product is, from left to right,

    y  = x · SU · U_n · Ŵᵀ · U_mᵀ · SV        forward     [M, n] -> [M, m]
    dx = g · SV · U_m · Ŵ  · U_nᵀ · SU        transpose   [M, m] -> [M, n]

so only x, y and their gradients are rotated (see turn.py), O(n log n) for each row, and Ŵ is decoded by a
kernel or by blocks. All of it is done in float32 whatever the dtype of x: rotations in half precision lose
what the codes gained, and the product between them would round twice more. The kernel is told where x is
half precision: then it holds the rotated numbers as integers of 15 bits with a scale for each 256. (On an
accelerator a half precision product would be faster.)

A layer may be some rows of a larger matrix that was quantized as one (`part_of`): U_m mixes all rows, so it
holds all codes, computes all outputs and keeps its own.

Tensors: those of the codebook for (rows of the whole, n), and

    input_scales   float16 (n,)    SU: random signs, times what fine-tuning or rescaling made of them
    output_scales  float16 (m,)    SV
    scale          float32 (1,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modq.kernels import dispatch
from modq.materialize import BLOCK_ELEMENTS, blocks
from modq.spec import FewRows, TensorSpec
from modq_quipsharp import cpu
from modq_quipsharp.codebooks import E8P, Codebook, Coded, Grid
from modq_quipsharp.options import Options
from modq_quipsharp.rotation import Rotation
from modq_quipsharp.turn import Turn, compute_dtype

RESIDUAL_SCALES = {2: 1.0, 3: 2.04, 4: 3.45}
"""Of QuIP#'s codebooks, by bits."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """An (out, in) matrix of codes between two rotations."""

    shape: tuple[int, int]
    bits: int
    codebook: str
    residual_scale: float
    rotation: str
    seed: int
    part_of: tuple[int, ...]

    @property
    def meta(self) -> dict[str, Any]:
        """All that decoding needs but the shape, as JSON; what changes nothing is set to one value."""
        return {
            "bits": self.bits,
            "codebook": self.codebook,
            "residual_scale": self.residual_scale,
            "rotation": self.rotation,
            "seed": self.seed,
            "part_of": list(self.part_of),
        }

    @property
    def points(self) -> Codebook:
        """The codebook itself."""
        return E8P(self.bits, self.residual_scale) if self.codebook == "e8p" else Grid(self.bits)

    @property
    def whole(self) -> tuple[int, int]:
        """The shape of Ŵ."""
        return (self.part_of[0] if self.part_of else self.shape[0], self.shape[1])

    @property
    def own(self) -> slice:
        """The rows of the whole that are this layer's."""
        first = self.part_of[1] if self.part_of else 0
        return slice(first, first + self.shape[0])

    def rotations(self) -> tuple[Rotation, Rotation]:
        """Return U_m and U_n."""
        m, n = (Rotation(size, self.rotation, self.seed) for size in self.whole)
        return m, n

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a matrix in this layout."""
        self.rotations()  # raises if there is none of these sizes
        return {
            **self.points.specs(self.whole),
            "input_scales": TensorSpec((self.shape[1],), torch.float16),
            "output_scales": TensorSpec((self.shape[0],), torch.float16),
            "scale": TensorSpec((1,), torch.float32),
        }

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Multiply: x @ W.T, or x @ W if `transpose`; any leading dimensions, the dtype of x."""
        outer, inner = self._turns(tensors)
        if transpose:
            outer, inner = inner, outer
        coded = Coded(self.whole, self.points, half=x.dtype in (torch.bfloat16, torch.float16))
        rows = inner.apply(x.reshape(-1, x.shape[-1]), compute_dtype(x.dtype), transpose=True)
        y = outer.apply(coded.multiply(rows, _codes(tensors), transpose), x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def few_rows(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows | None:
        """Return what `matmul` would do with a few rows of this dtype: see `modq.spec.Layout`."""
        outer, inner = self._turns(tensors)
        coded = Coded(self.whole, self.points, half=dtype in (torch.bfloat16, torch.float16))
        turn = cpu.bind_turn(inner, dtype, torch.float32, transpose=True)
        multiply = dispatch.few_rows(coded, _codes(tensors), torch.float32)
        turn_back = cpu.bind_turn(outer, torch.float32, dtype, transpose=False)
        if turn is None or multiply is None or turn_back is None:
            return None
        m, n = self.whole

        def product(x: int, out: int, rows: int) -> None:
            turned, y = (torch.empty(rows, width, dtype=torch.float32) for width in (n, m))
            turn(x, turned.data_ptr(), rows)
            multiply(turned.data_ptr(), y.data_ptr(), rows)
            turn_back(y.data_ptr(), out, rows)

        return product

    def dequantize(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense W[rows, columns].

        The rotations mix all rows and all columns, so that all codes are decoded whatever the slice; held at
        once is the slice widened to whole rows or to whole columns, whichever is less.
        """
        compute = compute_dtype(dtype)
        outputs, inputs = (turn.numbers(compute) for turn in self._turns(tensors))
        own = slice(self.own.start + rows.start, self.own.start + rows.stop)
        m, n = self.whole
        if not (rows.stop - rows.start) * (columns.stop - columns.start):
            return inputs.new_empty(len(outputs[rows]), len(inputs[columns]), dtype=dtype)
        if (rows.stop - rows.start) * n <= m * (columns.stop - columns.start):
            dense = self._rows(_codes(tensors), compute, own)[:, columns]
        else:
            dense = self._columns(_codes(tensors), compute, columns)[own]
        return (dense * outputs[rows, None]).mul_(inputs[columns]).to(dtype)

    def _rows(self, codes: Mapping[str, Tensor], dtype: torch.dtype, rows: slice) -> Tensor:
        """Return (U_m Ŵ)[rows] U_nᵀ: U_m Ŵ is built by blocks of columns, then rotated by blocks of rows."""
        m, n = self.whole
        outer, inner = self.rotations()
        coded = Coded(self.whole, self.points)
        dense = torch.empty((rows.stop - rows.start, n), dtype=dtype, device=codes["codes"].device)
        for part in blocks(n, m, BLOCK_ELEMENTS):
            dense[:, part] = outer.apply(coded.dense(codes, dtype, slice(0, m), part).T).T[rows]
        for part in blocks(len(dense), n, BLOCK_ELEMENTS):
            dense[part] = inner.apply(dense[part])
        return dense

    def _columns(self, codes: Mapping[str, Tensor], dtype: torch.dtype, columns: slice) -> Tensor:
        """Return U_m (Ŵ U_nᵀ)[:, columns], the other way about."""
        m, n = self.whole
        outer, inner = self.rotations()
        coded = Coded(self.whole, self.points)
        dense = torch.empty((m, columns.stop - columns.start), dtype=dtype, device=codes["codes"].device)
        for part in blocks(m, n, BLOCK_ELEMENTS):
            dense[part] = inner.apply(coded.dense(codes, dtype, part, slice(0, n)))[:, columns]
        for part in blocks(dense.shape[1], m, BLOCK_ELEMENTS):
            dense[:, part] = outer.apply(dense[:, part].T).T
        return dense

    def _turns(self, tensors: Mapping[str, Tensor]) -> tuple[Turn, Turn]:
        """Return A and B of W = A Ŵ Bᵀ: diag(SV) U_m, or some rows of it, and diag(SU · scale) U_n."""
        m, n = self.rotations()
        return (
            Turn(m, tensors["output_scales"], None, 1.0, self.own),
            Turn(n, tensors["input_scales"], tensors["scale"], self.points.unit, slice(0, n.size)),
        )


@lru_cache(maxsize=256)
def layout_of(shape: tuple[int, int], options: Options) -> Rotated:
    """Return the layout of a layer with these options."""
    lattice = options.codebook == "e8p"
    residual_scale = (options.residual_scale or RESIDUAL_SCALES[options.bits]) if lattice else 1.0
    seed = options.seed if options.rotation == "kronecker" else 0
    return Rotated(
        shape, options.bits, options.codebook, residual_scale, options.rotation, seed, options.part_of
    )


def _codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("codes", "residual") if name in tensors}
