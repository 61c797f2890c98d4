"""Says what a model folder holds, from its config alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modq.model import quantized_layers
from modq.sharing import packed_bytes
from modq.train.models import Sizes, measure, read_config


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """How some of a model's linears are quantized."""

    backend: str
    package: str
    version: str
    options: Mapping[str, Any]
    layers: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model is, and what it holds in memory once loaded."""

    architecture: str
    parameters: int  # of the model that it stands for, whatever they are packed into; tied ones count once
    dtype: str
    quant_method: str | None
    source: str | None  # the hash of the weights that were quantized, where the checkpoint records it
    sizes: Sizes
    schemes: tuple[SchemeInfo, ...]


def inspect_model(source: str) -> Inspection:
    """Inspect a folder, or a model on the hub, without loading it.

    Raises:
        CheckpointError: if the model cannot be read, or is not one that the commands take.
        BackendError: if a backend that it needs is not usable.
    """
    from transformers import AutoModelForCausalLM

    from modq.hf.foreign import stored_config

    config = read_config(source)
    dtype = config.dtype or torch.float32
    stored = stored_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    schemes: tuple[SchemeInfo, ...] = ()
    if stored is not None and stored["quant_method"] == "modq":
        schemes = _expect(model, stored, dtype)
    return Inspection(
        architecture=type(model).__name__,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        quant_method=stored and stored["quant_method"],
        source=((stored or {}).get("resolved") or {}).get("source"),
        sizes=measure(model),
        schemes=schemes,
    )


def _expect(model: Any, stored: Mapping[str, Any], dtype: torch.dtype) -> tuple[SchemeInfo, ...]:
    """Put the recorded layers into a model on meta, and describe the schemes."""
    from modq.hf.config import ModqConfig
    from modq.hf.quantizer import expect_packed

    config = ModqConfig.from_dict(stored)
    expect_packed(model, config, dtype)
    records, modules = config.resolved["schemes"], config.resolved["modules"]
    count = Counter(modules.values())
    layers = dict(quantized_layers(model))
    nbytes, bits = packed_bytes(layers), {}
    for number in count:
        its = [name for name, of in modules.items() if of == number and name in layers]
        elements = sum(layers[name].out_features * layers[name].in_features for name in its)
        bits[number] = 8 * sum(nbytes[name] for name in its) / elements if elements else 0.0
    return tuple(
        SchemeInfo(r["backend"], r["package"], r["version"], r["options"], count[number], bits[number])
        for number, r in enumerate(records)
        if number in count
    )
