"""QuantLinear: a frozen linear layer over a quantized weight of any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from modq.api import dequantize_slice, describe_weight, quantize_weight
from modq.errors import BackendError, RequantizeError, ShapeError
from modq.lazy import LazyWeight
from modq.op import make_handle, multiply, stored, stored_specs, unstored
from modq.options import build_options
from modq.registry import describe_backend
from modq.spec import JSON, Calibration, QuantizedWeight, TensorSpec


class QuantLinear(nn.Linear):
    """y = x Ŵᵀ + b with Ŵ quantized and frozen.

    It is an nn.Linear so that adapters and `target_modules="all-linear"` see it; it never holds a dense
    weight. The packed tensors are Parameters without gradient, not buffers: DDP broadcasts buffers at every
    forward, accelerate does not offload them and FSDP2 does not shard them. Float tensors are held as uint8
    views of their bytes, so no dtype move changes a bit. It computes in the dtype of its input.

    Attributes:
        backend: the quantizer's name.
        options: the quantizer's options, as its dataclass.
        compute_dtype: the dtype that `weight` shows, and follows `.to(dtype)`.
        conv1d: whether it stands for a transformers `Conv1D`, whose dense weight is (in, out).
        writes: how often the quantized weight was replaced.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        backend: str,
        options: Any,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.backend, self.options = backend, options
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.conv1d = conv1d
        self.writes = 0
        self._handle = ""
        self._names: tuple[str, ...] = ()
        self._drafting = False
        self._draft: Tensor | None = None
        empty = torch.empty(out_features, dtype=self.compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, backend: str, calibration: Calibration | None = None, **options: Any
    ) -> QuantLinear:
        """Quantize an nn.Linear, or a transformers Conv1D; the bias is shared with it.

        Raises:
            BackendError, OptionError, ShapeError, DtypeError, WeightError: as `modq.quantize`.
        """
        return cls.from_dense(linear, backend, build_options(backend, options), calibration)

    @classmethod
    def from_dense(
        cls, linear: nn.Module, backend: str, options: Any, calibration: Calibration | None = None
    ) -> QuantLinear:
        """Do what `from_linear` does, with options already built."""
        layer = cls.like(linear, backend, options)
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]  # nn.Module types any attribute
        layer.adopt(quantize_weight(weight.T if layer.conv1d else weight, backend, options, calibration))
        if linear.bias is not None:
            layer.bias = linear.bias  # type: ignore[assignment]  # as above
        return layer

    @classmethod
    def like(
        cls, linear: nn.Module, backend: str, options: Any, *, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """Make a layer with the shape and bias of a dense one and no weight as yet; its bias is on meta."""
        weight: Tensor = linear.weight  # type: ignore[assignment]  # nn.Module types any attribute
        conv1d = not isinstance(linear, nn.Linear)
        in_features, out_features = weight.shape if conv1d else weight.shape[::-1]
        layer = cls(
            in_features,
            out_features,
            backend=backend,
            options=options,
            bias=linear.bias is not None,
            dtype=dtype or weight.dtype,
            device="meta",
            conv1d=conv1d,
        )
        return layer.train(linear.training)

    # The quantized weight

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The quantized weight over this module's own tensors."""
        return unstored(self._packed(), self._handle)

    @property
    def handle(self) -> str:
        """What this layer's kind of quantized weight is: see `modq.op`."""
        return self._handle

    def named_packed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the packed tensors by name, as they are held."""
        return ((name, getattr(self, name)) for name in self._names)

    def stored_specs(self) -> dict[str, TensorSpec]:
        """Return the shapes and dtypes that the packed tensors must have, as they are held."""
        shape = (self.out_features, self.in_features)
        return stored_specs(describe_weight(shape, self.backend, self.options))

    def adopt(self, qweight: QuantizedWeight) -> None:
        """Hold this quantized weight instead of whatever was held."""
        if tuple(qweight.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ShapeError(f"quantized weight has shape {tuple(qweight.shape)}, the layer needs {expected}")
        with torch.inference_mode(False):  # inference tensors could not be trained on later
            self._hold(stored(qweight.tensors), make_handle(qweight))

    def allocate(
        self, format_version: int, meta: Mapping[str, JSON], device: torch.device | str = "meta"
    ) -> None:
        """Hold tensors of the described shapes with no content, for a checkpoint's to be loaded into."""
        shape = (self.out_features, self.in_features)
        specs = describe_weight(shape, self.backend, self.options)
        empty = {name: _empty(spec, device) for name, spec in stored_specs(specs).items()}
        described = {name: _empty(spec, "meta") for name, spec in specs.items()}
        handle = make_handle(QuantizedWeight(self.backend, format_version, shape, described, meta))
        self._hold(empty, handle)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, (out_features, in_features), in `dtype` or the compute dtype."""
        if self._draft is not None:
            return self._draft.to(dtype or self.compute_dtype, copy=True)
        rows, columns = slice(0, self.out_features), slice(0, self.in_features)
        return dequantize_slice(self.quantized_weight, dtype or self.compute_dtype, rows, columns)

    def requantize_(self, weight: Tensor) -> None:
        """Quantize a dense weight, (out_features, in_features), into this layer.

        Raises:
            RequantizeError: if the backend needs calibration to make codes.
        """
        self.check_requantizable()
        with torch.inference_mode(False):  # inference tensors could not be trained on later
            plain = weight.detach().as_subclass(Tensor)
            if self._drafting:
                self._draft = plain.to(self._device, copy=True)
                self.writes += 1
            else:
                self.adopt(quantize_weight(plain.to(self._device), self.backend, self.options))

    def check_requantizable(self) -> None:
        """Raise a RequantizeError if the backend needs calibration to make codes."""
        if describe_backend(self.backend).calibration in ("hessian", "block"):
            raise RequantizeError(
                f"backend {self.backend!r} cannot make codes without calibration, so nothing merges into it "
                "in place; merge into a dense model instead: model.dequantize(), load the adapter, merge"
            )

    @contextmanager
    def writing_once(self) -> Iterator[None]:
        """Keep what is written to `weight` dense and quantize it once, at the end.

        An exception drops what was written; so does `adopt`.
        """
        if self._drafting:
            yield
            return
        self._drafting = True
        try:
            yield
            draft = self._draft
        finally:
            self._drafting, self._draft = False, None
        if draft is not None:
            self.requantize_(draft)

    # What nn.Linear users see

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear declares an attribute
        """The dense weight as a LazyWeight; until quantize-on-load has run, the placeholder."""
        placeholder = self._parameters.get("weight")
        return LazyWeight(self) if placeholder is None else placeholder

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.expects_dense:
            self._parameters["weight"] = value
        elif name == "weight":  # nn.Module would register a Parameter, past any property
            self.requantize_(value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ + b for x of shape (..., in_features)."""
        y = multiply(x, self._packed(), self._handle)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the backend and what it was told beside the shape."""
        told = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options))
        shape = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{shape}, backend={self.backend!r}, {told}"

    def reset_parameters(self) -> None:
        """Do nothing: a quantized weight is never initialised."""

    @property
    def execution_device(self) -> torch.device:
        """Where the layer computes: under accelerate's offload its tensors rest on meta, adapters do not."""
        device = self._device
        hook = getattr(self, "_hf_hook", None)
        target = getattr(hook, "execution_device", None)
        if device.type == "meta" and target is not None:
            return torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
        return device

    # Quantize-on-load

    def expect_dense(self) -> None:
        """Hold a placeholder under `weight`, on meta, so that a loader sees that key as expected."""
        shape = (self.out_features, self.in_features)
        placeholder = torch.empty(
            shape[::-1] if self.conv1d else shape, dtype=self.compute_dtype, device="meta"
        )
        self._parameters["weight"] = nn.Parameter(placeholder, requires_grad=False)

    @property
    def expects_dense(self) -> bool:
        """Whether it still waits for its dense weight."""
        return "weight" in self._parameters

    # Inside

    @property
    def _device(self) -> torch.device:
        held = (
            next(iter(self._parameters.values()), None) if not self._names else getattr(self, self._names[0])
        )
        return torch.device("cpu") if held is None else held.device

    def _packed(self) -> list[Tensor]:
        held: dict[str, Any] = self._parameters  # nn.Module's own search takes a µs a tensor
        return [held[name] for name in self._names]

    def _hold(self, tensors: Mapping[str, Tensor], handle: str) -> None:
        for name in ("weight", *self._names):
            self._parameters.pop(name, None)
        for name, tensor in tensors.items():
            if hasattr(self, name):
                raise BackendError(f"backend {self.backend!r}: a tensor may not be named {name!r}; rename it")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._names, self._handle, self._draft = tuple(tensors), handle, None
        self.writes += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow a dtype move in what `weight` shows; the packed tensors have no float dtype to move."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.compute_dtype = fn(torch.empty(1, dtype=self.compute_dtype, device=self._device)).dtype
        return self


def _empty(spec: TensorSpec, device: torch.device | str) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)
