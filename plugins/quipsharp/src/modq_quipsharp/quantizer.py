"""The hooks of the quipsharp backend, and the algorithm from a weight to codes (QuIP#, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from modq.errors import OptionError, WeightError
from modq.spec import (
    JSON,
    BlockCalibration,
    BlockResult,
    Calibration,
    ImportedLayer,
    QuantizedWeight,
    TensorSpec,
    hookimpl,
)
from modq_quipsharp.layout import Rotated, layout_of
from modq_quipsharp.ldlq import round_plainly, round_with_feedback
from modq_quipsharp.options import Options
from modq_quipsharp.relaxml import read_module
from modq_quipsharp.rotation import Rotation
from modq_quipsharp.tuning import tune_block

FORMAT_VERSION = 1

SCALES = {
    "e8p": {2: 1.03, 3: 0.98, 4: 1.03},
    "uniform": {2: 1.0043, 3: 1.7065, 4: 2.9833},
}
"""The rms of rotated weights in units of the codebook, where a Gaussian loses least.

Those of e8p are QuIP#'s; those of uniform are 1/step for the best steps of Max (1960). QuIP's 2.4 standard
deviations to the end of the grid would be 0.625, 1.458 and 3.125.
"""


class QuipSharp:
    """QuIP#, and QuIP with the options that make it."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> Mapping[str, TensorSpec]:
        """Name the tensors of a layer of this shape."""
        return layout_of(shape, options).specs()

    @hookimpl
    def quantize(self, weight: Tensor, options: Options, calibration: Calibration | None) -> QuantizedWeight:
        """Rotate, round with feedback if there is calibration, and pack."""
        shape = (weight.shape[0], weight.shape[1])
        layout = layout_of(shape, options)
        hessian = _hessian(weight, options, calibration)
        tensors = _quantize(_as_whole(weight.float(), layout), hessian, layout, options)
        tensors["output_scales"] = tensors["output_scales"][layout.own].clone()
        return QuantizedWeight("quipsharp", FORMAT_VERSION, shape, tensors, layout.meta)

    @hookimpl
    def quantize_block(
        self, weights: Mapping[str, Tensor], options: Mapping[str, Options], calibration: BlockCalibration
    ) -> BlockResult | None:
        """Tune the scale vectors, and the block's norms and biases, where options ask for it."""
        return tune_block(weights, options, calibration)

    @hookimpl
    def dequantize(self, qweight: QuantizedWeight, dtype: torch.dtype, rows: slice, columns: slice) -> Tensor:
        """Decode all and rotate what the slice needs."""
        return _layout(qweight.shape, qweight.meta).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def layout(self, shape: tuple[int, int], meta: Mapping[str, JSON]) -> Rotated:
        """Name the layout, which multiplies and rotates the activations."""
        return _layout(shape, meta)

    @hookimpl
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, JSON], shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, ImportedLayer]:
        """Read one module of a checkpoint of the paper's authors, fused or not."""
        parts = [(name, rows) for name, (rows, _) in shapes.items()]
        return read_module(tensors, parts, config, FORMAT_VERSION)


_rotated = lru_cache(maxsize=256)(Rotated)


def _layout(shape: tuple[int, int], meta: Mapping[str, JSON]) -> Rotated:
    return _rotated(shape, **{**meta, "part_of": tuple(meta["part_of"])})


def _as_whole(weight: Tensor, layout: Rotated) -> Tensor:
    """Return a part of a fused layer among zeros in the place of the other parts.

    Where something is merged into such a part, only this leaves the layer of the kind that it is.
    """
    if not layout.part_of:
        return weight
    if layout.own.stop > layout.whole[0]:
        own = f"rows {layout.own.start} to {layout.own.stop}"
        raise OptionError(f"part_of={layout.part_of!r} has {layout.whole[0]} rows, and the layer's are {own}")
    whole = weight.new_zeros(layout.whole)
    whole[layout.own] = weight
    return whole


def _hessian(weight: Tensor, options: Options, calibration: Calibration | None) -> Tensor | None:
    """Return the damped second moments of the inputs with a mean diagonal of 1; None for the identity."""
    n = weight.shape[1]
    given = None if calibration is None else calibration.hessian
    if given is None:
        return torch.eye(n, device=weight.device) if options.rescale else None
    if given.shape != (n, n):
        raise WeightError(f"the Hessian has shape {tuple(given.shape)}, expected {(n, n)}: in_features twice")
    mean = given.diagonal().mean(dtype=torch.float64)
    if not given.isfinite().all() or mean < 0:
        raise WeightError("the Hessian has NaN, infinite or negative entries, expected the mean of x xᵀ")
    if mean == 0:
        return None  # no input was ever other than 0
    hessian = (given / mean).float()
    hessian.diagonal().add_(options.damping)
    return hessian


def _quantize(weight: Tensor, hessian: Tensor | None, layout: Rotated, options: Options) -> dict[str, Tensor]:
    inputs, outputs = _random_scales(weight, hessian, options)
    outer, inner = layout.rotations()
    rotated = _rotate(weight / inputs * outputs[:, None], outer, inner)
    largest = rotated.abs().amax()
    rotated /= torch.where(largest > 0, largest, 1)  # their squares are in the range of float32
    unit = rotated.square().mean().sqrt() / (options.scale or SCALES[options.codebook][options.bits])
    scale = largest * unit
    if not scale.isfinite():
        raise WeightError("'scale' would hold NaN or Inf; expected a weight that is finite in float32")
    rotated /= torch.where(unit > 0, unit, 1)
    if hessian is None:
        _, codes = round_plainly(rotated, layout.points)
    else:
        hessian = inner.apply(inner.apply(hessian * inputs * inputs[:, None], True).T, True)
        _, codes = round_with_feedback(rotated, hessian, layout.points, options.tune_iters)
    return {
        **{name: tensor.contiguous() for name, tensor in layout.points.pack(codes).items()},
        "input_scales": inputs.half(),
        "output_scales": outputs.half(),
        "scale": scale.view(1),
    }


def _rotate(weight: Tensor, outer: Rotation, inner: Rotation) -> Tensor:
    """Return U_mᵀ W U_n."""
    return outer.apply(inner.apply(weight, transpose=True).T, transpose=True).T.contiguous()


def _random_scales(weight: Tensor, hessian: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Return SU and SV as float32 numbers that float16 holds: random signs, SU balanced if asked."""
    generator = torch.Generator().manual_seed(options.seed)
    inputs, outputs = (_signs(weight.shape[i], generator).to(weight.device) for i in (1, 0))
    if options.rescale and hessian is not None:
        inputs /= _balance(weight, hessian)
    return inputs.half().float(), outputs


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1


def _balance(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return what to multiply the columns of W by, about 1, so that W and the inputs are alike (QuIP, 4)."""
    moments = weight.square().sum(0)
    least = torch.finfo(torch.float32).tiny
    ratio = hessian.diagonal().clamp(min=least).log() - moments.clamp(min=least).log()
    ratio = (ratio - ratio.mean()) / 4
    return ratio.clamp(-4, 4).exp()  # a column of zeros does not take the rest out of float16's range
