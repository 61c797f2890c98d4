"""Says what an adapter's folder holds: from its config, the header of its weights, and its side file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from modq.errors import CheckpointError
from modq.hf.provenance import FILE as BASE_FILE
from modq.hf.provenance import read_base
from modq.spec import JSON

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class TrainedScheme:
    """How some linears of the adapter's base were quantized."""

    backend: str
    package: str
    version: str
    options: Mapping[str, JSON]
    layers: int
    codes: str | None  # the hash of the packed tensors, None where they were not all at hand


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """The quantized base that an adapter was trained on; `source` is the hash of the weights that went in."""

    source: str | None
    schemes: tuple[TrainedScheme, ...]


@dataclass(frozen=True, slots=True)
class AdapterInspection:
    """What an adapter is; what its config does not say is None."""

    base_model: str | None
    method: str | None
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    parameters: int | None  # None without adapter_model.safetensors
    base: TrainedBase | None  # None if the base was dense, or the adapter is not modq's


def is_adapter(source: str) -> bool:
    """Whether this is the folder of a saved adapter."""
    return (Path(source) / CONFIG).is_file()


def inspect_adapter(folder: Path) -> AdapterInspection:
    """Inspect an adapter's folder. No weight is read, and the base is not needed.

    Raises:
        CheckpointError: if a file is damaged.
    """
    config = _read_config(folder / CONFIG)
    targets = config.get("target_modules") or ()
    return AdapterInspection(
        base_model=config.get("base_model_name_or_path"),
        method=config.get("peft_type"),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        parameters=_count_parameters(folder / WEIGHTS),
        base=_read_base(folder / BASE_FILE),
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}; restore it") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(config).__name__}, expected an object")
    return config


def _count_parameters(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            shapes: list[list[int]] = [file.get_slice(name).get_shape() for name in names]
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; is it copied whole?") from error
    return sum(map(prod, shapes))


def _read_base(path: Path) -> TrainedBase | None:
    if not path.is_file():
        return None
    base = read_base(path)
    count = Counter(base.modules.values())
    schemes = (
        TrainedScheme(
            backend=scheme["backend"],
            package=scheme["package"],
            version=scheme["version"],
            options=scheme["options"],
            layers=count[number],
            codes=scheme["codes"],
        )
        for number, scheme in enumerate(base.schemes)
    )
    return TrainedBase(base.source, tuple(schemes))
