"""Quantizes the linears of a model's blocks in order, each from what the quantized blocks before it give it.

For block k, with the outputs of the quantized block k-1 at hand (see `replay`):

    1. group its linears by the tensor that they are given, in the order in which they are called
    2. true-sequential: for each group, run the samples up to it, gather H = mean of x xᵀ, quantize the group;
       the groups after it see what the quantized ones before them give. Otherwise gather all H in one pass
    3. hand the block to the backends that work on one as a whole (see `whole`)
    4. run the samples through the quantized block, and keep what it returns for block k+1

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
from modq.calibrate.whole import DenseBlock, dense_weight, work_on, works_on_blocks
from modq.errors import ModqError
from modq.linear import QuantLinear
from modq.model import Scheme
from modq.registry import describe_backend
from modq.spec import Calibration


class Observer(Protocol):
    """What is told of each linear."""

    def begins(self, name: str) -> None:
        """Say which one is next, or which block is worked on as a whole."""

    def quantized(
        self, name: str, weight: Tensor, layer: QuantLinear, calibration: Calibration | None
    ) -> None:
        """Say what became of one: `weight` is its dense (out_features, in_features), dropped afterwards.

        It is said again of those that are changed when their block is worked on as a whole.
        """


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
    return _needs(scheme) != "none"


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
    """Quantize the linears one by one, then have the backends that do so work on the block as a whole."""
    linears = {name.removeprefix(block.prefix): replay.model.get_submodule(name) for name in plan}
    dense = DenseBlock(replay, block, linears)
    alone = {name: scheme for name, scheme in plan.items() if _needs(scheme) != "block"}
    known = _quantize_linears(replay, block, alone, observer, true_sequential)
    whole = {name: scheme for name, scheme in plan.items() if _works_on_blocks(scheme)}
    for backend in dict.fromkeys(scheme.backend for scheme in whole.values()):
        own = {name: scheme for name, scheme in whole.items() if scheme.backend == backend}
        _quantize_whole(dense, own, known, observer)


def _quantize_linears(
    replay: Replay, block: Block, plan: Mapping[str, Scheme], observer: Observer | None, true_sequential: bool
) -> dict[str, Calibration]:
    """Quantize linears one by one; return what is known of those whose block is worked on afterwards."""
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
    known: dict[str, Calibration] = {}
    for part in [[group] for group in groups] if true_sequential else [groups]:
        leaders = {group[0]: linears[group[0]] for group in part if any(calibrated(plan[n]) for n in group)}
        moments = gather(leaders, runs, stop_after=list(leaders)[-1]) if leaders else {}
        for group in part:
            given = moments.pop(group[0]).calibration() if group[0] in moments else None
            for name in group:
                _quantize_one(model, name, plan[name], given if calibrated(plan[name]) else None, observer)
            if given:
                known |= {name: given for name in group if _works_on_blocks(plan[name])}
    for name in [name for name in plan if name not in called]:
        _quantize_one(model, name, plan[name], None, observer)
    return known


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
        observer.quantized(name, dense_weight(linear), layer, calibration)
    model.set_submodule(name, layer)


def _quantize_whole(
    dense: DenseBlock,
    plan: Mapping[str, Scheme],
    known: Mapping[str, Calibration],
    observer: Observer | None,
) -> None:
    """Have one backend work on a block; the names are those in the model."""
    block = dense.block
    if observer:
        observer.begins(block.name)
    inside = {name.removeprefix(block.prefix): scheme for name, scheme in plan.items()}
    given = {name: known[block.prefix + name] for name in inside if block.prefix + name in known}
    try:
        layers = work_on(dense, inside, given)
    except ModqError as error:
        raise type(error)(f"{block.name}: {error}") from None
    for name, layer in layers.items():
        if observer:
            observer.quantized(block.prefix + name, dense_weight(dense.linears[name]), layer, given.get(name))
        dense.module.set_submodule(name, layer)


def _needs(scheme: Scheme) -> str:
    return describe_backend(scheme.backend).calibration


def _works_on_blocks(scheme: Scheme) -> bool:
    return calibrated(scheme) and works_on_blocks(scheme.backend)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode; and no inference mode, whose tensors nothing can be trained with."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        model.train(training)
