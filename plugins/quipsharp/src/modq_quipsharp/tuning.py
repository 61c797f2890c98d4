"""Tunes the real numbers of a quantized block, so that it does what the dense block did (QuIP#, section 5).

The codes stay. Trained are SU and SV of each linear and all other vectors of the block: the weights of its
norms, and biases. The loss is the mean square of what the block's outputs differ by from the dense block's,
over calibration samples as the quantized blocks before give them. In

    y = SV · (U_m Ŵ U_nᵀ scale) (SU · x)

the product in brackets is the ordinary one of a weight whose vectors are ones, and it is frozen: what SU and
SV need is its gradient by its inputs.

A third of the samples is held out. After each epoch the block is measured on them with everything as it would
be stored; the best is kept, and if nothing is better than what was there, that stays. The paper also tunes
between the groups of linears in a block, and the dense weights of those to come with it; here it is done
once, after all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import modq
from modq.errors import OptionError
from modq.spec import BlockCalibration, BlockResult, QuantizedWeight
from modq_quipsharp.options import Options

BATCH = 4
"""Samples a step."""

HELD_OUT = 3
"""One sample in so many is held out: 128 of 384 in the paper."""

PATIENCE = 3
"""Epochs without anything better after which to stop."""

VECTORS_LR = 0.1
"""The learning rate of norms and biases, as a part of that of SU and SV: 5e-5 and 5e-4 in the paper."""

SCALE_VECTORS = ("input_scales", "output_scales")


def tune_block(
    weights: Mapping[str, Tensor], options: Mapping[str, Options], calibration: BlockCalibration
) -> BlockResult | None:
    """Tune the linears whose options ask for it, and the block's vectors with them.

    Args:
        weights: the dense weights, (out_features, in_features), by name in the block.
        options: of each linear. Those of the first to be tuned give epochs, seed and the vectors' learning
            rate.
        calibration: the block and its samples.

    Returns:
        What to replace; None if that would not be better.

    Raises:
        OptionError: if there are too few samples to hold one out.
    """
    tuned = {name: its for name, its in options.items() if its.tune_epochs}
    if not tuned:
        return None
    if calibration.samples < 2:
        raise OptionError(
            f"tune_epochs={max(its.tune_epochs for its in tuned.values())!r} holds one calibration sample in "
            f"three out and was given {calibration.samples}, expected at least 2; give more, or leave it out"
        )
    block = _Block(calibration, {name: calibration.quantized[name] for name in tuned}, weights)
    best = _train(block, tuned)
    return None if best is None else block.result(best)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """A block whose scale vectors and own vectors are given anew for each pass, by name in the block."""

    calibration: BlockCalibration
    linears: Mapping[str, QuantizedWeight]
    weights: Mapping[str, Tensor]

    def vectors(self) -> dict[str, nn.Parameter]:
        """Return the vectors that the block computes with; packed tensors are no floats."""
        named = self.calibration.block.named_parameters()
        return {name: its for name, its in named if its.dim() == 1 and its.is_floating_point()}

    def initial(self) -> dict[str, Tensor]:
        """Return what is there, as it is stored."""
        scales = {
            f"{name}.{key}": its.tensors[key] for name, its in self.linears.items() for key in SCALE_VECTORS
        }
        return {**scales, **{name: its.detach() for name, its in self.vectors().items()}}

    def loss(self, state: Mapping[str, Tensor], number: int) -> Tensor:
        """Return the mean square of the difference from the dense block's outputs for one sample."""
        modules = {
            name: ScaledLinear(
                self.calibration.block.get_submodule(name),
                self.weights[name],
                its,
                *(state[f"{name}.{key}"] for key in SCALE_VECTORS),
            )
            for name, its in self.linears.items()
        }
        vectors = {name: state[name].to(its.dtype) for name, its in self.vectors().items()}
        found = self.calibration.run(number, modules, vectors)
        return (found.float() - self.calibration.target(number).float()).square().mean()

    def mean_loss(self, state: Mapping[str, Tensor], numbers: range) -> float:
        """Return the mean over some samples, in float64."""
        losses = [self.loss(state, number).double() for number in numbers]
        return float(torch.stack(losses).mean())

    def result(self, state: Mapping[str, Tensor]) -> BlockResult:
        """Return the linears with these scale vectors, and the block's own vectors."""
        weights = {
            name: replace(
                its, tensors={**its.tensors, **{key: state[f"{name}.{key}"] for key in SCALE_VECTORS}}
            )
            for name, its in self.linears.items()
        }
        return BlockResult(weights, {name: state[name] for name in self.vectors()})


class ScaledLinear(nn.Module):
    """A quantized linear whose scale vectors are tensors that may be trained."""

    def __init__(
        self, layer: nn.Module, weight: Tensor, qweight: QuantizedWeight, inputs: Tensor, outputs: Tensor
    ) -> None:
        super().__init__()
        ones = {key: torch.ones_like(qweight.tensors[key]) for key in SCALE_VECTORS}
        self.unit = replace(qweight, tensors={**qweight.tensors, **ones})
        self.scales = (inputs, outputs)
        self.bias = layer.bias
        self.register_buffer("weight", weight, persistent=False)  # T5 asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """Do what the layer does, differentiably in the vectors."""
        inputs, outputs = (scales.to(torch.promote_types(x.dtype, torch.float32)) for scales in self.scales)
        y = (modq.matmul(x * inputs, self.unit) * outputs).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _train(block: _Block, tuned: Mapping[str, Options]) -> dict[str, Tensor] | None:
    """Return the best state, as it is stored; None if none is better than the one that is there."""
    first, samples, initial = next(iter(tuned.values())), block.calibration.samples, block.initial()
    used = samples - max(1, samples // HELD_OUT)
    at_first = least = block.mean_loss(initial, range(used, samples))
    if not 0 < at_first < math.inf:
        return None
    state = {name: _trainable(its) for name, its in initial.items()}
    optimizer = torch.optim.Adam(_groups(state, tuned, first.tune_lr * VECTORS_LR))
    generator = torch.Generator().manual_seed(first.seed)
    best, stale = None, 0
    for _ in range(first.tune_epochs):
        order = torch.randperm(used, generator=generator).tolist()
        _train_epoch(block, state, optimizer, order, at_first)
        stored = {name: its.detach().to(initial[name].dtype, copy=True) for name, its in state.items()}
        loss = block.mean_loss(stored, range(used, samples))
        best, least, stale = (stored, loss, 0) if loss < least else (best, least, stale + 1)
        if stale == PATIENCE:
            break
    return best


def _trainable(stored: Tensor) -> Tensor:
    return stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True).requires_grad_()


def _groups(state: Mapping[str, Tensor], tuned: Mapping[str, Options], vectors_lr: float) -> list[Any]:
    """Give each tensor its learning rate."""
    rates = {f"{name}.{key}": its.tune_lr for name, its in tuned.items() for key in SCALE_VECTORS}
    return [{"params": [its], "lr": rates.get(name, vectors_lr)} for name, its in state.items()]


def _train_epoch(
    block: _Block, state: Mapping[str, Tensor], optimizer: torch.optim.Adam, order: list[int], unit: float
) -> None:
    """Take one pass over the samples; the loss is in units of what it was at first, above Adam's epsilon."""
    tensors = list(state.values())
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        optimizer.zero_grad()
        for number in batch:
            with torch.enable_grad():
                loss = block.loss(state, number) / (len(batch) * unit)
            grads = torch.autograd.grad(loss, tensors, allow_unused=True)
            for tensor, grad in zip(tensors, grads, strict=True):
                if grad is not None:
                    tensor.grad = grad if tensor.grad is None else tensor.grad + grad
        optimizer.step()
