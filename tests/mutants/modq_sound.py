"""A right backend, written as a third party might, without the core's layouts; `modq_mutants` spoils it.

Each row is cut into groups, each group rounded to 16 steps between its ends. Two codes share a byte, the even
column in the low half. The work is split into small methods, so that a mutant has to change but one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from modq_mutants import Options
from torch import Tensor

from modq import Calibration, ImportedLayer, QuantizedWeight, TensorSpec, blockwise_matmul, hookimpl

TOP = 15
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of a group's range: what is tried where the inputs are known."""


class Sound:
    """Rounds groups; told of the inputs, it narrows a group's range where that helps the layer's output."""

    NAME = "sound"

    # The hooks

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> dict[str, TensorSpec]:
        per_group = TensorSpec((shape[0], -(-shape[1] // options.group_size)), torch.float16)
        codes = TensorSpec((shape[0], -(-shape[1] // 2)), torch.uint8)
        return {"codes": codes, "scales": per_group, "zeros": TensorSpec(per_group.shape, torch.uint8)}

    @hookimpl
    def quantize(self, weight: Tensor, options: Options, calibration: Calibration | None) -> QuantizedWeight:
        size, exact = options.group_size, weight.float()
        shares = self.shares(exact, size, self.importance(exact, calibration))
        scales, zeros = self.fit(exact, size, shares)
        codes = self.codes(exact, scales, zeros, size)
        return self.qweight(weight, self.pack(codes), scales, zeros, options)

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        return self.decode(qweight, rows, columns).to(dtype)

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        return blockwise_matmul(
            x, lambda rows, columns: self.decode(qweight, rows, columns).to(x.dtype), qweight.shape, transpose
        )

    @hookimpl
    def prepare(self, qweight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
        return self.turned(qweight)

    @hookimpl
    def restore(self, qweight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
        return self.turned(qweight)

    @hookimpl
    def export_layers(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        tensors = weights[""].tensors
        return {"packed": tensors["codes"], "steps": tensors["scales"], "offsets": tensors["zeros"]}

    @hookimpl
    def export_config(self, options: Options) -> dict[str, Any]:
        return {"quant_method": "sound-file", "group_size": options.group_size}

    @hookimpl
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, ImportedLayer]:
        options = Options(config["group_size"])
        named = {"codes": tensors["packed"], "scales": tensors["steps"], "zeros": tensors["offsets"]}
        return {
            "": ImportedLayer(QuantizedWeight(self.NAME, 1, shapes[""], named, self.meta(options)), options)
        }

    # Inside

    def importance(self, exact: Tensor, calibration: Calibration | None) -> Tensor | None:
        """How much an error of each column counts, (in,)."""
        return None if calibration is None or calibration.hessian is None else calibration.hessian.diag()

    def shares(self, exact: Tensor, size: int, importance: Tensor | None) -> Tensor:
        """The share of its range that each group (out, groups) is rounded in."""
        best = torch.ones(exact.shape[0], -(-exact.shape[1] // size))
        if importance is None:
            return best
        least = torch.full_like(best, torch.inf)
        for share in SHARES:
            tried = torch.full_like(best, share)
            scales, zeros = self.fit(exact, size, tried)
            again = self.values(self.codes(exact, scales, zeros, size), scales, zeros, size)
            error = self.grouped((again - exact).square() * importance, size).sum(2)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def grouped(self, matrix: Tensor, size: int) -> Tensor:
        """Cut (out, in) into (out, groups, size), the last group filled up with zeros."""
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
        return padded.unflatten(1, (-1, size))

    def fit(self, exact: Tensor, size: int, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, (out, groups)."""
        groups = self.grouped(exact, size)
        low, high = groups.amin(2).clamp(max=0) * shares, groups.amax(2).clamp(min=0) * shares
        scales = ((high - low) / TOP).clamp(2e-7, 6e4).half()
        return scales, (-low / scales.float()).round().clamp(0, TOP)

    def codes(self, exact: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
        """The codes, (out, in), as uint8."""
        group = torch.arange(exact.shape[1]) // size
        return (exact / scales.float()[:, group] + zeros[:, group]).round().clamp(0, TOP).to(torch.uint8)

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor, size: int, start: int = 0) -> Tensor:
        """What codes (out, in) of columns from `start` on stand for, in float32: exact."""
        group = torch.arange(start, start + codes.shape[1]) // size
        return (codes.float() - zeros[:, group].float()) * scales[:, group].float()

    def pack(self, codes: Tensor) -> Tensor:
        even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return even[:, ::2] | even[:, 1::2] << 4

    def unpack(self, packed: Tensor) -> Tensor:
        return torch.stack((packed & TOP, packed >> 4), 2).flatten(1)

    def decode(self, qweight: QuantizedWeight, rows: slice, columns: slice) -> Tensor:
        tensors = qweight.tensors
        packed = tensors["codes"].T if qweight.meta.get("turned") else tensors["codes"]
        codes = self.unpack(packed[rows])[:, columns]
        size = qweight.meta["group_size"]
        return self.values(codes, tensors["scales"][rows], tensors["zeros"][rows], size, columns.start)

    def meta(self, options: Options) -> dict[str, Any]:
        return {"group_size": options.group_size}

    def qweight(
        self, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, options: Options
    ) -> QuantizedWeight:
        tensors = {"codes": packed, "scales": scales, "zeros": zeros.to(torch.uint8)}
        return QuantizedWeight(self.NAME, 1, tuple(weight.shape), tensors, self.meta(options))

    def turned(self, qweight: QuantizedWeight) -> QuantizedWeight:
        """The same weight with its codes transposed, or back: what a kernel might like better."""
        meta = dict(qweight.meta)
        if not meta.pop("turned", False):
            meta["turned"] = True
        tensors = {**qweight.tensors, "codes": qweight.tensors["codes"].T.contiguous()}
        return QuantizedWeight(qweight.backend, 1, qweight.shape, tensors, meta)
