"""Gradients through a quantized layer, and what is kept for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modq.linear import QuantLinear
from modq.testing.check import Breach, check
from modq.testing.compare import as_close, same_bits
from modq.testing.subject import Subject, Variant, gaussian

RANK = 4
ROUNDING = 1e-12
"""The relative error that float64 may have: some thousand roundings of 2e-16. A float32 step costs 6e-8."""

LINEAR: dict[str, Any] = {"fast_mode": True, "eps": 1e-3, "atol": 1e-8, "rtol": 1e-8}
"""For finite differences of what is linear: all but rounding is exact, and the larger the step the better."""


@check()
def lora_gradients_are_those_of_dense_autograd(subject: Subject) -> None:
    """In float64 the gradients of x and of a LoRA's A and B are those over the dense Ŵ."""
    for variant, shape in subject.cases():
        layer = subject.layer(variant, shape).to(torch.float64)
        dense = subject.dense(subject.quantized(variant, shape), torch.float64)
        got = _lora_gradients(layer, layer)
        want = _lora_gradients(partial(F.linear, weight=dense, bias=layer.bias), layer)
        for name, gradient in want.items():
            _equal_in_float64(name, got[name], gradient, f"{variant}, {shape}")


@check()
def gradients_agree_with_finite_differences(subject: Subject) -> None:
    """The layer's first and second derivatives are those that finite differences give."""
    shape = subject.shape(7, 12)
    for variant in subject.variants:
        layer = subject.layer(variant, shape).to(torch.float64)
        x = gaussian(2, shape[1], seed=1, dtype=torch.float64).requires_grad_()
        with _blaming("dX, against finite differences", variant):
            torch.autograd.gradcheck(layer, (x,), **LINEAR)
        with _blaming("the derivative of dX, against finite differences", variant):
            torch.autograd.gradgradcheck(layer, (x,), **LINEAR)


@check()
def the_backward_pass_is_as_close_as_the_dense_one(subject: Subject) -> None:
    """In bfloat16, float16 and float32 dX is as close to float64's as that of the dense product."""
    for variant, shape in subject.cases():
        layer = subject.layer(variant, shape, bias=False)
        exact = subject.dense(subject.quantized(variant, shape), torch.float64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = gaussian(33, shape[1], seed=1, dtype=dtype).requires_grad_()
            grad = gaussian(33, shape[0], seed=2, dtype=dtype)
            (dx,) = torch.autograd.grad(layer(x), x, grad)
            as_close("dX", dx, grad @ exact.to(dtype), grad.double() @ exact, f"{dtype}, {variant}, {shape}")


@check()
def nothing_dense_is_saved_for_backward(subject: Subject) -> None:
    """Between forward and backward nothing is kept but references to the packed tensors, not even x."""
    for variant, shape in subject.cases():
        layer = subject.layer(variant, shape)
        x = gaussian(5, shape[1], seed=1).requires_grad_()
        _saves_only_packed(layer, partial(layer, x), f"{variant}, {shape}")


@check()
def a_compiled_layer_is_one_graph_and_saves_nothing_dense(subject: Subject) -> None:
    """Under torch.compile there is no graph break, the same bits come out, and nothing dense is kept."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        layer = subject.layer(variant, shape)
        x = gaussian(5, shape[1], seed=1).requires_grad_()
        grad = gaussian(5, shape[0], seed=2)
        with _compiled(layer, variant) as compiled:
            y, want_y = compiled(x), layer(x)
            (dx,), (want_dx,) = (torch.autograd.grad(out, x, grad) for out in (y, want_y))
            _saves_only_packed(layer, partial(compiled, x), f"compiled, {variant}")
        same_bits("y of the compiled layer", y, want_y, str(variant))
        same_bits("dX of the compiled layer", dx, want_dx, str(variant))


@check()
def the_custom_ops_keep_the_rules_of_torch(subject: Subject) -> None:
    """Both ops pass torch.library.opcheck with the backend's tensors: schema, fake tensors, autograd, AOT."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        layer = subject.layer(variant, shape)
        packed = [tensor.data for _, tensor in layer.named_packed()]
        for name, width in (("linear", shape[1]), ("linear_backward", shape[0])):
            x = gaussian(5, width, seed=1).requires_grad_()
            with _blaming(f"modq::{name} under torch.library.opcheck", variant):
                torch.library.opcheck(getattr(torch.ops.modq, name).default, (x, packed, layer.handle))


@check()
def checkpointing_changes_no_gradient(subject: Subject) -> None:
    """Activation checkpointing, reentrant or not, gives every bit of the gradients without it."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        layer = subject.layer(variant, shape)
        want = _lora_gradients(layer, layer)
        for reentrant in (True, False):
            again = partial(checkpoint, layer, use_reentrant=reentrant)
            for name, gradient in _lora_gradients(again, layer).items():
                same_bits(name, gradient, want[name], f"use_reentrant={reentrant}, {variant}")


@check()
def autocast_decides_the_dtype(subject: Subject) -> None:
    """Under autocast the product is in its dtype and as close as the dense one's; float64 stays float64."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        layer = subject.layer(variant, shape, bias=False)
        exact = subject.dense(subject.quantized(variant, shape), torch.float64)
        x, low = gaussian(5, shape[1], seed=1).requires_grad_(), torch.bfloat16
        with torch.autocast("cpu", dtype=low):
            y, wide = layer(x), layer(x.double())
        grad = gaussian(5, shape[0], seed=2, dtype=low)
        (dx,) = torch.autograd.grad(y, x, grad)
        given, told = x.detach().to(low), f"under autocast, {variant}"
        as_close("y", y.detach(), given @ exact.to(low).T, given.double() @ exact.T, told)
        _equal_in_float64("y", wide, x.double() @ exact.T, told)
        as_close("dX", dx, (grad @ exact.to(low)).to(x.dtype), grad.double() @ exact, told)


def _lora_gradients(product: Callable[[Tensor], Any], layer: QuantLinear) -> dict[str, Tensor]:
    """Return the gradients of the mean of (product(x) + x Aᵀ Bᵀ)², in the layer's dtype."""
    shapes = (3, layer.in_features), (RANK, layer.in_features), (layer.out_features, RANK)
    x, a, b = (
        gaussian(*shape, seed=seed, dtype=layer.compute_dtype).requires_grad_()
        for seed, shape in enumerate(shapes, start=1)
    )
    # autograd.grad is no way: reentrant checkpointing does not work under it
    (product(x) + x @ a.T @ b.T).square().mean().backward()
    return {f"d{name}": leaf.grad for name, leaf in (("X", x), ("A", a), ("B", b)) if leaf.grad is not None}


def _equal_in_float64(quantity: str, got: Tensor, want: Tensor, because: str) -> None:
    got, want = got.detach(), want.detach()
    if got.dtype != torch.float64 or got.shape != want.shape:
        given, expected = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (got, want))
        raise Breach(f"{quantity} is {given}, expected {expected} ({because})")
    error = float((got - want).norm() / want.norm().clamp(min=1e-300))
    if not error <= ROUNDING:  # NaN is no less
        raise Breach(
            f"{quantity} is off by {error:.3g} (relative to its norm), expected at most {ROUNDING:g}: "
            f"it is computed in float64 ({because})"
        )


def _saves_only_packed(layer: QuantLinear, forward: Callable[[], object], because: str) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    own = {tensor.untyped_storage().data_ptr() for _, tensor in layer.named_packed()}
    if not saved:
        raise Breach(f"nothing is saved for backward, expected references to the packed tensors ({because})")
    for tensor in saved:
        if tensor.untyped_storage().data_ptr() not in own:
            kind = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise Breach(
                f"{kind} is saved for backward, expected references to packed tensors only ({because})"
            )


@contextmanager
def _compiled(layer: QuantLinear, variant: Variant) -> Iterator[Callable[[Tensor], Tensor]]:
    """Compile a layer; leave nothing behind, for what was compiled counts against a limit of torch's."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of its own internals, which pytest may make errors of
        with _blaming("torch.compile(fullgraph=True)", variant):
            yield torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@contextmanager
def _blaming(quantity: str, variant: Variant) -> Iterator[None]:
    """Say in a line what a checker of torch says in many."""
    try:
        yield
    except Breach:
        raise
    except Exception as error:
        raise Breach(f"{quantity}: {' '.join(str(error).split()):.400} ({variant})") from error
