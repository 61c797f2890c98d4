"""`modq quantize`: a dense model in, a prequantized checkpoint out."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modq.cli.progress import showing_progress
from modq.cli.settings import (
    backend_options,
    collect_layers,
    collect_options,
    dtype_option,
    kind_of_name,
    layers_option,
    megabytes,
    table,
)
from modq.errors import OptionError
from modq.registry import describe_backend

if TYPE_CHECKING:
    from modq.train.quantize import LayerReport, Quantized

POSITIVE = click.IntRange(min=1)


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@backend_options(required=True)
@layers_option
@dtype_option
@click.option("--format", help="Write another package's format, of those that the backend knows.")
@click.option(
    "--calibration", help="What the backend learns from, if it does: a .txt, a JSONL or a dataset, as --data."
)
@click.option("--samples", type=POSITIVE, default=128, show_default=True, help="Of the calibration data.")
@click.option("--length", type=POSITIVE, help="Tokens a sample; by default 2048, or the model's context.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the samples.")
@click.option(
    "--true-sequential/--no-true-sequential",
    default=True,
    show_default=True,
    help="Let each linear see the quantized ones before it in its own block.",
)
@click.option("--resume", is_flag=True, help="Go on with this very work, which was stopped or killed.")
@click.option("--each-layer", is_flag=True, help="Show every linear, not every kind of linear.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, what quantize.json holds.")
def command(
    model: str,
    out: Path,
    backend: str,
    layers: tuple[tuple[str, str], ...],
    dtype: str,
    format: str | None,
    each_layer: bool,
    as_json: bool,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    true_sequential: bool,
    resume: bool,
    **given: Any,
) -> None:
    """Quantize MODEL and write it, with its tokenizer, to the new folder OUT.

    With --calibration, a file or dataset as `modq finetune --data` takes it, the model is quantized block by
    block and need not fit in memory; Ctrl-C or a crash leaves OUT.unfinished, from which --resume goes on.
    Without, each weight is quantized by itself while the model loads.

    --layers mixes backends: `--layers down_proj hqq,bits=4 --layers "layers[.]0[.]" dense`. The first regex
    found in a linear's name counts; what follows is another backend with its options, options of --backend
    to change, or `dense`.

    The error of a linear is |W - Ŵ| / |W|, in the Frobenius norm; that of its outputs weighs the inputs as
    the calibration text has them. OUT/quantize.json has both for each.
    """
    options = collect_options(backend, **given)
    overrides = collect_layers(backend, options, layers)
    backends = {backend, *(each["backend"] for each in overrides.values() if each and "backend" in each)}
    from modq.folders import require_free

    require_free(out)
    _check_format(backend, format)
    _check_calibration(backends, calibration, resume=resume)
    from modq.train.quiet import quiet  # imports torch, as do those below

    # What a library prints would break the document
    with quiet(), contextlib.redirect_stdout(sys.stderr), showing_progress("linear") as progress:
        wanted: dict[str, Any] = {"backend": backend, "options": options, "layers": overrides, "dtype": dtype}
        if calibration is None:
            from modq.train.quantize import quantize_folder

            quantized = quantize_folder(model, out, **wanted, format=format, progress=progress)
        else:
            from modq.train.calibrate import CalibrationData, calibrate_folder

            data = CalibrationData(
                source=calibration, samples=samples, length=length, seed=seed, true_sequential=true_sequential
            )
            quantized = calibrate_folder(
                model, out, **wanted, data=data, format=format, resume=resume, progress=progress
            )
    click.echo(json.dumps(quantized.to_json(), indent=2) if as_json else _report(quantized, out, each_layer))


def _check_calibration(backends: Iterable[str], calibration: str | None, *, resume: bool) -> None:
    """Refuse what cannot go together, before anything slow begins."""
    needs = {backend: describe_backend(backend).calibration for backend in sorted(backends)}
    if calibration is None:
        if learning := [backend for backend, need in needs.items() if need in ("hessian", "block")]:
            raise OptionError(
                f"backend {learning[0]!r} learns from text, and none was given; add --calibration FILE "
                "(.txt, .jsonl, or the name of a dataset)"
            )
        if resume:
            raise click.UsageError("--resume goes with --calibration: without, quantizing takes one step")
    elif set(needs.values()) == {"none"}:
        named = ", ".join(map(repr, needs))
        raise OptionError(f"backend {named} does not learn from data; leave --calibration out")


def _check_format(backend: str, format: str | None) -> None:
    """Refuse a format that the backend does not write, before anything slow begins."""
    known = [its.name for its in describe_backend(backend).formats if its.written]
    if format is not None and format not in known:
        raise OptionError(
            f"backend {backend!r} does not write format {format!r}; it writes {', '.join(known) or 'none'}"
        )


def _report(quantized: Quantized, out: Path, each_layer: bool) -> str:
    sizes = quantized.sizes
    bits = "-" if sizes.bits_per_weight is None else f"{sizes.bits_per_weight:.3f} bits a weight"
    lines = [
        f"wrote      {out}",
        f"quantized  {sizes.quantized_layers} linears with {quantized.backend}, {bits}",
        f"size       {megabytes(sizes.dense)} dense, {megabytes(sizes.held)} quantized",
        f"took       {quantized.seconds:.1f} s",
    ]
    if quantized.layers:
        rows = _by_layer(quantized.layers) if each_layer else _by_kind(quantized.layers)
        lines += ["", table(rows)]
    return "\n".join(lines)


def _by_layer(layers: Mapping[str, LayerReport]) -> list[tuple[str, ...]]:
    calibrated = _calibrated(layers)
    rows = [("LINEAR", "SHAPE", "BACKEND", "BITS", "ERROR", *(["OF OUTPUTS"] if calibrated else []))]
    for name, its in layers.items():
        shape = "x".join(map(str, its.shape))
        of_outputs = [_of_outputs([its])] if calibrated else []
        rows.append((name, shape, its.backend, f"{its.bits_per_weight:.3f}", _percent([its]), *of_outputs))
    return rows


def _by_kind(layers: Mapping[str, LayerReport]) -> list[tuple[str, ...]]:
    """One row for the linears that differ in their block's number only, and have one backend."""
    kinds: dict[tuple[str, str], dict[str, LayerReport]] = {}
    for name, its in layers.items():
        kinds.setdefault((kind_of_name(name), its.backend), {})[name] = its
    calibrated = _calibrated(layers)
    header = ("LINEARS", "COUNT", "BACKEND", "BITS", "MEAN ERROR", "WORST", "IN BLOCK")
    return [
        (*header, *(["OF OUTPUTS"] if calibrated else [])),
        *(_kind_row(kind, backend, members, calibrated) for (kind, backend), members in kinds.items()),
    ]


def _kind_row(
    kind: str, backend: str, members: Mapping[str, LayerReport], calibrated: bool
) -> tuple[str, ...]:
    weights = {name: its.shape[0] * its.shape[1] for name, its in members.items()}
    stored = sum(its.bits_per_weight * weights[name] for name, its in members.items())
    worst = max(members, key=lambda name: _sortable(members[name]))
    return (
        kind,
        str(len(members)),
        backend,
        f"{stored / sum(weights.values()):.3f}",
        _percent(list(members.values())),
        _percent([members[worst]]),
        ".".join(part for part in worst.split(".") if part.isdecimal()) or "-",
        *([_of_outputs(list(members.values()))] if calibrated else []),
    )


def _calibrated(layers: Mapping[str, LayerReport]) -> bool:
    return any(its.hessian_error is not None for its in layers.values())


def _of_outputs(layers: list[LayerReport]) -> str:
    """Spell the mean error of the outputs on the calibration text; a dash where it is not known."""
    errors = [layer.hessian_error for layer in layers if layer.hessian_error is not None]
    return f"{statistics.fmean(errors):.2%}" if len(errors) == len(layers) else "-"


def _sortable(layer: LayerReport) -> float:
    return float("inf") if layer.relative_error is None else layer.relative_error


def _percent(layers: list[LayerReport]) -> str:
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    return f"{statistics.fmean(errors):.2%}" if len(errors) == len(layers) else "not finite"
