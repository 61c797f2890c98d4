"""What does not fit is refused, in a line that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modq.api import dequantize, matmul, quantize, quantize_weight
from modq.errors import CheckpointError, DtypeError, ModqError, OptionError, ShapeError, WeightError
from modq.model import quantized_layers
from modq.options import build_options
from modq.registry import options_class
from modq.testing.check import Breach, NotApplicable, check
from modq.testing.models import quantized_llama, quiet
from modq.testing.refusals import judge, refuses
from modq.testing.subject import Subject, copied, gaussian
from modq.train.models import load_model

NOT_A_WIDTH = 97
ODD_NUMBERS = (-1, 0, 7, 97)


@check()
def shapes_that_do_not_fit_are_refused(subject: Subject) -> None:
    """Weights that are no matrices, empty, or do not divide by multiple_of are refused, with the shape."""
    multiple = rows, columns = subject.info.multiple_of
    for shape in ((columns,), (1, rows, columns), (0, columns), (rows, 0)):
        call = _quantizing(subject, gaussian(*shape))
        refuses(f"a weight of shape {shape}", call, ShapeError, shape, "(out_features, in_features)")
    for other in ((rows + 1, columns), (rows, columns + 1)):
        if other[0] % rows or other[1] % columns:
            call = _quantizing(subject, gaussian(*other))
            refuses(f"a weight of shape {other}", call, ShapeError, other, multiple)


@check()
def weights_that_are_no_numbers_are_refused(subject: Subject) -> None:
    """Weights of integers and weights with a NaN or an infinity are refused, with what they hold."""
    shape = subject.shape(16, 24)
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool):
        weight = gaussian(*shape).to(dtype)
        refuses(f"a weight of {dtype}", _quantizing(subject, weight), DtypeError, dtype, "float")
    for dtype in (torch.float32, torch.bfloat16):
        for value in (float("nan"), float("inf"), -float("inf")):
            weight = gaussian(*shape).to(dtype)
            weight[-1, -1] = value
            refuses(f"a weight with {value}", _quantizing(subject, weight), WeightError, "1 NaN or infinite")


@check()
def options_that_do_not_exist_are_refused(subject: Subject) -> None:
    """An unknown option is refused with the valid names, one of a wrong type with what it was given."""
    shape = subject.shape(16, 24)
    known = [field.name for field in fields(options_class(subject.backend))]
    call = partial(quantize, gaussian(*shape), subject.backend)
    unknown = "no_such_option"
    refuses("an unknown option", partial(call, **{unknown: 1}), OptionError, unknown, *known)
    for name in known:
        wrong = {"of": "a wrong type"}  # no option has a mapping for its value
        shown = (f"{name}={wrong!r}", "expected")
        refuses(f"a mapping for {name}", partial(call, **{name: wrong}), OptionError, *shown)


@check()
def odd_option_values_work_or_are_refused(subject: Subject) -> None:
    """Numbers that nobody would give an option are refused as options, or make a weight that is finite."""
    weight = gaussian(*subject.shape(16, 24))
    for name, value in _odd_values(subject):
        what = f"{name}={value!r}"
        try:
            options = build_options(subject.backend, {name: value})
            qweight = subject.quantize(weight, replace(subject.variants[0], options=options))
        except ModqError as refusal:
            judge(what, refusal)
            continue
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise Breach(f"{what} raises {said:.300}; expected a ValueError of the options") from error
        if not bool(torch.isfinite(subject.dense(qweight)).all()):
            raise Breach(
                f"{what} gives a Ŵ with NaN or infinite values; expected a ValueError of the options"
            )


@check()
def a_width_that_is_not_offered_is_refused(subject: Subject) -> None:
    """`bits` that INFO.bits does not have is refused, with those that it has."""
    call = partial(quantize, gaussian(*subject.shape(16, 24)), subject.backend, bits=NOT_A_WIDTH)
    offered = [f"{bits:g}" for bits in subject.info.bits]
    refuses(f"bits={NOT_A_WIDTH}", call, OptionError, f"bits={NOT_A_WIDTH}", *offered)


@check()
def missing_calibration_is_refused(subject: Subject) -> None:
    """A backend that needs calibration says so where it is given none, and how to give it."""
    kind = subject.info.calibration
    if kind in ("none", "optional"):
        raise NotApplicable("it makes codes without calibration")
    call = partial(quantize, gaussian(*subject.shape(16, 24)), subject.backend)
    refuses("no calibration", call, WeightError, repr(subject.backend), kind, "calibration=")


@check()
def activations_that_do_not_fit_are_refused(subject: Subject) -> None:
    """An x of another width or of integers is refused by matmul, and never multiplied by a layer."""
    shape = subject.shape(17, 40)
    variant = subject.variants[0]
    qweight, layer = subject.quantized(variant, shape), subject.layer(variant, shape)
    for transpose in (False, True):
        width = shape[0] if transpose else shape[1]
        product = partial(matmul, qweight=qweight, transpose=transpose)
        for wrong in ((3, width + 1), (3, width - 1), (1,), ()):
            x = torch.ones(wrong)
            refuses(f"an x of shape {wrong}", partial(product, x), ShapeError, wrong, width)
        for dtype in (torch.int64, torch.uint8, torch.bool):
            x = torch.ones(3, width).to(dtype)
            refuses(f"an x of {dtype}", partial(product, x), DtypeError, dtype, "float")
    for bad in (torch.ones(3, shape[1] + 1), torch.ones(3, shape[1] - 1), torch.ones(3, shape[1]).long()):
        _raises(f"a layer for {shape[1]} inputs", layer, bad)


@check()
def unknown_format_versions_are_refused(subject: Subject) -> None:
    """A quantized weight of a format version that INFO does not know is refused, with those that it knows."""
    known = subject.info.format_versions
    shape = subject.shape(17, 40)
    qweight = replace(subject.quantized(subject.variants[0], shape), format_version=max(known) + 1)
    x = torch.ones(1, shape[1])
    for name, call in (
        ("dequantize", partial(dequantize, qweight)),
        ("matmul", partial(matmul, x, qweight)),
    ):
        shown = (max(known) + 1, *known)
        refuses(f"{name} of format version {max(known) + 1}", call, CheckpointError, *shown)


@check()
def a_weight_of_another_shape_is_not_held(subject: Subject) -> None:
    """A layer refuses a quantized weight of another shape."""
    variant = subject.variants[0]
    shape, other = subject.shape(17, 40), subject.shape(40, 88)
    call = partial(subject.layer(variant, shape).adopt, copied(subject.quantized(variant, other)))
    refuses(f"a weight of shape {other} in a layer of {shape}", call, ShapeError, other, shape)


@check()
def damaged_checkpoints_are_refused(subject: Subject) -> None:
    """A checkpoint without a packed tensor, or with another shape or dtype of it, is refused by its name."""
    with quiet(), TemporaryDirectory() as name:
        folder = Path(name)
        model = quantized_llama(subject, subject.variants[:1])
        model.save_pretrained(folder)
        layer_name, layer = next(iter(quantized_layers(model)))
        file = folder / "model.safetensors"
        saved = load_file(file)
        for key in (f"{layer_name}.{part}" for part, _ in layer.named_packed()):
            for damage, tensors, shown in _damaged(saved, key):
                save_file(tensors, file, {"format": "pt"})
                what = f"a checkpoint with {key} {damage}"
                refuses(what, partial(load_model, name), CheckpointError, key, *shown)


def _odd_values(subject: Subject) -> Iterator[tuple[str, int]]:
    """Yield the options that take numbers, with some."""
    cls = options_class(subject.backend)
    hints = get_type_hints(cls)
    for field in fields(cls):
        if {int, float} & {hints[field.name], *get_args(hints[field.name])}:
            yield from ((field.name, value) for value in ODD_NUMBERS)


def _damaged(
    saved: Mapping[str, Tensor], key: str
) -> Iterator[tuple[str, dict[str, Tensor], tuple[object, ...]]]:
    """Yield what was done to a tensor of a checkpoint, the checkpoint, and what a refusal must show."""
    whole, given = saved[key], tuple(saved[key].shape)
    other = torch.int64 if whole.dtype != torch.int64 else torch.int32
    yield "taken out", {name: tensor for name, tensor in saved.items() if name != key}, (given,)
    longer = torch.cat([whole, whole[-1:]])
    yield "a row too long", {**saved, key: longer}, (given,)
    yield f"as {other}", {**saved, key: whole.to(other)}, (other, whole.dtype)


def _quantizing(subject: Subject, weight: Tensor) -> Callable[[], object]:
    """Return a call that quantizes a weight, with a calibration where one is needed."""
    width = weight.shape[-1]
    calibration = subject.calibration(width) if width else None
    return partial(quantize_weight, weight, subject.backend, subject.variants[0].options, calibration)


def _raises(what: str, layer: Callable[[Tensor], Any], x: Tensor) -> None:
    """Demand an error of any type: nn.Linear has torch's own here, too."""
    try:
        y = layer(x)
    except Exception:
        return
    raise Breach(
        f"{what} takes an x of {x.dtype} {tuple(x.shape)} and gives {tuple(y.shape)}, expected an error"
    )
