"""Mistakes in what is kept, changed, and found again."""

from __future__ import annotations

import math

import torch
from modq_mutant_register import caught_by
from modq_mutants import Options
from modq_sound import Sound
from torch import Tensor

from modq import Calibration, QuantizedWeight, TensorSpec, hookimpl


@caught_by("inputs_stay_untouched", r"the weight given to quantize")
class ClampsTheWeight(Sound):
    """It clips outliers in the weight that it was given."""

    def codes(self, exact: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
        return super().codes(exact.clamp_(-2.0, 2.0), scales, zeros, size)


@caught_by("inputs_stay_untouched", r"x given to matmul")
class ScalesTheInputInPlace(Sound):
    """matmul() scales x in place and forgets to scale it back."""

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        y = super().matmul(x, qweight, transpose)
        x.mul_(0.5)
        return y


@caught_by("chance_stays_untouched", r"global random generator was moved")
class SeedsTheWorld(Sound):
    """It seeds the global generator to be deterministic."""

    @hookimpl
    def quantize(self, weight: Tensor, options: Options, calibration: Calibration | None) -> QuantizedWeight:
        torch.manual_seed(0)
        return super().quantize(weight, options, calibration)


@caught_by("chance_stays_untouched", r"global random generator was moved")
class RoundsAtRandom(Sound):
    """Stochastic rounding, from the global generator."""

    def codes(self, exact: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
        jitter = (torch.rand(exact.shape) - 0.5) * 0.02
        group = torch.arange(exact.shape[1]) // size
        return super().codes(exact + jitter * scales.float()[:, group], scales, zeros, size)


@caught_by("the_same_input_gives_the_same_bits")
class RemembersItsScales(Sound):
    """A running mean of the scales of all layers so far goes into the next one's."""

    mean = 0.0

    def fit(self, exact: Tensor, size: int, shares: Tensor) -> tuple[Tensor, Tensor]:
        scales, zeros = super().fit(exact, size, shares)
        self.mean = 0.5 * self.mean + 0.5 * float(scales.float().mean())
        return (0.9 * scales.float() + 0.1 * self.mean).half(), zeros


@caught_by("the_same_input_gives_the_same_bits", r"tensors were overwritten in place")
class CachesTheDenseWeight(Sound):
    """The dense weight is kept by the address of the codes: stale after a checkpoint is loaded into them."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def decode(self, qweight: QuantizedWeight, rows: slice, columns: slice) -> Tensor:
        address = qweight.tensors["codes"].data_ptr()
        if address not in self.kept:
            whole = slice(0, qweight.shape[0]), slice(0, qweight.shape[1])
            self.kept[address] = super().decode(qweight, *whole)
        return self.kept[address][rows, columns]


@caught_by("results_stay_as_they_were_returned", "matmul")
class ReusesItsResult(Sound):
    """matmul() returns a buffer that it keeps by shape, and overwrites it at the next call."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, ...], Tensor] = {}

    @hookimpl
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        y = super().matmul(x, qweight, transpose)
        assert y is not None
        buffer = self.buffers.setdefault(tuple(y.shape), torch.empty_like(y))
        return buffer.to(y.dtype).copy_(y) if buffer.dtype != y.dtype else buffer.copy_(y)


@caught_by("threads_do_not_disturb_each_other")
class KeepsTheWeightOnItself(Sound):
    """Steps hand the weight on through an attribute, which another thread sets meanwhile."""

    def fit(self, exact: Tensor, size: int, shares: Tensor) -> tuple[Tensor, Tensor]:
        self.exact = exact
        return super().fit(exact, size, shares)

    def codes(self, exact: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
        return super().codes(self.exact, scales, zeros, size)


@caught_by("a_file_gives_the_same_bits_in_another_process")
class KeepsTheZerosToItself(Sound):
    """The zeros are kept by shape in the plugin, and stored as zeros."""

    kept: dict[tuple[int, ...], Tensor] = {}  # noqa: RUF012  # that it is shared is the mistake

    def qweight(
        self, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, options: Options
    ) -> QuantizedWeight:
        self.kept[tuple(scales.shape)] = zeros.to(torch.uint8)
        return super().qweight(weight, packed, scales, torch.zeros_like(zeros), options)

    def decode(self, qweight: QuantizedWeight, rows: slice, columns: slice) -> Tensor:
        stored = qweight.tensors["zeros"]
        tensors = {**qweight.tensors, "zeros": self.kept.get(tuple(stored.shape), stored)}
        return super().decode(
            QuantizedWeight(self.NAME, 1, qweight.shape, tensors, qweight.meta), rows, columns
        )


@caught_by("declared_bits_are_stored_bytes", "zeros keeps .* alive")
class SharesMemory(Sound):
    """Two tensors are views of one, which safetensors cannot write."""

    def qweight(
        self, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, options: Options
    ) -> QuantizedWeight:
        both = torch.stack((zeros.to(torch.uint8), zeros.to(torch.uint8)))
        made = super().qweight(weight, packed, scales, both[0], options)
        tensors = {**made.tensors, "twins": both.view(-1)}
        return QuantizedWeight(made.backend, 1, made.shape, tensors, made.meta)

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> dict[str, TensorSpec]:
        specs = dict(super().describe(shape, options))
        return {**specs, "twins": TensorSpec((2 * math.prod(specs["zeros"].shape),), torch.uint8)}


@caught_by("restore_undoes_prepare", r"restore")
class RestoresInAnotherOrder(Sound):
    """restore() reshapes where prepare() transposed."""

    @hookimpl
    def restore(self, qweight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
        codes, right = qweight.tensors["codes"], self.turned(qweight)
        tensors = {**right.tensors, "codes": codes.reshape(codes.shape[::-1]).contiguous()}
        return QuantizedWeight(right.backend, 1, right.shape, tensors, right.meta)


@caught_by("restore_undoes_prepare", r"restore")
class StalePreparedCopy(Sound):
    """prepare() keeps its result by shape: the second layer of a shape gets the first one's."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], QuantizedWeight] = {}

    @hookimpl
    def prepare(self, qweight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
        return self.kept.setdefault(qweight.shape, self.turned(qweight))


@caught_by("restore_undoes_prepare", r"the weight given to prepare")
class PreparesInPlace(Sound):
    """prepare() repacks the tensors that the layer still holds."""

    @hookimpl
    def prepare(self, qweight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
        prepared = self.turned(qweight)
        qweight.tensors["codes"].zero_()
        return prepared
