"""What a backend declares of itself, and whether it is so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from modq.api import quantize_weight
from modq.linear import QuantLinear
from modq.op import make_handle
from modq.options import build_options, options_to_json
from modq.registry import find
from modq.spec import QuantizedWeight, TensorSpec
from modq.testing.check import Breach, check
from modq.testing.subject import Subject, Variant, gaussian
from modq.testing.workers import run_python

LARGE = (512, 1024)
"""(out, in) of a weight that is large enough for what a layer has once not to count."""

MARGIN = 1.5
"""How many times the measured error may be declared: a bound further off tells users nothing."""

TAKEN_BY_PEFT = ("qweight", "W_q", "state", "weight", "bias")
"""Names by which PEFT takes a layer for another library's."""

WATCH_FOR_TORCH = """
import os, sys, traceback

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            frames = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
            print(f"{frames[-1].filename}:{frames[-1].lineno}", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from modq.registry import find, options_class
find(sys.argv[1])
options_class(sys.argv[1])
"""


@check()
def info_and_options_import_no_torch(subject: Subject) -> None:
    """The entry module and the module of the options import no torch: listing backends stays quick."""
    only = {"MODQ_BACKENDS": subject.backend}
    if where := run_python("-c", WATCH_FOR_TORCH, subject.backend, env=only).strip():
        raise Breach(
            f"{find(subject.backend).entry_point} or {subject.info.options} imports torch, at {where}; "
            "import it in the implementation's module only"
        )


@check()
def info_says_what_it_must(subject: Subject) -> None:
    """INFO has widths and an error for each, a summary of one line, and names that are used once."""
    info = subject.info
    if not info.bits or any(bits <= 0 for bits in info.bits):
        raise Breach(f"INFO.bits is {info.bits!r}, expected one or more widths above 0")
    if set(info.max_relative_error) != set(info.bits):
        declared = sorted(info.max_relative_error)
        raise Breach(f"INFO.max_relative_error is for {declared} bits, expected {sorted(info.bits)}")
    if not info.summary.strip() or "\n" in info.summary:
        raise Breach(f"INFO.summary is {info.summary!r}, expected one line")
    if min(info.multiple_of) < 1:
        raise Breach(f"INFO.multiple_of is {info.multiple_of!r}, expected at least (1, 1)")
    if not info.format_versions or not info.devices:
        raise Breach("INFO.format_versions or INFO.devices is empty, expected what it reads and runs on")
    formats = [known.name for known in info.formats]
    if len(set(formats)) < len(formats):
        raise Breach(f"INFO.formats has the names {formats}, expected each once")


@check()
def options_come_back_from_json(subject: Subject) -> None:
    """Options are hashable, equal to others of the same values, and come back from JSON as they were."""
    for variant in (Variant(0, build_options(subject.backend, {}), "no options"), *subject.variants):
        plain = options_to_json(variant.options)
        again = build_options(subject.backend, json.loads(json.dumps(plain)))
        if again != variant.options:
            raise Breach(f"options built from their JSON, {again!r}, are not equal to {variant.options!r}")
        try:
            same = hash(again) == hash(variant.options)
        except TypeError as error:
            raise Breach(
                f"options cannot be hashed: {error}; use tuples, not lists ({variant.label})"
            ) from None
        if not same:
            raise Breach(f"equal options have different hashes ({variant.label})")


@check()
def describe_is_what_quantize_returns(subject: Subject) -> None:
    """The names, shapes and dtypes that `describe` gives are those of the tensors of `quantize`."""
    for variant in subject.variants:
        for shape in subject.shapes:
            described = dict(subject.described(variant, shape))
            _check_specs(described, subject.quantized(variant, shape), f"{variant}, {shape}")


@check()
def tensors_have_names_that_a_layer_can_hold(subject: Subject) -> None:
    """Each tensor can be a parameter of a layer: an identifier without a meaning to torch or PEFT."""
    for variant, shape in subject.cases():
        described = subject.described(variant, shape)
        linear = nn.Linear(shape[1], shape[0], device="meta")
        bare = QuantLinear.like(linear, subject.backend, variant.options)
        for name in described:
            if not name.isidentifier():
                raise Breach(f"a tensor is named {name!r}, expected an identifier: it is an attribute")
            if name in TAKEN_BY_PEFT or hasattr(bare, name):
                raise Breach(f"a tensor is named {name!r}, which means something else to layers; rename it")
        if not described:
            raise Breach(f"describe() names no tensor, expected at least one ({variant}, {shape})")


@check()
def declared_bits_are_stored_bytes(subject: Subject) -> None:
    """A weight takes about the bits that its width says; `describe`, memory and files agree on the bytes."""
    for variant in subject.defaults:
        shape = subject.shape(*LARGE)
        qweight = without_data(subject, gaussian(*shape), variant)
        nominal, stored = variant.bits, qweight.bits_per_weight
        if not nominal <= stored <= nominal * 1.25 + 0.6:
            raise Breach(
                f"a weight takes {stored:.3f} bits, expected {nominal:g} to {nominal * 1.25 + 0.6:g}, for "
                f"INFO.bits has {nominal:g}; declare the bits that are stored, or pack the codes"
            )
        _check_bytes(qweight, subject.described(variant, shape), f"{variant}, {shape}")


@check()
def declared_error_is_the_measured_one(subject: Subject) -> None:
    """On a Gaussian weight the relative error is at most INFO.max_relative_error, and that is close."""
    weight = gaussian(*subject.shape(*LARGE))
    for variant in subject.defaults:
        declared = subject.info.max_relative_error[variant.bits]
        measured = relative_error(subject, without_data(subject, weight, variant), weight)
        if measured > declared:
            raise Breach(
                f"the relative error of Ŵ is {measured:.4g}, expected at most the {declared:g} of "
                f"INFO.max_relative_error ({variant})"
            )
        if declared > MARGIN * measured:
            raise Breach(
                f"INFO.max_relative_error is {declared:g}, expected at most {MARGIN:g} times the measured "
                f"{measured:.4g} ({variant})"
            )


@check()
def layers_of_one_kind_share_a_handle(subject: Subject) -> None:
    """`meta` is JSON and the same for all weights of one shape and options: they share a compiled graph."""
    for variant in subject.variants:
        shape = subject.shape(63, 60)
        first = subject.quantized(variant, shape)
        second = subject.quantize(
            3 * gaussian(*shape, seed=1) + 1, variant, subject.calibration(shape[1], seed=1)
        )
        _check_meta(first.meta, str(variant))
        if dict(first.meta) != dict(second.meta):
            differ = [
                key for key in {*first.meta, *second.meta} if first.meta.get(key) != second.meta.get(key)
            ]
            raise Breach(
                f"meta differs between two weights of one shape in {', '.join(sorted(differ))}; what differs "
                f"from layer to layer is a tensor, or each layer is compiled anew ({variant})"
            )
        if make_handle(first) != make_handle(second):
            raise Breach(f"two layers of one kind have different handles ({variant}, {shape})")


def without_data(subject: Subject, weight: Tensor, variant: Variant) -> QuantizedWeight:
    """Quantize with as little calibration as the backend takes: none, or uncorrelated inputs."""
    if subject.info.calibration in ("none", "optional"):
        return quantize_weight(weight, subject.backend, variant.options)
    return subject.quantize(weight, variant, subject.calibration(weight.shape[1], white=True))


def relative_error(subject: Subject, qweight: QuantizedWeight, weight: Tensor) -> float:
    """Return ||W - Ŵ||_F / ||W||_F."""
    dense = subject.dense(qweight, torch.float64)
    return float((dense - weight.double()).norm() / weight.double().norm())


def _check_specs(described: Mapping[str, TensorSpec], qweight: QuantizedWeight, because: str) -> None:
    given = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in qweight.tensors.items()}
    for name in sorted({*described, *given}):
        if given.get(name) != described.get(name):
            raise Breach(
                f"{name} is {given.get(name, 'missing')} from quantize(), expected what describe() says: "
                f"{described.get(name, 'no such tensor')} ({because})"
            )
        if not given[name].shape:
            raise Breach(f"{name} has no dimension, expected at least one: FSDP2 shards none without")


def _check_bytes(qweight: QuantizedWeight, described: Mapping[str, Any], because: str) -> None:
    expected = sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in described.values())
    if qweight.nbytes != expected:
        raise Breach(f"the tensors hold {qweight.nbytes} bytes, expected describe()'s {expected} ({because})")
    for name, tensor in qweight.tensors.items():
        memory, own = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if memory > own:
            raise Breach(f"{name} keeps {memory} bytes alive, expected its own {own}: clone it ({because})")
    file = save({name: tensor.contiguous() for name, tensor in qweight.tensors.items()})
    data = len(file) - 8 - int.from_bytes(file[:8], "little")  # after the header and its length
    if data != expected:
        raise Breach(f"a safetensors file has {data} bytes of data, expected {expected} ({because})")


def _check_meta(meta: Mapping[str, Any], because: str) -> None:
    try:
        again = json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise Breach(f"meta is no JSON: {error} ({because})") from None
    if again != dict(meta):
        changed = sorted(str(key) for key, value in meta.items() if again.get(key) != value)
        raise Breach(
            f"meta comes back from JSON changed in {', '.join(changed)}; use lists, not tuples ({because})"
        )
