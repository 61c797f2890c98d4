"""Quantizes a model into a new folder block by block, by what calibration data does to each layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from modq.calibrate.engine import quantize_blocks
from modq.calibrate.replay import Sample
from modq.calibrate.stream import Source, Writer, read_journal
from modq.calibrate.texts import as_samples, text_samples
from modq.folders import write_json
from modq.hf.card import write_base_card
from modq.hf.foreign import save_as
from modq.linear import QuantLinear
from modq.model import Recipe
from modq.spec import Calibration
from modq.train.data import as_text, fingerprint, is_file, read_rows, read_text
from modq.train.models import load_tokenizer, read_config, refuse_quantized, within_context
from modq.train.quantize import FILE, LayerReport, Progress, Quantized
from modq.train.unfinished import Unfinished

LENGTH = 2048
"""Tokens in a sample where the user does not say, or the model's context where that is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """What a quantizer learns from: `samples` windows of `length` tokens, drawn from `source` by `seed`.

    `source` is as `read_rows` takes it. With `true_sequential` the linears of a block see the quantized ones
    before them in that block, which takes partial passes over the data.
    """

    source: str
    samples: int = 128
    length: int | None = None
    seed: int = 0
    true_sequential: bool = True


def calibrate_folder(
    source: str,
    output: Path,
    *,
    backend: str,
    options: Mapping[str, Any],
    data: CalibrationData,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    dtype: str = "auto",
    format: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a model that need not fit in memory into a new folder, with its tokenizer and quantize.json.

    What was stopped or killed is kept in a folder beside the output, see `Unfinished`.

    Args:
        source: a folder, or the name of a model on the hub; any architecture of transformers.
        output: the new folder.
        backend: the name of an installed quantizer.
        options: the backend's options.
        data: what to learn from.
        layers: overrides by regex, as in `Recipe`.
        dtype: of what is not quantized, as in `load_model`.
        format: another package's format to write, see `modq.hf.foreign`; the packed model must fit in memory.
        resume: whether to go on with work of these very arguments that was stopped.
        progress: told of each layer before it is quantized.

    Raises:
        CalibrationError: if the data or the model cannot be used for calibration.
        OutputError: if the folder exists, or cannot be written.
        ModqError: if the model cannot be loaded or quantized.
    """
    started = time.perf_counter()
    recipe = Recipe(backend, dict(options), dict(layers or {}))
    recipe.check()
    data = _fitted(data, source)
    run = Unfinished(output, lambda run: len(read_journal(run.folder)["blocks"]))
    with run.writing(_asked(source, recipe, data, dtype, format), resume=resume) as result:
        samples = _samples(data, source)
        model = Source(source, recipe, _torch_dtype(dtype), run.folder / "offload")
        packed = result if format is None else run.folder / "packed"
        writer = Writer(model, run.folder, packed, _report, progress or (lambda *_: None))
        _quantize(model, writer, samples, true_sequential=data.true_sequential)
        quantized_model = writer.finish(recipe)
        if format is None:
            write_base_card(result, quantized_model, source, name=output.name)
        else:
            save_as(type(quantized_model).from_pretrained(packed), result, format)
        load_tokenizer(source).save_pretrained(result)
        made: dict[str, Any] = {"dtype": dtype, "format": format, "overrides": dict(recipe.layers)}
        made |= {"layers": _layers(writer), "seconds": time.perf_counter() - started}
        made |= {"calibration": {**asdict(data), "left_dense": model.left_dense}}
        quantized = Quantized.of(quantized_model, source, backend, options, **made)
        write_json(result / FILE, quantized.to_json())
    return quantized


def _fitted(data: CalibrationData, source: str) -> CalibrationData:
    """Fit the samples to the model's context, having refused a model that is quantized already."""
    config = read_config(source, encoder_decoder=True)
    refuse_quantized(source, config)
    return replace(data, length=within_context(source, config, data.length, LENGTH, "--length"))


def _torch_dtype(dtype: str) -> Any:
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _quantize(model: Source, writer: Writer, samples: list[Sample], *, true_sequential: bool) -> None:
    """Run the engine with the writer as its observer and store."""
    quantize_blocks(
        model.model,
        model.plan,
        as_samples(samples, model.model.config),
        device=model.device,
        observer=writer,
        store=writer,
        true_sequential=true_sequential,
    )


def _asked(
    source: str, recipe: Recipe, data: CalibrationData, dtype: str, format: str | None
) -> dict[str, Any]:
    """Return what decides the result; resumed work must be of the same."""
    return {
        "model": source,
        "backend": recipe.backend,
        "options": dict(recipe.options),
        "layers": dict(recipe.layers),
        "dtype": dtype,
        "format": format,
        "calibration": asdict(data) | {"sha256": fingerprint(data.source)},
    }


def _samples(data: CalibrationData, source: str) -> list[Sample]:
    tokenizer = load_tokenizer(source)
    if is_file(data.source) and data.source.endswith(".txt"):
        texts: Iterable[str] = [read_text(Path(data.source))]
    else:
        texts = (as_text(row, tokenizer) for row in read_rows(data.source, tokenizer, LENGTH))
    assert data.length is not None
    return text_samples(texts, tokenizer, samples=data.samples, length=data.length, seed=data.seed)


def _report(weight: torch.Tensor, layer: QuantLinear, calibration: Calibration | None) -> dict[str, Any]:
    hessian = None if calibration is None else calibration.hessian
    return asdict(LayerReport.of(weight, layer.quantized_weight, hessian))


def _layers(writer: Writer) -> dict[str, LayerReport]:
    return {name: _layer(record) for name, record in writer.layers.items()}


def _layer(record: Mapping[str, Any]) -> LayerReport:
    """Take a layer's report back from the journal."""
    shape = (record["shape"][0], record["shape"][1])
    return LayerReport(**{**{f.name: record[f.name] for f in fields(LayerReport)}, "shape": shape})
