"""Quantizes a model into a new folder, and says what that cost each layer.

The error of a layer is relative, in the Frobenius norm: |W - Ŵ| / |W|, over the weights as they were loaded.
It is taken while the dense weight is still at hand, block by block: the memory that it needs is two blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from modq import __version__
from modq.api import dequantize_slice
from modq.folders import OutputError, new_folder, write_json
from modq.hf.card import write_base_card
from modq.hf.foreign import save_as
from modq.hf.observe import observing
from modq.materialize import BLOCK_ELEMENTS, blocks
from modq.options import build_options, options_to_json
from modq.registry import find
from modq.spec import JSON, QuantizedWeight
from modq.train.models import Sizes, load_model, load_tokenizer, measure

FILE = "quantize.json"
SCHEMA = 1
"""The version of quantize.json and of what `modq quantize --json` prints."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many layers are done, of how many, and what is being done now."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What one linear became; the error is None where it is no finite number."""

    shape: tuple[int, int]
    backend: str
    bits_per_weight: float
    relative_error: float | None
    hessian_error: float | None = None  # in the norm that weighs inputs as the calibration data has them
    seconds: float | None = None  # with gathering what it learned from

    @classmethod
    def of(cls, weight: Tensor, qweight: QuantizedWeight, hessian: Tensor | None = None) -> LayerReport:
        """Measure what became of `weight`, (out_features, in_features)."""
        plain, weighted = errors(weight, qweight, hessian)
        return cls(qweight.shape, qweight.backend, qweight.bits_per_weight, plain, weighted)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `quantize_folder` did; the options are all of the backend's, not only those given."""

    model: str
    backend: str
    package: str
    version: str
    options: Mapping[str, JSON]
    overrides: Mapping[str, Any]  # of the options, by regex, as in `Recipe.layers`
    dtype: str
    format: str | None
    seconds: float
    sizes: Sizes
    layers: Mapping[str, LayerReport]
    calibration: Mapping[str, JSON] | None = None  # what the backend learned from, and how

    @classmethod
    def of(cls, model: Any, source: str, backend: str, options: Mapping[str, Any], **made: Any) -> Quantized:
        """Report on a quantized model; `made` has the fields that cannot be read off what is given here."""
        return cls(
            model=source,
            backend=backend,
            package=find(backend).package,
            version=find(backend).version,
            options=options_to_json(build_options(backend, options)),
            sizes=measure(model),
            **made,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, with the versions of what wrote it."""
        return {"schema": SCHEMA, "modq": __version__, **asdict(self)}


def quantize_folder(
    source: str,
    output: Path,
    *,
    backend: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    dtype: str = "auto",
    format: str | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a model into a new folder, with its tokenizer and a report of it all, `quantize.json`.

    Args:
        source: a folder, or the name of a model on the hub.
        output: the new folder.
        backend: the name of an installed quantizer.
        options: the backend's options.
        layers: overrides by regex, as in `Recipe`.
        dtype: of what is not quantized, as in `load_model`.
        format: another package's format to write, see `modq.hf.foreign`.
        progress: told of each layer before it is quantized, and of the saving.

    Raises:
        OutputError: if the folder exists, or cannot be written.
        ModqError: if the model cannot be loaded or quantized.
    """
    started = time.perf_counter()
    seen = _Recorder(progress or _ignore)
    with new_folder(output) as unfinished:
        with observing(seen):
            model = load_model(source, backend=backend, options=options, layers=layers, dtype=dtype)
        seen.saving()
        _save(model, unfinished, format)
        if format is None:
            write_base_card(unfinished, model, source, name=output.name)
        _save_tokenizer(source, unfinished)
        made: dict[str, Any] = {"dtype": dtype, "format": format, "overrides": dict(layers or {})}
        made |= {"layers": seen.layers, "seconds": time.perf_counter() - started}
        quantized = Quantized.of(model, source, backend, options, **made)
        write_json(unfinished / FILE, quantized.to_json())
    return quantized


def errors(
    weight: Tensor, qweight: QuantizedWeight, hessian: Tensor | None = None
) -> tuple[float | None, float | None]:
    """Return |W - Ŵ| / |W| in the Frobenius norm, and in the norm |A|² = tr(A H Aᵀ) where H is given.

    With H = mean of x xᵀ the second is the relative error of the layer's outputs. No dense matrix is built
    besides the one given: squares are summed in float64, a block is dequantized in float32. A weight of zeros
    that stays so has no error; None stands for what is not finite, or has no H.
    """
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (plain, weighted) x (error, weight)
    out_features, in_features = qweight.shape
    for rows in blocks(out_features, in_features, BLOCK_ELEMENTS):
        dense = weight.detach()[rows].float()
        error = dequantize_slice(qweight, torch.float32, rows, slice(0, in_features)).sub_(dense)
        for column, part in enumerate((error, dense)):
            sums[0, column] += torch.linalg.vector_norm(part, dtype=torch.float64).cpu() ** 2
            if hessian is not None:
                sums[1, column] += ((part @ hessian) * part).sum(dtype=torch.float64).cpu()
    plain, weighted = (_ratio(*pair) for pair in sums.tolist())
    return plain, weighted if hessian is not None else None


def _ratio(error: float, norm: float) -> float | None:
    if not norm:
        return None if error else 0.0
    ratio = math.sqrt(max(error, 0.0) / norm)
    return ratio if math.isfinite(ratio) else None


class _Recorder:
    """Observes a model while it is loaded, and keeps a report of each layer."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.total = 0
        self.layers: dict[str, LayerReport] = {}
        self._clock = time.perf_counter()

    def planned(self, names: Sequence[str]) -> None:
        self.total = len(names)

    def begins(self, name: str) -> None:
        self.progress(len(self.layers), self.total, name)
        self._clock = time.perf_counter()

    def saving(self) -> None:
        """The last linear counts as done when it is saved."""
        self.progress(max(self.total - 1, 0), self.total, "saving")

    def quantized(self, name: str, weight: Tensor, qweight: QuantizedWeight) -> None:
        seconds = time.perf_counter() - self._clock
        self.layers[name] = replace(LayerReport.of(weight, qweight), seconds=seconds)


def _ignore(done: int, total: int, name: str) -> None:
    """Show nothing."""


def _save(model: Any, folder: Path, format: str | None) -> None:
    try:
        if format is None:
            model.save_pretrained(folder)
        else:
            save_as(model, folder, format)
    except SafetensorError as error:  # a full disk among others: it is no OSError there
        raise OutputError(f"the weights cannot be written: {error}") from error


def _save_tokenizer(source: str, folder: Path) -> None:
    tokenizer = load_tokenizer(source)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a full disk among others: what writes tokenizer.json raises nothing narrower
        raise OutputError(f"the tokenizer cannot be written: {error}") from error
