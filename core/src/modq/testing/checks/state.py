"""A quantized weight survives whatever is done to models, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modq.api import matmul
from modq.folders import write_json
from modq.linear import QuantLinear
from modq.op import make_handle, stored
from modq.spec import QuantizedWeight
from modq.testing.check import Breach, NotApplicable, check
from modq.testing.compare import as_close, same_bits, same_weight
from modq.testing.subject import Subject, Variant, copied, gaussian
from modq.testing.workers import run_worker


def _prepare_for_kbit(module: nn.Module) -> nn.Module:
    from peft import prepare_model_for_kbit_training  # peft takes seconds to import: only this check waits

    prepared: nn.Module = prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    return prepared


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    ".to(bfloat16)": lambda module: module.to(torch.bfloat16),
    ".half()": lambda module: module.half(),
    ".double()": lambda module: module.double(),
    ".to(bfloat16).float()": lambda module: module.to(torch.bfloat16).float(),
    ".to('cpu', float16)": lambda module: module.to("cpu", torch.float16),
    "prepare_model_for_kbit_training()": _prepare_for_kbit,
    "bfloat16, then prepare_model_for_kbit_training()": lambda module: _prepare_for_kbit(module.bfloat16()),
}
"""What users and libraries do to the dtype of a model."""

CPU = torch.device("cpu")
X = "x"
"""What the input of a product is called among a weight's tensors in a file."""


@check()
def a_file_gives_the_same_bits_in_another_process(subject: Subject) -> None:
    """Tensors in safetensors and the rest in JSON are all that another process needs for the same bits."""
    cases = [(v, shape, subject.quantized(v, shape)) for v, shape in subject.cases()]
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, (_, _, qweight) in enumerate(cases):
            _write(folder / f"weight{number:03}", qweight)
        run_worker("compute_products", name, str(torch.get_num_threads()))
        results = load_file(folder / "results.safetensors")
    for number, (variant, shape, qweight) in enumerate(cases):
        because = f"{variant}, {shape}; is anything needed that is neither a tensor nor in meta?"
        product, dense = _product(qweight), subject.dense(qweight)
        same_bits("Ŵ in another process", results[f"weight{number:03}.dense"], dense, because)
        same_bits("y in another process", results[f"weight{number:03}.product"], product, because)


@check()
def restore_undoes_prepare(subject: Subject) -> None:
    """`restore` gives back each bit of what `prepare` was given, which it leaves as it is."""
    for because, given, prepared in _prepared(subject):
        restored = subject.hooks.restore(qweight=prepared, device=CPU)
        if not isinstance(restored, QuantizedWeight):
            raise Breach(f"restore() gave {restored!r} for what prepare() made, expected a QuantizedWeight")
        same_weight("restore(prepare(q))", restored, given, because)


@check()
def a_prepared_weight_multiplies_alike(subject: Subject) -> None:
    """What `prepare` gives is the same matrix: products with it are as close as the dense ones."""
    for because, given, prepared in _prepared(subject):
        exact = subject.dense(given, torch.float64)
        for transpose in (False, True):
            x = gaussian(16, given.shape[0 if transpose else 1], seed=1)
            w = exact if transpose else exact.T
            y = subject.hooks.matmul(x=x, qweight=prepared, transpose=transpose)
            as_close("dX" if transpose else "y", y, x @ w.float(), x.double() @ w, f"prepared, {because}")


@check()
def no_dtype_move_changes_a_bit(subject: Subject) -> None:
    """`.to(dtype)`, `.half()`, `.double()` and PEFT's kbit preparation leave every packed bit as it is."""
    for variant in subject.variants:
        for move, apply in MOVES.items():
            layer = _layer(subject, variant)
            held = apply(nn.Sequential(layer)).get_submodule("0")
            _check_layer(subject, variant, held, move)


@check()
def copies_keep_every_bit(subject: Subject) -> None:
    """A deep copy and a pickled layer hold the same bits, in memory of their own."""
    for variant in subject.variants:
        layer = _layer(subject, variant)
        for kind, twin in {
            "deepcopy": copy.deepcopy(layer),
            "pickle": pickle.loads(pickle.dumps(layer)),
            "torch.save": _saved_and_loaded(layer),
        }.items():
            _check_layer(subject, variant, twin, kind)
            _overwrite(twin)
            _check_layer(subject, variant, layer, f"the original, after its {kind} was overwritten")


@check()
def a_state_dict_is_all_of_a_layer(subject: Subject) -> None:
    """A layer allocated on meta or empty becomes, by another's state dict, the same to the bit."""
    for variant in subject.variants:
        layer = _layer(subject, variant)
        state, qweight = layer.state_dict(), layer.quantized_weight
        for device, assign in (("meta", True), ("cpu", False)):
            empty = QuantLinear.like(
                nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"),
                subject.backend,
                variant.options,
                dtype=torch.float32,
            )
            empty.allocate(qweight.format_version, qweight.meta, device)
            empty.load_state_dict(state, assign=assign)
            _check_layer(subject, variant, empty, f"a state dict, allocated on {device}")


@check()
def the_way_over_meta_keeps_every_bit(subject: Subject) -> None:
    """A layer moved to meta takes its tensors back from a state dict, as offloading does."""
    for variant in subject.variants:
        for back in ("assign", "to_empty"):
            layer = _layer(subject, variant)
            state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            layer.to("meta")
            if left := [name for name, tensor in layer.named_parameters() if not tensor.is_meta]:
                raise Breach(f"{', '.join(left)} of a layer moved to meta stays behind ({variant})")
            if back == "to_empty":
                layer.to_empty(device="cpu")
            layer.load_state_dict(state, assign=back == "assign")
            _check_layer(subject, variant, layer, f"to meta and back by {back}")


def _prepared(subject: Subject) -> list[tuple[str, QuantizedWeight, QuantizedWeight]]:
    """Return weights before and after `prepare`, those that it changes; of each kind two."""
    if not subject.hooks.prepare.get_hookimpls():
        raise NotApplicable("it has no prepare(): the canonical form is the one that computes")
    pairs = []
    for (variant, shape), seed in product(subject.cases(), (0, 1)):
        kept = subject.quantize(gaussian(*shape, seed=seed), variant)
        given = copied(kept)
        prepared = subject.hooks.prepare(qweight=given, device=CPU)
        same_weight("the weight given to prepare()", given, kept, str(variant))
        if prepared is not None:
            pairs.append((f"{variant}, {shape}", given, prepared))
    if not pairs:
        raise NotApplicable(f"prepare() keeps the canonical form on {CPU}")
    return pairs


def _write(path: Path, qweight: QuantizedWeight) -> None:
    """Write a quantized weight as checkpoints hold it, and the input of a product."""
    tensors = {**stored(qweight.tensors), X: _input(qweight)}
    save_file(tensors, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), {"handle": make_handle(qweight), "x": X})


def _input(qweight: QuantizedWeight) -> Tensor:
    return gaussian(3, qweight.shape[1], seed=1)


def _product(qweight: QuantizedWeight) -> Tensor:
    return matmul(_input(qweight), qweight)


def _layer(subject: Subject, variant: Variant) -> QuantLinear:
    return subject.layer(variant, subject.shape(63, 60), bias=False)


def _check_layer(subject: Subject, variant: Variant, layer: object, because: str) -> None:
    """Demand that a layer is, to the bit, the one that `_layer` gives."""
    if not isinstance(layer, QuantLinear):
        raise Breach(f"the layer is a {type(layer).__name__}, expected a QuantLinear ({because}, {variant})")
    expected = subject.quantized(variant, subject.shape(63, 60))
    same_weight("the weight of a layer", layer.quantized_weight, expected, f"{because}, {variant}")
    with torch.no_grad():
        y = layer(_input(expected))
    same_bits("y", y, _product(expected), f"{because}, {variant}")


def _saved_and_loaded(layer: QuantLinear) -> QuantLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # a layer is no plain weight
    assert isinstance(loaded, QuantLinear)
    return loaded


def _overwrite(layer: QuantLinear) -> None:
    with torch.no_grad():
        for _, packed in layer.named_packed():
            packed.zero_()
