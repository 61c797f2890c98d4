"""How checks compare: each function raises a Breach that names the quantity and gives the numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modq.spec import QuantizedWeight
from modq.testing.check import Breach


def same_bits(quantity: str, got: Tensor, want: Tensor, because: str = "") -> None:
    """Demand that two tensors are equal in shape, dtype and every bit."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Breach(_text(f"{quantity} is {_kind(got)}, expected {_kind(want)}", because))
    left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (got, want))
    if not torch.equal(left, right):
        other = int((got != want).sum())
        first = tuple(int(i) for i in (got != want).nonzero()[0]) if other else ()
        where = (
            f", the first at {first}: {got[first].item()!r}, expected {want[first].item()!r}" if other else ""
        )
        raise Breach(_text(f"{quantity}: {other} of {want.numel()} numbers differ{where}", because))


def same_weight(quantity: str, got: QuantizedWeight, want: QuantizedWeight, because: str = "") -> None:
    """Demand that two quantized weights are equal: kind, meta and every bit of every tensor."""
    for attribute in ("backend", "format_version", "shape", "meta"):
        mine, its = getattr(got, attribute), getattr(want, attribute)
        if (dict(mine) if isinstance(mine, Mapping) else mine) != (
            dict(its) if isinstance(its, Mapping) else its
        ):
            raise Breach(_text(f"{attribute} of {quantity} is {mine!r}, expected {its!r}", because))
    if got.tensors.keys() != want.tensors.keys():
        raise Breach(
            _text(
                f"{quantity} has the tensors {sorted(got.tensors)}, expected {sorted(want.tensors)}", because
            )
        )
    for name, tensor in want.tensors.items():
        same_bits(f"{name} of {quantity}", got.tensors[name], tensor, because)


def as_close(quantity: str, got: Tensor, dense: Tensor, exact: Tensor, because: str = "") -> None:
    """Demand an error of at most twice that of the dense product of the same dtype, plus float32's rounding.

    Args:
        quantity: what it is called: `y`, `dX`.
        got: what is judged.
        dense: the same by a dense product in the dtype of `got`.
        exact: the same in float64.
        because: what else to say.
    """
    if got.shape != exact.shape or got.dtype != dense.dtype:
        expected = f"{dense.dtype} {tuple(exact.shape)}"
        raise Breach(_text(f"{quantity} is {_kind(got)}, expected {expected}", because))
    if not bool(torch.isfinite(got).all()):
        raise Breach(
            _text(f"{quantity} has NaN or infinite values where the dense product has none", because)
        )
    got = got.detach()
    # rounding the exact result to the dtype costs as much: a dense product of few terms may have no error
    rounding = (exact.to(got.dtype).double() - exact).norm()
    error, limit = (got.double() - exact).norm(), 2 * max((dense.double() - exact).norm(), rounding)
    # what is computed beside the sum, such as rotations of x, rounds in float32 or better
    limit += 2 * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * exact.norm()
    if error > limit:
        size = exact.norm().clamp(min=1e-300)
        raise Breach(
            _text(
                f"{quantity} is off by {float(error / size):.3g} (relative to its norm), expected at most "
                f"{float(limit / size):.3g}: twice the dense product's",
                because,
            )
        )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _text(breach: str, because: str) -> str:
    return f"{breach} ({because})" if because else breach
