"""Gathers the second moments of the inputs of linears: H = mean of x xᵀ over tokens, in float32.

Linears that are given the very same tensor (q, k, v; gate, up) share one H, gathered once. The groups of such
linears, in the order in which a block calls them, are also the order of a true-sequential quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from modq.calibrate.replay import Reached
from modq.spec import Calibration


class SecondMoment:
    """The running mean of x xᵀ of one group of linears."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs, (..., in_features)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self.sum is None:
            self.sum = rows.new_zeros((rows.shape[1], rows.shape[1]))
        self.sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def calibration(self) -> Calibration:
        """Return what plugins are given."""
        assert self.sum is not None
        return Calibration(hessian=self.sum.div_(self.tokens), samples=self.tokens)


def shared_inputs(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Group linears by the tensor that they are given, in the order in which `run` calls them.

    Linears that are not called are in no group.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # the tensors are kept, so that none takes another's place

    def note(name: str, x: Tensor) -> None:
        for tensor, names in seen:
            if _same(tensor, x):
                if name not in names:
                    names.append(name)
                return
        if not any(name in names for _, names in seen):  # one that is called twice counts where it was first
            seen.append((x, [name]))

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in seen]


def _same(left: Tensor, right: Tensor) -> bool:
    return (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left._version == right._version
    )


def gather(
    linears: Mapping[str, nn.Module], runs: Sequence[Callable[[], object]], *, stop_after: str | None = None
) -> dict[str, SecondMoment]:
    """Gather the second moments of the inputs of linears over some runs.

    Args:
        linears: one of each group that shares its inputs, by name.
        runs: each runs a sample through the block.
        stop_after: the linear at which a run may end, having no more to give.
    """
    moments = {name: SecondMoment() for name in linears}

    def add(name: str, x: Tensor) -> None:
        moments[name].add(x)
        if name == stop_after:
            raise Reached

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, module in linears.items()
    ]
    try:
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return moments
