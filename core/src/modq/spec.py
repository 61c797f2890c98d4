"""What a quantizer plugin declares and what crosses between it and the core. Torch is here for types only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, device, dtype, nn

API_VERSION = (1, 1)
"""(major, minor) of this contract: a plugin is usable if the majors match and its minor is not above ours."""

PROJECT = "modq"
_hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

JSON: TypeAlias = Any
"""A value that `json.dumps` takes and gives back unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A foreign checkpoint format that a plugin reads.

    Attributes:
        name: what users call it.
        when: a predicate without torch: each of these stands in what the checkpoint's config.json has under
            `config_key`; of a tuple, any; None stands for a key that is not there.
        tensors: the names of all tensors that may stand for one module, by what follows the module's name.
        marker: the one of them that a quantized module has and a dense one has not.
        native: the packages that load it themselves; modq does where none is installed, or where asked to.
        config_key: where config.json says how the checkpoint is quantized.
        fused: the modules that stand for several linears of the model: the last part of the module's name,
            and of the linears' in its place, in order. Of these modules a `bias` counts as a tensor, too.
        written: whether the plugin writes it, too.
    """

    name: str
    when: Mapping[str, JSON]
    tensors: tuple[str, ...]
    marker: str
    native: tuple[str, ...]
    config_key: str = "quantization_config"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    written: bool = True


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
    format_versions: tuple[int, ...] = (1,)  # of QuantizedWeight; those that it reads, others never reach it
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


class RunBlock(Protocol):
    """Runs a calibration sample through a block."""

    def __call__(
        self, number: int, modules: Mapping[str, nn.Module] = ..., tensors: Mapping[str, Tensor] = ...
    ) -> Tensor:
        """Return the hidden states, with these modules and tensors in the place of the block's own."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockCalibration:
    """A block of a model, and the samples that come to it; all names are those in the block.

    Attributes:
        block: the block as it is, in evaluation mode; not to be changed.
        quantized: what `quantize` made of the backend's linears; none if INFO.calibration is "block".
        layers: what each of them was given to learn from.
        samples: how many samples there are, numbered from 0.
        run: gives the hidden states that the block returns for a sample. Modules and tensors (parameters,
            buffers) may stand in for its own; it is differentiable where gradients are on.
        target: gives those that the block returned when all of it was dense, for the same inputs. It is
            computed at each call.
    """

    block: nn.Module
    quantized: Mapping[str, QuantizedWeight]
    layers: Mapping[str, Calibration]
    samples: int
    run: RunBlock
    target: Callable[[int], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BlockResult:
    """What `quantize_block` gives back, by name in the block.

    Attributes:
        weights: the linears that it made, or made anew.
        dense_tensors: what other parameters and buffers (of norms, biases) become, in their shape and dtype.
    """

    weights: Mapping[str, QuantizedWeight]
    dense_tensors: Mapping[str, Tensor] = field(default_factory=dict)


FewRows: TypeAlias = Callable[[int, int, int], None]
"""(address of x, address of out, rows): a product of contiguous rows, with all else looked up before."""


class Layout(Protocol):
    """How weights lie in tensors, and the product with them: from `modq.layouts`, or a plugin's own."""

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
        """Return what the hook `matmul` would."""

    def few_rows(self, tensors: Mapping[str, Tensor], dtype: dtype) -> FewRows | None:
        """Return what multiplies up to 4 rows, x @ Ŵ.T in `dtype`, by these tensors on a CPU; None declines.

        It may hold addresses of the tensors, which it is not called without, but nothing read from them.
        """


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
    def layout(self, shape: tuple[int, int], meta: Mapping[str, JSON]) -> Layout | None:
        """Optional, instead of `matmul`. The layout of all weights of this shape and meta.

        The core calls it directly, and looks up once a layer what a product of few rows takes.
        """

    @_hookspec(firstresult=True)
    def quantize_block(
        self, weights: Mapping[str, Tensor], options: Mapping[str, Any], calibration: BlockCalibration
    ) -> BlockResult | None:
        """Optional. Quantize the backend's linears of one block together, or tune what was made of them.

        Called once a block where there are samples, after `quantize` was for each of these linears; if
        INFO.calibration is "block", instead of it. `weights` are dense (out, in), `options` those of each,
        both by name in the block. Deterministic, as `quantize`. None leaves all as it is.
        """

    @_hookspec(firstresult=True)
    def prepare(self, qweight: QuantizedWeight, device: device) -> QuantizedWeight | None:
        """Optional. Repack once at load for a kernel of `device`; None keeps the canonical form."""

    @_hookspec(firstresult=True)
    def restore(self, qweight: QuantizedWeight, device: device) -> QuantizedWeight | None:
        """Optional, with `prepare`: its bit-exact inverse."""

    @_hookspec(firstresult=True)
    def import_layers(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, JSON],
        format: str,
        shapes: Mapping[str, tuple[int, int]],
    ) -> Mapping[str, ImportedLayer] | None:
        """Optional. Turn the tensors of one foreign module into layers.

        `tensors` has those of `Format.tensors` that the module has; `config` is what the checkpoint has under
        `Format.config_key`. `shapes` are the (out, in) that the model expects of the linears, by the names of
        `Format.fused` in order; of a module that is not fused, {"": (out, in)}. The result is by these names.
        Layers may have tensors in common, the same objects: these are held and stored once.
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
