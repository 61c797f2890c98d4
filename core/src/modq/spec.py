"""What a quantizer plugin declares and what crosses between it and the core. Torch is here for types only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, device, dtype, nn

API_VERSION = (1, 0)
"""(major, minor) of this contract: a plugin is usable if the majors match and its minor is not above ours."""

PROJECT = "modq"
_hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

JSON: TypeAlias = Any
"""A value that `json.dumps` takes and gives back unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A foreign checkpoint format that a plugin reads and writes.

    Attributes:
        name: what users call it.
        when: a predicate without torch: each of these stands in the checkpoint's `quantization_config`; of a
            tuple, any; None stands for a key that is not there.
        tensors: the names of all tensors that may stand for one linear, by what follows the linear's name.
        marker: the one of them that a quantized linear has and a dense one has not.
        native: the packages that load it themselves; modq does where none is installed, or where asked to.
    """

    name: str
    when: Mapping[str, JSON]
    tensors: tuple[str, ...]
    marker: str
    native: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An outside kernel that may serve a layout where its package is installed."""

    name: str
    module: str  # import path, looked up only when a kernel is chosen
    layout: str
    bits: tuple[float, ...]
    dtypes: tuple[str, ...]
    directions: tuple[Literal["forward", "transpose"], ...]
    devices: tuple[str, ...]
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerInfo:
    """A plugin's entry point value: all that can be said of a backend without importing torch."""

    name: str
    summary: str
    implementation: str  # "package.module:Class", imported by `load(name)`
    options: str  # "package.module:Options", a frozen dataclass in a module that imports no torch
    bits: tuple[float, ...]  # the nominal bits a weight that it offers
    max_relative_error: Mapping[float, float]  # for each bits: ||W - Ŵ||_F / ||W||_F on a Gaussian W
    api: tuple[int, int] = (1, 0)
    calibration: Literal["none", "optional", "hessian", "block"] = "none"
    multiple_of: tuple[int, int] = (1, 1)  # (out_features, in_features) must divide by these
    formats: tuple[Format, ...] = ()
    providers: tuple[Provider, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor of a quantized layer will be, known before any weight is read."""

    shape: tuple[int, ...]
    dtype: dtype


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A quantized (out_features, in_features) matrix: named tensors plus small JSON.

    `meta` holds what all layers of one kind share. A number that differs from layer to layer (a global scale,
    a seed) is a tensor: layers whose `meta` differ do not share a compiled graph.
    """

    backend: str
    format_version: int
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, JSON] = field(default_factory=dict)

    def to(self, device: device | str) -> QuantizedWeight:
        """Return the same weight with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """The bytes that the tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """The stored bits for each weight of the matrix, scales and all."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What is known of a layer's inputs x, rows of length in_features."""

    hessian: Tensor | None = None  # (in, in) float32, mean of x xᵀ over the samples
    samples: int = 0
    inputs: Tensor | None = None  # (rows, in), a bounded sample, for plugins that ask for it


@dataclass(frozen=True, slots=True, eq=False)
class ImportedLayer:
    """A linear out of a foreign checkpoint: its weight, and the options that would have made it."""

    qweight: QuantizedWeight
    options: Any


@dataclass(frozen=True, slots=True, eq=False)
class BlockResult:
    """What `quantize_block` gives back: quantized linears by name, and dense tensors it changed (norms)."""

    weights: Mapping[str, QuantizedWeight]
    dense_tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Quantizer:
    """The hookspec. Each backend has a plugin manager of its own, so every hook is first-result.

    A plugin is a class whose instances carry methods marked `@modq.hookimpl`, with these names. A method may
    take fewer arguments than the spec lists; it may not give one a default or take `*args`/`**kwargs`.
    """

    @_hookspec(firstresult=True)
    def describe(self, shape: tuple[int, int], options: Any) -> Mapping[str, TensorSpec]:  # type: ignore[empty-body]
        """REQUIRED. The tensors that `quantize` gives for a weight of `shape` = (out, in), exactly."""

    @_hookspec(firstresult=True)
    def quantize(  # type: ignore[empty-body]
        self, weight: Tensor, options: Any, calibration: Calibration | None
    ) -> QuantizedWeight:
        """REQUIRED. Quantize `weight` (out, in), any float dtype. Pure and deterministic; no global RNG."""

    @_hookspec(firstresult=True)
    def dequantize(  # type: ignore[empty-body]
        self, qweight: QuantizedWeight, dtype: dtype, rows: slice, columns: slice
    ) -> Tensor:
        """REQUIRED. The dense Ŵ[rows, columns] in exactly `dtype`, a tensor of its own.

        The slices have step 1 and lie inside the shape; the result shares no memory with `qweight`.
        """

    @_hookspec(firstresult=True)
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor | None:
        """Optional. `x @ Ŵ.T`, or `x @ Ŵ` if `transpose`: (..., in) -> (..., out) or back. None declines."""

    @_hookspec(firstresult=True)
    def quantize_block(self, block: nn.Module, inputs: Tensor, options: Any) -> BlockResult | None:
        """Optional. Quantize the linears of a whole decoder block, for algorithms that tune it as one."""

    @_hookspec(firstresult=True)
    def prepare(self, qweight: QuantizedWeight, device: device) -> QuantizedWeight | None:
        """Optional. Repack once at load for a kernel of `device`; None keeps the canonical form."""

    @_hookspec(firstresult=True)
    def restore(self, qweight: QuantizedWeight, device: device) -> QuantizedWeight | None:
        """Optional, with `prepare`: its bit-exact inverse."""

    @_hookspec(firstresult=True)
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, JSON], format: str
    ) -> Mapping[str, ImportedLayer] | None:
        """Optional. Turn the tensors of one foreign module into layers.

        `tensors` has those of `Format.tensors` that the module has; `config` is the checkpoint's. The result
        is by the linear's name relative to the module, "" for the module itself.
        """

    @_hookspec(firstresult=True)
    def export_layers(
        self, weights: Mapping[str, QuantizedWeight], format: str, dtype: dtype
    ) -> Mapping[str, Tensor] | None:
        """Optional. The inverse of `import_layers`, for a model that computes in `dtype`."""

    @_hookspec(firstresult=True)
    def export_config(
        self, options: Any, format: str, dtype: dtype, dense: Sequence[str], layers: Mapping[str, Any]
    ) -> Mapping[str, JSON] | None:
        """Optional. The `quantization_config` for `export_layers`; `dense` names the linears left dense.

        It is asked for each of the `options` that layers have, and must be the same for all of them: a format
        that can say what differs from layer to layer makes it of `layers`, the options by name.
        """

    @_hookspec(firstresult=True)
    def check_environment(self) -> str | None:
        """Optional. Why this backend cannot run here ("needs CUDA 12"), or None."""


REQUIRED_HOOKS = ("describe", "quantize", "dequantize")
