"""A backend in a model: transformers, PEFT, several processes, foreign formats."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor, nn

from modq.api import quantize_weight
from modq.errors import ModqError, RequantizeError
from modq.hf.config import ModqConfig
from modq.hf.foreign import find_format, save_as
from modq.model import dense_linears, quantized_layers
from modq.spec import JSON, Format, ImportedLayer, QuantizedWeight
from modq.testing import processes
from modq.testing.check import Breach, NotApplicable, check
from modq.testing.compare import same_bits, same_weight
from modq.testing.models import dense_llama, held, load_llama, logits, quantized_llama, quiet, token_ids
from modq.testing.refusals import judge
from modq.testing.subject import Subject, Variant, gaussian

STEPS = 30
ROUNDING = 1e-5
"""Relative distance of two ways to compute one thing in float32: sums in another order, in two layers."""

ROOMY = 64
"""Formats pack codes into words, and hold no weights whose sizes do not divide by some power of two."""


@check()
def a_model_quantizes_saves_and_reloads(subject: Subject) -> None:
    """A transformers model quantizes, and comes back from its folder with every bit, logits too."""
    with _quiet_folder() as folder:
        model = _llama(subject)
        _check_quantized(subject, model)
        model.save_pretrained(folder)
        again = load_llama(folder)
        _same_weights("the reloaded model", held(again), held(model))
        same_bits("the logits of the reloaded model", logits(again), logits(model))


@check()
def merging_quantizes_the_exact_sum_and_unmerging_restores_every_bit(subject: Subject) -> None:
    """PEFT's merge quantizes Ŵ + BA, rounded once, or is refused; its unmerge leads back to every bit."""
    with quiet():
        model = _adapted(_llama(subject), init_lora_weights=False)
        before, said = held(model), logits(model)
        try:
            model.merge_adapter()
        except RequantizeError as refusal:
            judge("a refused merge", refusal, repr(subject.backend), "dequantize()")
            _same_weights("a model whose merge was refused", held(model), before)
            return
        merged = held(model)
        for name, want in _exact_merge(subject, model, before).items():
            same_weight(f"{name} after a merge", merged[name], want, "expected Ŵ + BA, quantized once")
        model.unmerge_adapter()
        _same_weights("the unmerged model", held(model), before)
        same_bits("the logits of the unmerged model", logits(model), said)


@check()
def a_short_fit_lowers_the_loss(subject: Subject) -> None:
    """Thirty steps of a LoRA lower the loss by a fifth or more and change no packed bit."""
    with quiet():
        model = _adapted(_llama(subject)).train()
        before, ids = held(model), token_ids()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    if not losses[-1] <= 0.8 * losses[0]:  # NaN is no less
        raise Breach(
            f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in {STEPS} steps, "
            f"expected at most {0.8 * losses[0]:.4g}"
        )
    _same_weights("the trained model", held(model), before)


@check()
def two_processes_train_by_ddp_as_one_does(subject: Subject) -> None:
    """DistributedDataParallel in two processes gives the loss, the gradients and the packed bits of one."""
    _as_one_process(subject, "ddp")


@check()
def two_processes_train_by_fsdp2_as_one_does(subject: Subject) -> None:
    """FSDP2 (fully_shard) in two processes gives the loss, the gradients and the packed bits of one."""
    _as_one_process(subject, "fsdp2")


@check()
def layers_survive_their_foreign_formats(subject: Subject) -> None:
    """What export_layers writes, import_layers reads as the same Ŵ, to what the format's numbers can hold."""
    shape = subject.shape(2 * ROOMY, 4 * ROOMY)
    for known in _written(subject):
        refused = []
        for variant in subject.variants:
            qweight = subject.quantized(variant, shape)
            try:
                tensors = _exported(subject, known, qweight)
                config = _export_config(subject, known, variant)
            except ModqError as refusal:
                judge(f"a refused export to {known.name}", refusal)
                refused.append(f"{variant}: {refusal}")
                continue
            again = _imported(subject, known, tensors, config, shape)
            _as_stored(subject, f"Ŵ after {known.name}, {variant}", again, qweight, tensors)
        if len(refused) == len(subject.variants):
            raise Breach(f"no weight of shape {shape} can be written as {known.name}: {refused[0]}")


@check()
def a_model_survives_its_foreign_formats(subject: Subject) -> None:
    """A model saved in a format that the backend writes loads again with the same Ŵ in every layer."""
    formats = _written(subject)
    with _quiet_folder() as folder:
        model = quantized_llama(subject, subject.variants[:1], ROOMY)
        for known in formats:
            save_as(model, folder / known.name, known.name)
            again = load_llama(folder / known.name, ModqConfig(takeover=True))
            weights, want = held(again), held(model)
            if weights.keys() != want.keys():
                lacking = sorted(want.keys() - weights.keys())
                raise Breach(f"a model saved as {known.name} loads with {', '.join(lacking)} not quantized")
            for name, qweight in want.items():
                written = _exported(subject, known, qweight)
                _as_stored(subject, f"Ŵ of {name} after {known.name}", weights[name], qweight, written)


# Models


def _llama(subject: Subject) -> Any:
    """Return a quantized model, a copy for each check."""
    return copy.deepcopy(_kept_llama(subject))


@lru_cache(maxsize=1)
def _kept_llama(subject: Subject) -> Any:
    return quantized_llama(subject, subject.variants)


def _check_quantized(subject: Subject, model: nn.Module) -> None:
    """Demand that each linear inside the blocks is quantized and, where data play no part, to what bits."""
    layers, dense = dict(quantized_layers(model)), dict(dense_linears(dense_llama(subject)))
    if missing := sorted(dense.keys() - layers.keys() - {"lm_head"}):
        raise Breach(f"{', '.join(missing)} of the model are not quantized")
    if subject.info.calibration in ("hessian", "block"):
        return
    for name, layer in layers.items():
        weight: Tensor = dense[name].weight  # type: ignore[assignment]  # nn.Module types any attribute
        want = quantize_weight(weight, subject.backend, layer.options)
        same_weight(name, layer.quantized_weight, want, "quantized while loading, against modq.quantize")


def _adapted(model: Any, **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, target_modules="all-linear", **more)
        return peft.get_peft_model(model, config).eval()


def _exact_merge(
    subject: Subject, model: Any, before: Mapping[str, QuantizedWeight]
) -> dict[str, QuantizedWeight]:
    """Quantize Ŵ + BA, computed in float32, for each adapted layer."""
    return {
        f"{name}.base_layer": quantize_weight(
            subject.dense(before[f"{name}.base_layer"]) + module.get_delta_weight("default"),
            subject.backend,
            module.get_base_layer().options,
        )
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def _same_weights(
    whose: str, got: Mapping[str, QuantizedWeight], want: Mapping[str, QuantizedWeight]
) -> None:
    if got.keys() != want.keys():
        raise Breach(f"{whose} has the quantized layers {sorted(got)}, expected {sorted(want)}")
    for name, qweight in want.items():
        same_weight(f"{name} of {whose}", got[name], qweight)


@contextmanager
def _quiet_folder() -> Iterator[Path]:
    with quiet(), TemporaryDirectory() as folder:
        yield Path(folder)


# Processes


def _as_one_process(subject: Subject, wrapper: str) -> None:
    if not torch.distributed.is_available():
        raise NotApplicable("this torch is built without torch.distributed")
    alone, together = _trained(subject)
    found = together[wrapper]
    if isinstance(found, str):
        held = ", ".join(sorted({str(tensor.dtype) for tensor in alone["packed"].values()}))
        raise Breach(f"training fails: {' '.join(found.split()):.400} (the packed tensors are {held})")
    for name, tensor in alone["packed"].items():
        same_bits(f"{name} after a step", found["packed"][name], tensor)
    for name, want in {**alone["loss"], **alone["gradients"]}.items():
        got = {**found["loss"], **found["gradients"]}[name]
        error = float((got - want).norm() / want.norm())
        if not error <= ROUNDING:  # NaN is no less
            quantity = name if name == "loss" else f"the gradient of {name}"
            raise Breach(
                f"{quantity} is off by {error:.3g} (relative to its norm) from that of one process, "
                f"expected at most {ROUNDING:g}"
            )


@lru_cache(maxsize=1)  # starting processes takes seconds, and both checks need the same ones
def _trained(subject: Subject) -> tuple[processes.Step, Mapping[str, processes.Step | str]]:
    """Train in this process, and in two; return what came of it, for the two by the name of the wrapper."""
    model, in_features = processes.adapted_model(subject, subject.variants[0])
    x = gaussian(4 * processes.WORLD, in_features, seed=7)
    with TemporaryDirectory() as folder:
        torch.save((model, x), Path(folder, "given.pt"))
        processes.run("train", Path(folder))
        together = torch.load(Path(folder, "results.pt"), weights_only=True)
    before = processes.packed(model)
    return {**processes.train(model, x), "packed": before}, together


# Foreign formats


def _written(subject: Subject) -> list[Format]:
    written = [known for known in subject.info.formats if known.written]
    if not written:
        raise NotApplicable("it writes no foreign format")
    return written


def _export_config(subject: Subject, known: Format, variant: Variant) -> Mapping[str, JSON]:
    """Return the config as a file gives it back."""
    options, dtype = variant.options, torch.float32
    config = subject.hooks.export_config(
        options=options, format=known.name, dtype=dtype, dense=[], layers={"linear": options}
    )
    read: Mapping[str, JSON] = json.loads(json.dumps(config))
    return read


def _imported(
    subject: Subject,
    known: Format,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, JSON],
    shape: tuple[int, int],
) -> QuantizedWeight:
    found = find_format(config)
    if found is None or (found[0], found[1].name) != (subject.backend, known.name):
        raise Breach(f"export_config() for {known.name!r} gives {config}, which its Format.when does not fit")
    layers: Mapping[str, ImportedLayer] = subject.hooks.import_layers(
        tensors=tensors, config=config, format=known.name, shapes={"": shape}
    )
    return layers[""].qweight


def _exported(subject: Subject, known: Format, qweight: QuantizedWeight) -> Mapping[str, Tensor]:
    tensors: Mapping[str, Tensor] = subject.hooks.export_layers(
        weights={"": qweight}, format=known.name, dtype=torch.float32
    )
    if unknown := sorted(tensors.keys() - {*known.tensors}):
        raise Breach(
            f"export_layers() writes {', '.join(unknown)}, expected Format.tensors of {known.name!r}"
        )
    if known.marker not in tensors:
        raise Breach(f"export_layers() writes {sorted(tensors)}, and not Format.marker, {known.marker!r}")
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _as_stored(
    subject: Subject, what: str, got: QuantizedWeight, want: QuantizedWeight, tensors: Mapping[str, Tensor]
) -> None:
    """Demand an equal Ŵ, but for one rounding to the coarsest float dtype that the format stores."""
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors.values() if t.is_floating_point()), default=0.0)
    exact = subject.dense(want, torch.float64)
    if tuple(got.shape) != tuple(want.shape):
        raise Breach(f"{what} is {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = float((subject.dense(got, torch.float64) - exact).norm() / exact.norm())
    if not error <= coarsest:  # NaN is no less
        raise Breach(
            f"{what} is off by {error:.3g} (relative to its norm), expected at most {coarsest:.3g}: "
            "what it stores holds no more"
        )
