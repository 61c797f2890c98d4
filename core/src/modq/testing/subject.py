"""The backend that is checked, and what the checks need of it: options, weights, calibrations, layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from modq.api import dequantize_slice, describe_weight, quantize_weight
from modq.errors import OptionError
from modq.linear import QuantLinear
from modq.options import build_options, options_to_json
from modq.registry import describe_backend, load
from modq.spec import JSON, BlockCalibration, Calibration, QuantizedWeight, QuantizerInfo
from modq.testing.check import Breach

SHAPES = ((64, 128), (63, 60), (1, 100), (100, 1), (17, 63), (130, 96))
"""(out, in), ragged ones among them; rounded up to what a backend can hold."""

SAMPLES = 256
"""Rows of inputs in a calibration."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a backend is asked to quantize.

    Attributes:
        bits: the nominal width.
        options: the backend's options, as its dataclass.
        label: what reports call it.
    """

    bits: float
    options: Any
    label: str

    def __str__(self) -> str:
        return self.label


class Subject:
    """One backend under check.

    Args:
        backend: the name of an installed one.
        variants: further options to check, beside the default ones at each of the widths that it declares.

    Attributes:
        info: what it declares.
        hooks: its hooks, the core's fallbacks behind them.
        variants: how the checks quantize; the first ones are the defaults of each width.

    Raises:
        BackendError: if there is no such backend, or it cannot be loaded.
    """

    def __init__(self, backend: str, variants: Sequence[Mapping[str, JSON]] = ()) -> None:
        self.backend = backend
        self.info: QuantizerInfo = describe_backend(backend)
        self.hooks: pluggy.HookRelay = load(backend)
        defaults = [_default(self.info, bits) for bits in self.info.bits]
        self.variants = (*defaults, *(_further(self.info, options) for options in variants))
        self._kept: dict[tuple[Variant, tuple[int, int]], QuantizedWeight] = {}

    @property
    def defaults(self) -> Sequence[Variant]:
        """The variants that have default options, one for each width."""
        return self.variants[: len(self.info.bits)]

    # Weights

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the next larger shape that the backend can hold."""
        rows, columns = self.info.multiple_of
        return -(-out_features // rows) * rows, -(-in_features // columns) * columns

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """SHAPES as the backend can hold them, each once."""
        return list(dict.fromkeys(self.shape(*shape) for shape in SHAPES))

    def cases(self) -> Iterator[tuple[Variant, tuple[int, int]]]:
        """Yield each variant with a ragged shape, and the first one with all shapes."""
        for number, variant in enumerate(self.variants):
            for shape in self.shapes if number == 0 else [self.shape(63, 60)]:
                yield variant, shape

    def calibration(self, in_features: int, *, white: bool = False, seed: int = 0) -> Calibration | None:
        """Return what the backend is given to learn from; None if it takes nothing.

        Args:
            in_features: of the layer.
            white: whether the inputs are uncorrelated, so that the weighted error is the plain one.
            seed: of the inputs.
        """
        if self.info.calibration == "none":
            return None
        if white:
            return Calibration(torch.eye(in_features), SAMPLES, None)
        x = gaussian(SAMPLES, in_features, seed=seed + 1)
        x[:, 1:] += 0.7 * x[:, :-1]
        x *= 1 + torch.arange(in_features).remainder(7)
        return Calibration(x.T @ x / SAMPLES, SAMPLES, x)

    def quantize(
        self, weight: Tensor, variant: Variant, calibration: Calibration | None = None
    ) -> QuantizedWeight:
        """Quantize a weight as the core would, with a calibration made up where none is given."""
        if calibration is None:
            calibration = self.calibration(weight.shape[1])
        if self.info.calibration != "block":
            return quantize_weight(weight, self.backend, variant.options, calibration)
        assert calibration is not None  # mypy only: "block" is not "none"
        return self._quantize_block(weight, variant, calibration)

    def quantized(self, variant: Variant, shape: tuple[int, int]) -> QuantizedWeight:
        """Return a Gaussian weight quantized, the same object each time: it is not to be changed."""
        key = variant, shape
        if key not in self._kept:
            self._kept[key] = self.quantize(gaussian(*shape), variant)
        return self._kept[key]

    def dense(self, qweight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole Ŵ."""
        return dequantize_slice(qweight, dtype, slice(0, qweight.shape[0]), slice(0, qweight.shape[1]))

    def layer(self, variant: Variant, shape: tuple[int, int], *, bias: bool = True) -> QuantLinear:
        """Return a new layer over a copy of a quantized Gaussian weight, with a Gaussian bias."""
        linear = nn.Linear(shape[1], shape[0], bias=bias, device="meta", dtype=torch.float32)
        layer = QuantLinear.like(linear, self.backend, variant.options)
        layer.adopt(copied(self.quantized(variant, shape)))
        if bias:
            layer.bias = nn.Parameter(gaussian(shape[0], seed=9))
        return layer

    def _quantize_block(self, weight: Tensor, variant: Variant, given: Calibration) -> QuantizedWeight:
        """Quantize as a block of a single linear."""
        shape = weight.shape[1], weight.shape[0]
        linear = nn.Linear(*shape, bias=False, dtype=weight.dtype, device="meta")  # draws no random weight
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        block = nn.ModuleDict({"linear": linear}).eval()
        x = given.inputs if given.inputs is not None else torch.eye(weight.shape[1])

        def run(
            number: int,
            modules: Mapping[str, nn.Module] | None = None,
            tensors: Mapping[str, Tensor] | None = None,
        ) -> Tensor:
            module = (modules or {}).get("linear", linear)
            inside = {n.removeprefix("linear."): t for n, t in (tensors or {}).items()}
            out: Tensor = torch.func.functional_call(module, inside, (x.to(weight.dtype),))
            return out

        calibration = BlockCalibration(block, {}, {"linear": given}, 1, run, lambda number: run(number))
        with torch.no_grad():  # as in a model
            result = self.hooks.quantize_block(
                weights={"linear": weight}, options={"linear": variant.options}, calibration=calibration
            )
        if result is None or "linear" not in result.weights:
            raise Breach("quantize_block() gave no weight for the only linear; INFO.calibration is 'block'")
        qweight = result.weights["linear"]
        assert isinstance(qweight, QuantizedWeight)
        return qweight

    def described(self, variant: Variant, shape: tuple[int, int]) -> Mapping[str, Any]:
        """Return what `describe` says."""
        return describe_weight(shape, self.backend, variant.options)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor without touching the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def copied(qweight: QuantizedWeight) -> QuantizedWeight:
    """Return the same weight over copies of its tensors."""
    tensors = {name: tensor.clone() for name, tensor in qweight.tensors.items()}
    return QuantizedWeight(
        qweight.backend, qweight.format_version, qweight.shape, tensors, dict(qweight.meta)
    )


def _default(info: QuantizerInfo, bits: float) -> Variant:
    try:
        options = build_options(info.name, {"bits": int(bits) if bits == int(bits) else bits})
    except OptionError as error:
        raise Breach(
            f"INFO.bits has {bits:g}, and the options do not take it: {error}; give the field for it "
            'the name bits, or field(metadata={"shorthand": "bits"})'
        ) from None
    return Variant(bits, options, f"{bits:g} bits")


def _further(info: QuantizerInfo, given: Mapping[str, JSON]) -> Variant:
    options = build_options(info.name, given)
    bits = options_to_json(options).get("bits", info.bits[0])
    label = ", ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
    return Variant(bits, options, label)
