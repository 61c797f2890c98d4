"""The one differentiable product behind every quantized layer, as a pair of opaque custom ops.

    modq::linear           Y  = X · Ŵᵀ     (..., in)  -> (..., out)
    modq::linear_backward  dX = dY · Ŵ     (..., out) -> (..., in)

The base is frozen, so dX is all that a backward needs, and each op is the other's derivative. They are
opaque on purpose: tracing through an `autograd.Function`, torch.compile shares the dequantized matrix between
forward and backward and keeps it; through these ops it can save nothing but references to the packed tensors,
not even X.

An op sees a weight as a list of tensors and a `handle`: canonical JSON of all else that decoding needs. A
handle is a value, equal for all layers of one kind, so they share one compiled graph, and it means the same
in any process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import pluggy
import torch
from torch import Tensor

from modq.errors import DtypeError, ShapeError
from modq.kernels.crossing import SURELY_FUSED
from modq.registry import check_format_version, load
from modq.spec import FewRows, Layout, QuantizedWeight, TensorSpec

_HELD = (torch.uint8, torch.int8, torch.int32, torch.int64)
"""What packed tensors may be held in. Floats would follow dtype moves; other integers no collective of gloo
or NCCL takes, so a model that holds them trains in one process only."""

MOST_BOUND = 4096
"""Layers of one kind whose products are kept looked up."""

_UNKNOWN: Any = object()

_SCHEMA = "(Tensor x, Tensor[] tensors, str handle) -> Tensor"


def multiply(x: Tensor, tensors: Sequence[Tensor], handle: str, transpose: bool = False) -> Tensor:
    """Multiply by a quantized matrix, differentiably in `x` and under autocast.

    Args:
        x: (..., in), or (..., out) if `transpose`, of a float dtype.
        tensors: the stored tensors in the order of `handle`.
        handle: as `make_handle` gives it.
        transpose: False for x @ Ŵ.T, True for x @ Ŵ.

    Returns:
        (..., out), or (..., in) if `transpose`; in the dtype of `x`, or in autocast's.

    Raises:
        ShapeError, DtypeError: if `x` does not fit.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        x = _autocast(x)
    if _is_plain(x):
        return _product(x, list(tensors), handle, transpose)
    product: Tensor = (_linear_backward if transpose else _linear)(x, list(tensors), handle)
    return product


def make_handle(qweight: QuantizedWeight) -> str:
    """Return the handle of a quantized weight, whose tensors go to the ops as `stored` gives them."""
    content = {
        "backend": qweight.backend,
        "dtypes": {name: _dtype_name(tensor.dtype) for name, tensor in qweight.tensors.items()},
        "format_version": qweight.format_version,
        "meta": dict(qweight.meta),
        "shape": list(qweight.shape),
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def handle_content(handle: str) -> dict[str, Any]:
    """Return what a handle says: backend, dtypes, format_version, meta and shape."""
    content: dict[str, Any] = json.loads(handle)
    return content


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a module holds them: by name, floats as uint8 views of their bytes.

    No `.to(dtype)`, kbit-preparation or mixed precision then changes a scale. See _HELD.
    """
    return {
        name: tensor.contiguous() if tensor.dtype in _HELD else tensor.contiguous().view(torch.uint8)
        for name, tensor in sorted(tensors.items())
    }


def stored_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the shapes and dtypes that `stored` gives for tensors of these."""
    return {
        name: spec
        if spec.dtype in _HELD
        else TensorSpec((*spec.shape[:-1], spec.shape[-1] * spec.dtype.itemsize), torch.uint8)
        for name, spec in sorted(specs.items())
    }


def unstored(tensors: Sequence[Tensor], handle: str) -> QuantizedWeight:
    """Return the quantized weight that a handle and its stored tensors stand for, without a copy."""
    return _resolve(handle).qweight(tensors)


class _Kind:
    """What a handle says, read once: all layers of one kind share it."""

    def __init__(self, handle: str) -> None:
        content = handle_content(handle)
        self.backend: str = content["backend"]
        self.format_version: int = content["format_version"]
        self.shape: tuple[int, int] = (content["shape"][0], content["shape"][1])
        self.meta: dict[str, Any] = content["meta"]
        self.dtypes = {name: getattr(torch, dtype) for name, dtype in sorted(content["dtypes"].items())}
        self.hooks: pluggy.HookRelay = load(self.backend)
        self._matmul = first_result(self.hooks.matmul)
        check_format_version(self.backend, self.format_version)
        fallback_only = all(each.trylast for each in self.hooks.matmul.get_hookimpls())
        self._layout: Layout | None = (
            self.hooks.layout(shape=self.shape, meta=self.meta) if fallback_only else None
        )
        self._bound: dict[tuple[Any, ...], FewRows | None] = {}

    def matmul(self, x: Tensor, tensors: Sequence[Tensor], transpose: bool) -> Tensor:
        """Multiply by the layout that was looked up for all weights of the kind, or by the hook."""
        qweight = self.qweight(tensors)
        if self._layout is not None:
            return self._layout.matmul(x, qweight.tensors, transpose)
        y: Tensor = self._matmul(x=x, qweight=qweight, transpose=transpose)
        return y

    def few_rows(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return x @ Ŵ.T for a few rows on a CPU, or None if this is something else.

        What such a product takes is looked up once for each layer: to do so each time takes as long as the
        product itself, since the weights that stream past leave none of it in the caches. What was looked up
        is kept by the addresses of the tensors: it holds numbers only, as good for the next tensors there.
        """
        out_features, in_features = self.shape
        if (
            self._layout is None
            or type(x) is not Tensor
            or not x.is_cpu
            or not 0 < x.numel() <= SURELY_FUSED * in_features
            or not x.is_contiguous()
        ):
            return None
        key = (x.dtype, *[tensor.data_ptr() for tensor in tensors])
        product = self._bound.get(key, _UNKNOWN)
        if product is _UNKNOWN:
            product = self._layout.few_rows(self.qweight(tensors).tensors, x.dtype)
            if len(self._bound) >= MOST_BOUND:
                self._bound.clear()
            self._bound[key] = product
        if product is None:
            return None
        y = x.new_empty((*x.shape[:-1], out_features))
        product(x.data_ptr(), y.data_ptr(), x.numel() // in_features)
        return y

    def qweight(self, tensors: Sequence[Tensor]) -> QuantizedWeight:
        named = {
            name: tensor if tensor.dtype == dtype else tensor.view(dtype)
            for (name, dtype), tensor in zip(self.dtypes.items(), tensors, strict=True)
        }
        return QuantizedWeight(self.backend, self.format_version, self.shape, named, self.meta)


def first_result(hook: pluggy.HookCaller) -> Callable[..., Any]:
    """Return what calls a hook's implementations as pluggy does, the last one first, for less time a call.

    What pluggy itself takes is a tenth of a small product. Wrappers, which need it, get it.
    """
    found = hook.get_hookimpls()
    if any(each.hookwrapper or each.wrapper for each in found):
        return hook
    inside = [(each.function, each.argnames) for each in reversed(found)]

    def call(**given: Any) -> Any:
        for function, names in inside:
            result = function(*[given[name] for name in names])
            if result is not None:
                return result
        return None

    return call


@lru_cache(maxsize=4096)  # far more kinds of layer than a model has
def _resolve(handle: str) -> _Kind:
    return _Kind(handle)


@lru_cache(maxsize=4096)
def _shape(handle: str) -> tuple[int, int]:
    """The (out, in) of a handle, without the plugin: tracing needs no more."""
    out_features, in_features = handle_content(handle)["shape"]
    return out_features, in_features


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain(x: Tensor) -> bool:
    """Tell whether nothing watches what is done to x: no autograd, tracer, transform or other mode.

    Then the ops would only cost time, as much as a small product does.
    """
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _autocast(x: Tensor) -> Tensor:
    """Do what autocast would: it does not look into custom ops."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast out of a hook: inside, it would cast what a plugin multiplies in float32 on purpose."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _width(x: Tensor, handle: str, transpose: bool) -> int:
    """Return how wide the product is, or refuse an `x` that does not fit."""
    out_features, in_features = _shape(handle)
    depth, width = (out_features, in_features) if transpose else (in_features, out_features)
    if x.dim() == 0 or x.shape[-1] != depth:
        side = "out_features" if transpose else "in_features"
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected (..., {depth}): the weight's {side}")
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}, expected a float dtype; cast it first")
    return width


def _product(x: Tensor, tensors: list[Tensor], handle: str, transpose: bool) -> Tensor:
    width = _width(x, handle, transpose)
    if not x.numel():  # an expert that no token came to; not all kernels take it
        return x.new_empty((*x.shape[:-1], width))
    kind = _resolve(handle)
    y = None if transpose else kind.few_rows(x, tensors)
    if y is not None:
        return y
    with without_autocast(x.device):
        y = kind.matmul(x, tensors, transpose)
    return _own(y)


def _own(y: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: adapters add to the result in place, which autograd
    forbids on a view that was made inside a custom op.
    """
    return y if y._base is None else y.new_empty(0).set_(y)  # type: ignore[call-overload]  # torch's stub lacks it


@torch.library.custom_op("modq::linear", mutates_args=(), schema=_SCHEMA)
def _linear(x: Tensor, tensors: list[Tensor], handle: str) -> Tensor:
    return _product(x, tensors, handle, transpose=False)


@torch.library.custom_op("modq::linear_backward", mutates_args=(), schema=_SCHEMA)
def _linear_backward(x: Tensor, tensors: list[Tensor], handle: str) -> Tensor:
    return _product(x, tensors, handle, transpose=True)


@_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], handle: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _width(x, handle, transpose=False)))


@_linear_backward.register_fake
def _(x: Tensor, tensors: list[Tensor], handle: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _width(x, handle, transpose=True)))


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    _, tensors, ctx.handle = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    tensors = list(ctx.saved_tensors)
    return _linear_backward(grad, tensors, ctx.handle), [None] * len(tensors), None


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    tensors = list(ctx.saved_tensors)
    return _linear(grad, tensors, ctx.handle), [None] * len(tensors), None


_linear.register_autograd(_differentiate_linear, setup_context=_save)
_linear_backward.register_autograd(_differentiate_backward, setup_context=_save)
