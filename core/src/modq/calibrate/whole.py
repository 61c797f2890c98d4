"""Hands a block to the backends that work on it as a whole, through their hook `quantize_block`.

Such a backend is given the dense weights of its linears, what `quantize` made of each, and a way to run the
samples through the block with modules or tensors of its own in it. So it needs to know nothing of masks,
rotary angles or an encoder's states: they come out of the model's own code, see `replay`. What it gives back
is checked, and takes the place of what was there.

What the dense block returns is computed each time that it is asked for: kept, it would be as large as the
activations of all samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modq.api import check_result
from modq.calibrate.replay import Block, Replay
from modq.errors import BackendError
from modq.linear import QuantLinear
from modq.model import Scheme, quantized_layers
from modq.op import without_autocast
from modq.registry import describe_backend, load
from modq.spec import BlockCalibration, BlockResult, Calibration

_NONE: Mapping[str, Any] = MappingProxyType({})


def works_on_blocks(backend: str) -> bool:
    """Whether a backend has the hook, or cannot do without it."""
    return describe_backend(backend).calibration == "block" or bool(
        load(backend).quantize_block.get_hookimpls()
    )


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a dense linear, (out_features, in_features)."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]  # nn.Module types any attribute
    return weight if isinstance(linear, nn.Linear) else weight.T  # transformers' Conv1D has it transposed


@dataclass(frozen=True, slots=True, eq=False)
class DenseBlock:
    """A block of a model, with what was in it before it was quantized.

    Attributes:
        replay: runs samples up to the block.
        block: which one it is.
        linears: all that are planned, dense, by name in the block.
        tensors: other dense tensors as they were, of those that were changed since.
    """

    replay: Replay
    block: Block
    linears: Mapping[str, nn.Module]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The block as it is now."""
        return self.replay.model.get_submodule(self.block.name)

    def run(
        self, number: int, modules: Mapping[str, nn.Module] = _NONE, tensors: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        """Return the hidden states for a sample, with these modules and tensors instead of the block's."""
        args, kwargs = self.replay.inputs(self.block, number)
        with _standing_in(self.module, modules):
            output = functional_call(self.module, dict(tensors), args, kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def target(self, number: int) -> Tensor:
        """Return what the dense block gives for a sample."""
        with torch.no_grad():
            return self.run(number, self.linears, self.tensors)

    def change(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite dense tensors, and remember what they were."""
        own = _dense_tensors(self.module)
        for name, value in tensors.items():
            self.tensors.setdefault(name, own[name].detach().clone())
            with torch.no_grad():
                own[name].copy_(value)


def work_on(
    dense: DenseBlock, plan: Mapping[str, Scheme], calibrations: Mapping[str, Calibration]
) -> dict[str, QuantLinear]:
    """Have a backend work on a block, and change the block's dense tensors as it says.

    Args:
        dense: the block; its linears are quantized already, unless the backend does that here.
        plan: the backend's linears, by name in the block.
        calibrations: what is known of their inputs.

    Returns:
        The layers that shall stand for linears now.

    Raises:
        BackendError: if what it gives does not fit.
    """
    backend = next(iter(plan.values())).backend
    result = _ask(dense, backend, plan, calibrations)
    _check(result, dense, backend, plan)
    layers = {}
    for name, qweight in result.weights.items():
        layers[name] = QuantLinear.like(dense.linears[name], backend, plan[name].options)
        layers[name].adopt(qweight)
        layers[name].bias = dense.linears[name].bias  # type: ignore[assignment]  # nn.Module types any
    dense.change(result.dense_tensors)
    return layers


def _ask(
    dense: DenseBlock, backend: str, plan: Mapping[str, Scheme], calibrations: Mapping[str, Calibration]
) -> BlockResult:
    """Call the hook; what declines changes nothing."""
    module, weights = dense.module, {name: dense_weight(dense.linears[name]) for name in plan}
    held = {name: module.get_submodule(name) for name in plan}
    calibration = BlockCalibration(
        block=module,
        quantized={n: layer.quantized_weight for n, layer in held.items() if isinstance(layer, QuantLinear)},
        layers=calibrations,
        samples=len(dense.replay),
        run=dense.run,
        target=dense.target,
    )
    with torch.no_grad(), without_autocast(dense.replay.device):
        result: BlockResult | None = load(backend).quantize_block(
            weights=weights,
            options={name: scheme.options for name, scheme in plan.items()},
            calibration=calibration,
        )
    return BlockResult({}) if result is None else result


def _check(result: BlockResult, dense: DenseBlock, backend: str, plan: Mapping[str, Scheme]) -> None:
    """Refuse what does not fit, before anything is changed."""
    said = f"backend {backend!r}: quantize_block() gave"
    if not isinstance(result, BlockResult):
        raise BackendError(f"{said} a {type(result).__name__}, expected a BlockResult or None")
    if strange := sorted(result.weights.keys() - plan.keys()):
        raise BackendError(f"{said} a weight for {strange[0]!r}, expected {', '.join(plan)} only")
    for name, qweight in result.weights.items():
        out_features, in_features = dense_weight(dense.linears[name]).shape
        shape, options = (out_features, in_features), plan[name].options
        check_result(qweight, backend, shape, options, "quantize_block")
    own = _dense_tensors(dense.module)
    for name, value in result.dense_tensors.items():
        expected = (tuple(own[name].shape), own[name].dtype) if name in own else "none of that name"
        given = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
        if given != expected:
            raise BackendError(f"{said} the dense tensor {name!r} as {given}, expected {expected}")
    for name in sorted(plan.keys() - result.weights.keys()):
        if not isinstance(dense.module.get_submodule(name), QuantLinear):
            raise BackendError(f"{said} no weight for {name!r}, expected one: it is not quantized before")


def _dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a block's parameters and buffers, but for packed ones."""
    packed = {f"{n}.{part}" for n, layer in quantized_layers(module) for part, _ in layer.named_packed()}
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in named if name not in packed}


@contextmanager
def _standing_in(module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of a block's own."""
    own = {name: module.get_submodule(name) for name in modules}
    try:
        for name, other in modules.items():
            module.set_submodule(name, other)
        yield
    finally:
        for name, its in own.items():
            module.set_submodule(name, its)
