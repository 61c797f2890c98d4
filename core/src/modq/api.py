"""The library functions on single weights, each checking what crosses the plugin line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modq.errors import BackendError, DtypeError, ShapeError, WeightError
from modq.op import make_handle, multiply, stored, without_autocast
from modq.options import build_options
from modq.registry import check_format_version, describe_backend, load
from modq.spec import Calibration, QuantizedWeight, TensorSpec

__all__ = ["dequantize", "matmul", "quantize"]


def quantize(
    weight: Tensor, backend: str, calibration: Calibration | None = None, **options: Any
) -> QuantizedWeight:
    """Quantize one weight matrix.

    Args:
        weight: (out_features, in_features), any float dtype; left untouched.
        backend: the name of an installed quantizer.
        calibration: second moments of the layer's inputs, for backends that use them.
        **options: the backend's options.

    Raises:
        BackendError: if the backend cannot be used, or breaks its contract.
        OptionError, ShapeError, DtypeError, WeightError: if an argument does not fit.
    """
    return quantize_weight(weight, backend, build_options(backend, options), calibration)


def dequantize(qweight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the whole dense matrix Ŵ, (out_features, in_features), in `dtype`."""
    return dequantize_slice(qweight, dtype, slice(0, qweight.shape[0]), slice(0, qweight.shape[1]))


def matmul(x: Tensor, qweight: QuantizedWeight, transpose: bool = False) -> Tensor:
    """Multiply by a quantized matrix, differentiably in `x`, without building the matrix whole.

    Args:
        x: (..., in_features), or (..., out_features) if `transpose`; any leading dimensions, none included.
        qweight: the matrix Ŵ, (out_features, in_features).
        transpose: False for x @ Ŵ.T, True for x @ Ŵ.

    Raises:
        ShapeError, DtypeError: if `x` does not fit.
    """
    return multiply(x, list(stored(qweight.tensors).values()), make_handle(qweight), transpose)


def quantize_weight(
    weight: Tensor, backend: str, options: Any, calibration: Calibration | None = None
) -> QuantizedWeight:
    """Quantize with options already built, and hold the plugin to what it described."""
    _check_weight(weight, backend, calibration)
    with torch.no_grad(), without_autocast(weight.device):
        qweight: QuantizedWeight = load(backend).quantize(
            weight=weight.detach(), options=options, calibration=calibration
        )
    check_result(qweight, backend, (weight.shape[0], weight.shape[1]), options)
    return qweight


def describe_weight(shape: tuple[int, int], backend: str, options: Any) -> Mapping[str, TensorSpec]:
    """Return the tensors of a layer of this shape, known before any weight is read."""
    check_shape(shape, backend)
    specs: Mapping[str, TensorSpec] = load(backend).describe(shape=shape, options=options)
    return specs


def dequantize_slice(qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
    """Return the dense Ŵ[rows, columns] in `dtype`."""
    check_format_version(qweight.backend, qweight.format_version)
    device = next(iter(qweight.tensors.values())).device
    with torch.no_grad(), without_autocast(device):
        dense: Tensor = load(qweight.backend).dequantize(
            qweight=qweight, dtype=dtype, rows=rows, columns=columns
        )
    return dense


def check_shape(shape: tuple[int, ...], backend: str) -> None:
    """Refuse what the backend cannot hold."""
    multiple = describe_backend(backend).multiple_of
    if len(shape) != 2 or 0 in shape:
        raise ShapeError(f"weight has shape {shape}, expected a non-empty (out_features, in_features)")
    if shape[0] % multiple[0] or shape[1] % multiple[1]:
        raise ShapeError(
            f"weight has shape {shape}; backend {backend!r} needs multiples of {multiple}: "
            "leave the layer out (modules_to_not_convert) or give it another backend (layers)"
        )


def _check_weight(weight: Tensor, backend: str, calibration: Calibration | None) -> None:
    check_shape(tuple(weight.shape), backend)
    if not weight.is_floating_point():
        raise DtypeError(f"weight is {weight.dtype}, expected a float dtype; is it quantized already?")
    low, high = weight.detach().aminmax()  # NaN is propagated; no temporary of the weight's size
    if not torch.isfinite(low) or not torch.isfinite(high):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"weight of shape {tuple(weight.shape)} has {bad} NaN or infinite values, expected none"
        )
    needs = describe_backend(backend).calibration
    if needs in ("hessian", "block") and calibration is None:
        raise WeightError(
            f"backend {backend!r} needs calibration ({needs}), none was given: use `modq quantize "
            "--calibration FILE`, or modq.quantize_model(model, backend, calibration=samples)"
        )


def check_result(
    qweight: object, backend: str, shape: tuple[int, int], options: Any, hook: str = "quantize"
) -> None:
    """Say at once, and by name, where a plugin's result is not what it described."""
    if not isinstance(qweight, QuantizedWeight):
        raise BackendError(
            f"backend {backend!r}: {hook}() gave a {type(qweight).__name__}, not a QuantizedWeight"
        )
    if (qweight.backend, tuple(qweight.shape)) != (backend, shape):
        given = f"{qweight.backend!r} {tuple(qweight.shape)}"
        raise BackendError(
            f"backend {backend!r}: {hook}() gave a weight of {given}, expected {backend!r} {shape}"
        )
    if qweight.format_version not in (known := describe_backend(backend).format_versions):
        version = qweight.format_version
        raise BackendError(
            f"backend {backend!r}: {hook}() gave a weight of format {version}, and its INFO knows {known}"
        )
    described = describe_weight(shape, backend, options)
    given_specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in qweight.tensors.items()}
    if given_specs != dict(described):
        wrong = sorted(n for n in {*given_specs, *described} if given_specs.get(n) != described.get(n))
        detail = "; ".join(f"{n}: {given_specs.get(n)} against {described.get(n)}" for n in wrong)
        raise BackendError(f"backend {backend!r}: {hook}() and describe() disagree on {detail}")
    if scalars := sorted(name for name, spec in described.items() if not spec.shape):
        raise BackendError(
            f"backend {backend!r}: {', '.join(scalars)} has no dimension; FSDP2 needs at least one"
        )
