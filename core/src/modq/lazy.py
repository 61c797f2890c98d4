"""`QuantLinear.weight`: a tensor with the shape and dtype of the dense weight and no storage.

Adapters read and write `base_layer.weight` as if it were dense. Reading dequantizes. Writing goes through:
every read gives a `DenseView` that shares one dense copy with all views taken of it, and an in-place op on
any of them (seen by the copy's version counter, not by the op's name) quantizes the copy back into the
module. So `weight.data += delta`, `weight.data[0] = 1` and `weight.detach().mul_(2)` all do what they say;
none edits a temporary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from modq.linear import QuantLinear

_METADATA = frozenset(
    {
        "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
        "is_floating_point", "is_inference", "is_pinned", "is_shared", "is_signed", "ndimension", "nelement",
        "numel", "requires_grad_", "size", "storage_offset", "stride",
    }
)  # fmt: skip
"""Methods of a tensor that say something of it without its values."""

_VALUE_PROPERTIES = frozenset({"T", "H", "mT", "mH", "real", "imag", "data"})
"""Properties of a tensor that give its values; all others are metadata."""


class LazyWeight(Tensor):
    """The weight of a QuantLinear as others see it; `isinstance(weight, nn.Parameter)` holds."""

    _module: QuantLinear

    @staticmethod
    def __new__(cls, module: QuantLinear) -> LazyWeight:
        weight: LazyWeight = Tensor._make_wrapper_subclass(
            cls,
            (module.out_features, module.in_features),
            dtype=module.compute_dtype,
            device=module.execution_device,
            requires_grad=False,
        )
        weight._module = module
        weight._is_param = True  # what torch's own Parameter metaclass looks at
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must never initialise over it
        return weight

    def __init__(self, module: QuantLinear) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes a keyword of its own use
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._module.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._module.dequantize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's

    @property
    def data(self) -> Tensor:
        """A dense copy that writes through."""
        return _Copy(self._module).view()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not (isinstance(value, DenseView) and value._dense_copy.is_current(self._module)):
            self._module.requantize_(value)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        copies: dict[int, Tensor] = {}

        def dense(value: Any) -> Any:
            if not isinstance(value, LazyWeight):
                return value
            module = value._module
            return copies.setdefault(id(module), _Copy(module).view())

        return func(*pytree.tree_map(dense, args), **pytree.tree_map(dense, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Serve C++ code, which passes `__torch_function__` by: it may read, but a write would be lost."""
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would write into a temporary copy of a quantized weight; use weight.data"
            )

        def dense(value: Any) -> Any:
            return value._module.dequantize() if isinstance(value, LazyWeight) else value

        return func(*pytree.tree_map(dense, args), **pytree.tree_map(dense, kwargs or {}))


class DenseView(Tensor):
    """A dense copy of a quantized weight, or a view of one; in-place ops on it write through."""

    _dense_copy: _Copy

    @property
    def data(self) -> Tensor:
        """Itself: torch's own `.data` would hide writes from the version counter."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        self.copy_(value)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        touched = {
            id(v._dense_copy): v._dense_copy
            for v in pytree.tree_leaves((args, kwargs))
            if isinstance(v, DenseView)
        }
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            for copy in touched.values():
                copy.write_through()
            return pytree.tree_map(lambda value: _as_view(value, touched.values()), result)


class _Copy:
    """One dense copy of a module's weight, shared by all views of it."""

    def __init__(self, module: QuantLinear) -> None:
        self._module = module
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor has no version counter
            self._dense = module.dequantize()
        self._version = self._dense._version
        self._write: int | None = None

    def view(self) -> DenseView:
        return self.wrap(self._dense)

    def wrap(self, tensor: Tensor) -> DenseView:
        view = tensor.as_subclass(DenseView)
        view._dense_copy = self
        return view

    def owns(self, tensor: Tensor) -> bool:
        return bool(tensor.untyped_storage()._cdata == self._dense.untyped_storage()._cdata)

    def write_through(self) -> None:
        if self._dense._version != self._version:
            self._version = self._dense._version
            self._module.requantize_(self._dense)
            self._write = self._module.writes

    def is_current(self, module: QuantLinear) -> bool:
        """Whether the module's codes come from this copy as it is: `w.data += d` writes, then assigns it."""
        return self._write == module.writes and module is self._module


def _as_view(value: Any, copies: Any) -> Any:
    """Keep what shares memory with a copy a view of it; give anything else as a plain tensor."""
    if not isinstance(value, Tensor) or isinstance(value, DenseView) or value.is_sparse or value.numel() == 0:
        return value
    return next((copy.wrap(value) for copy in copies if copy.owns(value)), value)


def _is_metadata(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", "") not in _VALUE_PROPERTIES  # type: ignore[attr-defined]
    return name in _METADATA
