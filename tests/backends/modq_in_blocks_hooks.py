"""The implementations of the backends of `modq_in_blocks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from modq_in_blocks import Options
from torch import Tensor

from modq import BlockCalibration, BlockResult, Calibration, QuantizedWeight, TensorSpec, hookimpl

NORM = "post_attention_layernorm.weight"


@dataclass
class Call:
    """What the hook was given, and found there."""

    weights: dict[str, Tensor]
    options: dict[str, Options]
    quantized: dict[str, QuantizedWeight]
    layers: dict[str, Calibration]
    targets: list[Tensor]
    outputs: list[Tensor]


CALLS: list[Call] = []


class Mending:
    """Rounds to eighths; the hook stores the down projection in full and scales a norm."""

    NAME = "mending"

    @hookimpl
    def describe(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(tuple(shape), torch.float16)}

    @hookimpl
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        return self.hold((weight * 8).round() / 8)

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        return qweight.tensors["values"][rows, columns].to(dtype, copy=True).contiguous()

    @hookimpl
    def quantize_block(
        self, weights: Mapping[str, Tensor], options: Mapping[str, Options], calibration: BlockCalibration
    ) -> BlockResult | None:
        numbers = range(calibration.samples)
        targets = [calibration.target(number) for number in numbers]
        outputs = [calibration.run(number) for number in numbers]
        found = (dict(weights), dict(options), dict(calibration.quantized), dict(calibration.layers))
        CALLS.append(Call(*found, targets, outputs))
        chosen = next(iter(options.values()))
        if not chosen.mend:
            return None
        ratio = torch.stack(targets).norm() / torch.stack(outputs).norm()
        norm = dict(calibration.block.named_parameters())[NORM].detach() * ratio
        return self.spoil(BlockResult(self.mended(weights), {NORM: norm}), chosen.wrong)

    def mended(self, weights: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
        return {name: self.hold(weight) for name, weight in weights.items() if name.endswith("down_proj")}

    def hold(self, weight: Tensor) -> QuantizedWeight:
        return QuantizedWeight(self.NAME, 1, tuple(weight.shape), {"values": weight.half().contiguous()})

    def spoil(self, result: BlockResult, wrong: str) -> Any:
        ((name, weight), *_), norm = result.weights.items(), result.dense_tensors[NORM]
        return {
            "": result,
            "type": dict(result.weights),
            "name": BlockResult({"mlp.side_proj": weight}),
            "shape": BlockResult({name: self.hold(weight.tensors["values"].T)}),
            "no tensor": BlockResult({}, {"mlp.norm.weight": norm}),
            "packed tensor": BlockResult({}, {f"{name}.values": weight.tensors["values"]}),
            "no number": BlockResult({}, {NORM: [1.0]}),  # type: ignore[dict-item]  # it is wrong on purpose
            "dtype": BlockResult({}, {NORM: norm.double()}),
        }[wrong]


class AtOnce(Mending):
    """Stores all in full, in the hook; `quantize` must not be called."""

    NAME = "at-once"

    @hookimpl
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        raise AssertionError("the core quantizes a linear of a backend that does all in its hook")

    def mended(self, weights: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
        return {name: self.hold(weight) for name, weight in weights.items()}
