"""Which base an adapter was trained on: the side file `modq.json` beside adapter_config.json, and its check.

An adapter fits the base that it was trained on, and nothing in PEFT's own files says which that was. Three
things make a base what it is: the weights that went in, the options, and the codes that came out. Other
weights, another backend or other options mean another base: an error. Codes alone may differ by one step
between devices, and between versions of a package: a warning. What is not known on both sides is left out.

The source's hash is taken of the weights rounded to bfloat16: the same checkpoint loaded in bfloat16 and in
float32 is one source, and half the bytes are hashed. What rounding hides shows in the codes. It is SHA-256,
for which most processors have instructions. Every byte counts, so a small edit shows; a sample would be
cheaper, and need not be (`docs/log.md` has the figures). Layers are hashed each by itself and joined in the
order of their names, so that shards do not matter.

A base that comes from a checkpoint of another format has no such weights: what was quantized is not known any
more. Its source is that checkpoint's own tensors, as they are stored, and its hash has the format's name in
front ("name:hash"). Hashes of two kinds are not compared: the same weights, quantized by modq and by another
package to the same codes, are the same base, and only the codes can tell.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from modq import __version__
from modq.errors import CheckpointError, OptionError
from modq.folders import write_json
from modq.hf.config import is_original, resolve
from modq.linear import QuantLinear
from modq.model import quantized_layers
from modq.spec import JSON

FILE = "modq.json"
SCHEMA = 1
"""The version of what the side file looks like."""

CHECK = "MODQ_ADAPTER_CHECK"
"""The environment variable that says what to do about an adapter of another base: error, warn or off."""

_CHUNK = 1 << 20
"""Elements to hash at once: what is copied is never larger."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a side file says: `source` is the weights' hash, `modules` give each one's scheme by number."""

    source: str | None
    schemes: list[dict[str, JSON]]
    modules: dict[str, int]

    def scheme(self, name: str) -> dict[str, JSON] | None:
        """Return the scheme of a module, None if it is dense."""
        return self.schemes[self.modules[name]] if name in self.modules else None

    def names(self, number: int) -> list[str]:
        """Return the modules of one scheme."""
        return [name for name, its in self.modules.items() if its == number]


# Hashes


def hash_weight(weight: Tensor) -> str:
    """Hash a dense weight as it is in bfloat16, by its shape and values."""
    digest = sha256(str(tuple(weight.shape)).encode())
    for chunk in torch.split(weight.detach().reshape(-1), _CHUNK):
        digest.update(_bytes(chunk.to(torch.bfloat16)))
    return digest.hexdigest()


def hash_stored(tensors: Mapping[str, Tensor]) -> str:
    """Hash what a checkpoint of another format stores for one layer."""
    digest = sha256()
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


def join_hashes(hashes: Mapping[str, str], model: Any, format: str | None = None) -> str | None:
    """Join the hashes of a model's weights, by module name; None if there are none.

    Args:
        hashes: by module name.
        model: the model, for the prefix that its names may have.
        format: the checkpoint's format, where its stored tensors were hashed; None for dense weights.
    """
    named = {_plain(name, model): value for name, value in hashes.items()}
    joined = "".join(f"{name} {named[name]}\n" for name in sorted(named))
    digest = sha256(joined.encode()).hexdigest() if joined else None
    return f"{format}:{digest}" if format and digest else digest


def hash_codes(layers: Mapping[str, QuantLinear]) -> str | None:
    """Hash the packed tensors; None if they are not all here, or no longer those that the base came with."""
    digest = sha256()
    for name, layer in sorted(layers.items()):
        if not is_original(layer):
            return None
        for tensor_name, tensor in layer.named_packed():
            if type(tensor) is not nn.Parameter or tensor.is_meta:  # sharded by FSDP2, or offloaded
                return None
            _feed(digest, f"{name}.{tensor_name}", tensor)
    return digest.hexdigest()


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        digest.update(_bytes(chunk))


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


# What a model is


def describe_base(model: Any) -> Base:
    """Describe the base of a model, which may have adapters on; without the hashes of its codes."""
    base = _without_peft(model)
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    source = (getattr(config, "resolved", None) or {}).get("source")
    record = resolve(base_layers(base).items(), source)
    return Base(record.get("source"), record["schemes"], record["modules"])


def _without_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_layers(model: Any) -> dict[str, QuantLinear]:
    """Return the quantized layers of the base by the names that they have without adapters, and without the
    prefix that the same layers have below a head.
    """
    base = _without_peft(model)
    named = ((name.split("."), layer) for name, layer in quantized_layers(base))
    return {
        _plain(".".join(part for part in parts if part not in ("base_layer", "original_module")), base): layer
        for parts, layer in named
        if "modules_to_save" not in parts  # PEFT's trained copies
    }


def _plain(name: str, model: Any) -> str:
    prefix: str = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


# The side file


def save_base(model: Any, folder: str | Path) -> None:
    """Write the side file of an adapter that is saved to `folder`; over a dense base leave none there."""
    path = Path(folder, FILE)
    layers, base = base_layers(model), describe_base(model)
    if not layers:
        path.unlink(missing_ok=True)  # of an adapter that was overwritten
        return
    schemes = [
        {**scheme, "codes": hash_codes({name: layers[name] for name in base.names(number)})}
        for number, scheme in enumerate(base.schemes)
    ]
    record = {"source": base.source, "schemes": schemes, "modules": base.modules}
    write_json(path, {"schema": SCHEMA, "modq": __version__, "base": record})


def read_base(path: Path) -> Base:
    """Read a side file.

    Raises:
        CheckpointError: if it is damaged, or of a later modq.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, record = content["schema"], content["base"]
        if schema != SCHEMA:
            raise CheckpointError(
                f"{path} has schema {schema!r}, written by modq {content.get('modq')}; "
                f"this modq {__version__} reads schema {SCHEMA}: update modq, or set {CHECK}=off"
            )
        needed = ("backend", "package", "version", "options", "codes")
        schemes = [{key: scheme[key] for key in needed} for scheme in record["schemes"]]
        modules = {name: range(len(schemes))[number] for name, number in record["modules"].items()}
        hashes = [record["source"], *(scheme["codes"] for scheme in schemes)]
        if not all(value is None or isinstance(value, str) for value in hashes):
            raise TypeError("a hash is no text")
        return Base(record["source"], schemes, modules)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}), expected what modq wrote with the "
            f"adapter; restore it, or set {CHECK}=off to load the adapter unchecked"
        ) from None


def _find(adapter: str | Path, hub: Mapping[str, Any]) -> Path | None:
    """Return the side file of an adapter, from its folder or the hub; None if it has none."""
    known = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    given = {key: hub[key] for key in known if hub.get(key) is not None}
    folder = Path(adapter, given.get("subfolder", ""))
    if folder.is_dir():
        return folder / FILE if (folder / FILE).is_file() else None
    try:
        return Path(hf_hub_download(str(adapter), FILE, **given))
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
    ):  # no such file, or PEFT will say what is wrong
        return None


# The check


def check_adapter(model: Any, adapter: str | Path, hub: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained on another quantized base than `model`'s.

    A dense model takes any adapter: merging into it is how to merge without loss.

    Args:
        model: the base, or a model with adapters on it.
        adapter: the adapter's folder, or its name on the hub.
        hub: how to get it from there: subfolder, revision, token, …

    Raises:
        CheckpointError: if the source weights, a backend or options differ, or the side file is damaged.
        OptionError: if MODQ_ADAPTER_CHECK is neither error, warn nor off.
    """
    action = os.environ.get(CHECK, "error")
    if action not in ("error", "warn", "off"):
        raise OptionError(f"{CHECK}={action!r}, expected 'error', 'warn' or 'off'")
    if action == "off" or not any(quantized_layers(model)):
        return
    path = _find(adapter, hub)
    if path is None:
        return
    try:
        _compare(read_base(path), model, adapter)
    except CheckpointError as error:
        if action == "error":
            raise
        warnings.warn(str(error), stacklevel=4)


def _compare(trained: Base, model: Any, adapter: str | Path) -> None:
    here = describe_base(model)
    difference = next(_differences(trained, here, _without_peft(model)), None)
    if difference is not None:
        raise CheckpointError(
            f"adapter {str(adapter)!r} was trained on another base: {difference}; "
            f"load the base that it was trained on, or set {CHECK}=warn to use it on this one"
        )
    for doubt in _doubts(trained, here, base_layers(model)):
        warnings.warn(f"adapter {str(adapter)!r}: {doubt}", stacklevel=6)


def _differences(trained: Base, here: Base, model: Any) -> Iterator[str]:
    """Yield what makes this another base."""
    present = {_plain(name, model) for name, _ in model.named_modules()}
    for name in sorted({*trained.modules, *here.modules}):
        was, now = describe_scheme(trained.scheme(name)), describe_scheme(here.scheme(name))
        if was != now and (
            name in here.modules or name in present
        ):  # a part that this class lacks is no loss
            yield f"{name} was {was}, and is {now} here"
    if _same_source(trained, here) is False:
        was, now = _short(trained.source), _short(here.source)
        yield f"its source weights have the hash {was}…, those of this base {now}…"


def _same_source(trained: Base, here: Base) -> bool | None:
    """Whether two bases have one source; None if one is not known, or they are hashes of two kinds."""
    if not (trained.source and here.source):
        return None
    kinds = {base.source.rpartition(":")[0] for base in (trained, here) if base.source}
    return trained.source == here.source if len(kinds) == 1 else None


def _short(source: str | None) -> str:
    kind, colon, digest = (source or "").rpartition(":")
    return f"{kind}{colon}{digest[:16]}"


def _doubts(trained: Base, here: Base, layers: Mapping[str, QuantLinear]) -> Iterator[str]:
    """Yield what need not make this another base."""
    for number, scheme in enumerate(trained.schemes):
        names = trained.names(number)
        if not names or not all(name in layers for name in names):
            continue
        now = here.scheme(names[0]) or {}
        was, given = (f"{its['package']} {its['version']}" for its in (scheme, now))
        if was != given:
            yield f"its base was quantized by {was}, this one is by {given}; results may differ a little"
        codes = hash_codes({name: layers[name] for name in names})
        if scheme["codes"] and codes and scheme["codes"] != codes:
            yield (
                f"the codes of this base have the hash {codes[:16]}…, those that it was trained on "
                f"{scheme['codes'][:16]}…; codes made on another device may differ by a step, and "
                f"{'the source weights are the same' if _same_source(trained, here) else _UNKNOWN}"
            )


_UNKNOWN = "whether the source weights are the same is not known: compare results, or load that very base"


def describe_scheme(scheme: Mapping[str, JSON] | None) -> str:
    """Say how a module is quantized, such as "name(option=value)"."""
    if scheme is None:
        return "dense"
    options = ", ".join(f"{key}={value!r}" for key, value in sorted(scheme["options"].items()))
    return f"{scheme['backend']}({options})"
