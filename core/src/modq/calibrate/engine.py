"""Quantizes the linears of a model's blocks in order, each from what the quantized blocks before it give it.

For block k, with the outputs of the quantized block k-1 at hand (see `replay`):

    1. group its linears by the tensor that they are given, in the order in which they are called
    2. true-sequential: for each group, run the samples up to it, gather H = mean of x xᵀ, quantize the group;
       the groups after it see what the quantized ones before them give. Otherwise gather all H in one pass
    3. run the samples through the quantized block, and keep what it returns for block k+1

True-sequential costs partial passes over the block, each ended where its group is reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from modq.calibrate.hessian import gather, shared_inputs
from modq.calibrate.replay import Block, CalibrationError, Outputs, Replay, Sample, find_blocks
from modq.errors import ModqError
from modq.linear import QuantLinear
from modq.model import Scheme
from modq.registry import describe_backend
from modq.spec import Calibration


class Observer(Protocol):
    """What is told of each linear."""

    def begins(self, name: str) -> None:
        """Say which one is next."""

    def quantized(
        self, name: str, weight: Tensor, layer: QuantLinear, calibration: Calibration | None
    ) -> None:
        """Say what became of one: `weight` is its dense (out_features, in_features), dropped afterwards."""


class Store(Protocol):
    """Where the blocks' weights and outputs are."""

    def finished(self, blocks: Sequence[Block]) -> int:
        """Return how many of the blocks were quantized in a session before."""

    def outputs(self, block: Block) -> Outputs:
        """Return where the outputs of a block are kept."""

    def load(self, block: Block) -> None:
        """Give a block its weights."""

    def save(self, block: Block) -> None:
        """Keep a quantized block, whose outputs are all kept; it need not hold its weights any longer."""


class InMemory:
    """The store of a model that is in memory and stays there."""

    def finished(self, blocks: Sequence[Block]) -> int:
        """None: there was no session before."""
        return 0

    def outputs(self, block: Block) -> Outputs:
        """In memory, too."""
        return Outputs(None)

    def load(self, block: Block) -> None:
        """It is there."""

    def save(self, block: Block) -> None:
        """It stays."""


def calibrated(scheme: Scheme) -> bool:
    """Whether a scheme makes use of calibration data."""
    return describe_backend(scheme.backend).calibration != "none"


def quantize_blocks(
    model: nn.Module,
    plan: Mapping[str, Scheme],
    samples: Sequence[Sample],
    *,
    device: torch.device,
    observer: Observer | None = None,
    store: Store | None = None,
    true_sequential: bool = True,
) -> None:
    """Quantize the planned linears inside the blocks of a model.

    Args:
        model: its parts outside the blocks have their weights; the store gives those of a block.
        plan: how to quantize each linear inside a block, by module name.
        samples: the keyword arguments of a forward pass, for each sample.
        device: where to run the blocks.
        observer: told of each linear.
        store: where their weights are; by default in the model.
        true_sequential: whether linears see the quantized ones before them in their own block.

    Raises:
        CalibrationError: if the model does not call one of the blocks or linears.
        ModqError: of a backend, with the layer's name.
    """
    store = store or InMemory()
    blocks = find_blocks(model, plan)
    replay = Replay(model, blocks, samples, device)
    done = store.finished(blocks)
    for block in blocks[:done]:
        replay.outputs[block.stack] = store.outputs(block)
    with _evaluating(model):
        for block in blocks[done:]:
            store.load(block)
            inside = {name: scheme for name, scheme in plan.items() if name.startswith(block.prefix)}
            _quantize_block(replay, block, inside, observer, true_sequential)
            outputs = store.outputs(block)
            for number in range(len(replay)):
                outputs.put(number, replay.run(block, number))
            store.save(block)
            replay.outputs[block.stack] = outputs


def _quantize_block(
    replay: Replay, block: Block, plan: Mapping[str, Scheme], observer: Observer | None, true_sequential: bool
) -> None:
    model = replay.model
    linears = {name: model.get_submodule(name) for name in plan}
    runs = [lambda number=number: replay.run(block, number) for number in range(len(replay))]
    groups = shared_inputs(linears, runs[0])
    called = {name for group in groups for name in group}
    if idle := [name for name, scheme in plan.items() if name not in called and calibrated(scheme)]:
        raise CalibrationError(
            f"{idle[0]} was given no input by the first sample, so it cannot be calibrated; "
            "leave it dense (modules_to_not_convert) or give it another backend (layers)"
        )
    for part in [[group] for group in groups] if true_sequential else [groups]:
        leaders = {group[0]: linears[group[0]] for group in part if any(calibrated(plan[n]) for n in group)}
        moments = gather(leaders, runs, stop_after=list(leaders)[-1]) if leaders else {}
        for group in part:
            known = moments[group[0]].calibration() if group[0] in moments else None
            for name in group:
                _quantize_one(model, name, plan[name], known if calibrated(plan[name]) else None, observer)
            moments.pop(group[0], None)
    for name in [name for name in plan if name not in called]:
        _quantize_one(model, name, plan[name], None, observer)


def _quantize_one(
    model: nn.Module, name: str, scheme: Scheme, calibration: Calibration | None, observer: Observer | None
) -> None:
    if observer:
        observer.begins(name)
    linear = model.get_submodule(name)
    try:
        layer = QuantLinear.from_dense(linear, scheme.backend, scheme.options, calibration)
    except ModqError as error:
        raise type(error)(f"{name}: {error}") from None
    if observer:
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]  # nn.Module types any attribute
        observer.quantized(name, weight.T if layer.conv1d else weight, layer, calibration)
    model.set_submodule(name, layer)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
