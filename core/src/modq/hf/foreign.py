"""Checkpoints in other packages' formats: loaded as modq bases, and written.

A plugin names the formats that it knows in `INFO.formats`. A checkpoint of one comes to modq where none of
the packages that load it natively is installed, or where the user asks: `ModqConfig(takeover=True)`, or
MODQ_TAKEOVER with names or `all`. Otherwise its own loading stays as it is. No format is named here.

transformers decides by the checkpoint's `quantization_config` alone, in one function, which is wrapped: to
register other config classes instead would not let `ModqConfig(takeover=True)` reach a checkpoint of another
method. Some formats say what they are under a key of their own (`Format.config_key`), and transformers would
take their linears for missing and make random ones. Where it chooses a quantizer, such a checkpoint gets a
`quantization_config` that holds that key.

A module of a checkpoint may stand for several linears of the model (`Format.fused`). The loader collects its
tensors under the first linear's name and gets all linears' packed tensors back; what these have in common
stays so, see `modq.sharing`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto

from modq.errors import CheckpointError, OptionError
from modq.hf.config import ModqConfig
from modq.hf.provenance import hash_stored
from modq.hf.wrap import wrap
from modq.linear import QuantLinear
from modq.model import dense_linears, quantized_layers
from modq.op import stored
from modq.registry import Status, list_backends, load
from modq.sharing import find_shared
from modq.spec import JSON, Format, ImportedLayer

TAKEOVER = "MODQ_TAKEOVER"
_KEY = "quantization_config"


def known_formats() -> Iterator[tuple[str, Format]]:
    """Yield (backend, format) for all that the usable plugins know."""
    for backend in list_backends():
        if backend.status is Status.OK and backend.info is not None:
            yield from ((backend.name, known) for known in backend.info.formats)


def find_format(config: Mapping[str, JSON]) -> tuple[str, Format] | None:
    """Return the backend and the format of a checkpoint with this `quantization_config`, if any.

    Raises:
        CheckpointError: if several fit; none is picked.
    """
    found = [(backend, known) for backend, known in known_formats() if _fits(known, _said(known, config))]
    if len(found) > 1:
        names = ", ".join(f"{known.name} of {backend}" for backend, known in found)
        raise CheckpointError(f"the checkpoint fits several formats: {names}; choose by MODQ_BACKENDS")
    return found[0] if found else None


def _fits(known: Format, said: object) -> bool:
    return isinstance(said, Mapping) and all(
        said.get(key) in (value if isinstance(value, tuple) else (value,))
        for key, value in known.when.items()
    )


def _said(known: Format, config: Mapping[str, JSON]) -> Any:
    """Return what a checkpoint says in the words of this format."""
    return config if known.config_key == _KEY else config.get(known.config_key)


def stored_config(config: Any) -> Any:
    """Return the `quantization_config` of a model's config, None if it is not quantized.

    One that says so under a format's own key gets what it would say otherwise: the format's name for a
    quant_method, and that key.
    """
    given = getattr(config, _KEY, None)
    if given is not None:
        return given
    for _, known in known_formats():
        said = getattr(config, known.config_key, None)
        if _fits(known, said):
            return {"quant_method": known.name, known.config_key: said}
    return None


def expect_foreign(
    model: Any,
    config: Mapping[str, JSON],
    files: Iterable[str],
    names_in: Callable[..., dict[str, Any]],
    dtype: Any,
) -> None:
    """Replace the linears that the files hold quantized by layers that wait for their tensors."""
    backend, known = required_format(config)
    marked = {
        key.removesuffix(f".{known.marker}")
        for file in files
        for key in _tensor_names(file)
        if key.endswith(f".{known.marker}")
    }
    if not marked:
        raise CheckpointError(
            f"the checkpoint has no tensor *.{known.marker}, so nothing of format {known.name!r}"
        )
    parts = {_beside(name, part) for name in marked for part in known.fused.get(name.rpartition(".")[2], ())}
    for name in names_in(model, dict.fromkeys(sorted(marked | parts))):
        layer = QuantLinear.like(model.get_submodule(name), backend, None, dtype=dtype)
        layer.expect_dense()
        model.set_submodule(name, layer)


def _beside(name: str, other: str) -> str:
    """Return the name of another module of the same parent."""
    parent, dot, _ = name.rpartition(".")
    return f"{parent}{dot}{other}"


def conversions(quantizer: Any) -> list[WeightConverter]:
    """Return what the loader needs to hand each module's tensors to the plugin together."""
    _, known = required_format(quantizer.quantization_config.source)
    fused = [
        WeightConverter(
            [f"{name}.{tensor}" for tensor in (*known.tensors, "bias")],
            f"{parts[0]}.weight",
            [ImportOnLoad(quantizer, known, name)],
        )
        for name, parts in known.fused.items()
    ]
    single = WeightConverter(list(known.tensors), "weight", [ImportOnLoad(quantizer, known)])
    return [*fused, single]  # a key goes to the first that matches


class ImportOnLoad(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Turn the foreign tensors of one module into the packed tensors of its layers.

    The module is a linear of the model, or `fused` is the last part of its name and it stands for several.
    """

    def __init__(self, quantizer: Any, known: Format, fused: str = "") -> None:
        self.hf_quantizer = quantizer  # under this name transformers leaves the tensors' dtypes alone
        self.known = known
        self.fused = fused

    def __deepcopy__(self, memo: dict[int, Any]) -> ImportOnLoad:
        return self  # the loader copies its converters for each tensor; there is one quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return {full name: packed tensor}; the `weight` of any other module goes through as it is."""
        tensors = {
            key.removeprefix(f"{self.fused}."): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        first = full_layer_name.rpartition(".")[0]
        parts = self.known.fused.get(self.fused, ("",))
        names = {part: _beside(first, part) if part else first for part in parts}
        if self.known.marker not in tensors and "weight" in tensors:
            return {"weight": tensors["weight"].to(model.get_parameter(full_layer_name).dtype)}
        if missing_keys is not None:
            missing_keys.difference_update(f"{name}.weight" for name in names.values())
        module = _beside(first, self.fused) if self.fused else first
        packed: dict[str, Any] = self.hf_quantizer.collect_failure(
            module, lambda: self._import(model, names, tensors)
        )
        model.all_tied_weights_keys.update(find_shared(packed.items()))
        return packed

    def _import(
        self, model: Any, names: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Import a module whose linears have these names in the model, by part."""
        if self.known.marker not in tensors:
            raise CheckpointError(
                f"the checkpoint has {', '.join(sorted(tensors))} of it and no {self.known.marker}; "
                "is a shard missing?"
            )
        layers = {part: _waiting(model, name) for part, name in names.items()}
        source = self.hf_quantizer.quantization_config.source
        imported = load(next(iter(layers.values())).backend).import_layers(
            tensors=tensors,
            config=_said(self.known, source),
            format=self.known.name,
            shapes={part: (layer.out_features, layer.in_features) for part, layer in layers.items()},
        )
        digest = hash_stored(tensors)
        packed: dict[str, Tensor] = {}
        for part, layer in layers.items():
            self.hf_quantizer.weight_hashes[names[part]] = digest
            its = _adopt_kind(layer, imported[part])
            packed |= {f"{names[part]}.{name}": tensor for name, tensor in its.items()}
        return packed


def _waiting(model: Any, name: str) -> QuantLinear:
    """Return the layer that waits for its tensors."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not (isinstance(layer, QuantLinear) and layer.expects_dense):
        raise CheckpointError(f"it stands for a linear {name}, and {type(model).__name__} has none")
    return layer


def _adopt_kind(layer: QuantLinear, imported: ImportedLayer) -> dict[str, Tensor]:
    """Make a layer one of the imported kind, with slots for its tensors, and return those."""
    qweight, expected = imported.qweight, (layer.out_features, layer.in_features)
    if tuple(qweight.shape) != expected:
        raise CheckpointError(f"the file's weight is {tuple(qweight.shape)}, the model's {expected}")
    layer.options = imported.options
    layer.allocate(qweight.format_version, qweight.meta)
    return stored({key: tensor.contiguous() for key, tensor in qweight.tensors.items()})


def save_as(model: Any, folder: str | Path, format: str) -> None:
    """Save a quantized model in a foreign format.

    Args:
        model: a transformers model that modq has quantized.
        folder: where to write.
        format: the format's name, such as a plugin declares in `INFO.formats`.

    Raises:
        OptionError: if no backend of the model writes that format, or if its layers need different configs.
    """
    state, packed = dict(model.state_dict()), list(quantized_layers(model))
    for name, layer in packed:
        _check_writes(layer, format)
        hooks = load(layer.backend)
        exported = hooks.export_layers(
            weights={"": layer.quantized_weight}, format=format, dtype=layer.compute_dtype
        )
        for tensor_name, _ in layer.named_packed():
            del state[f"{name}.{tensor_name}"]
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in exported.items()}
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    quantizer.get_state_dict_and_metadata(model)
    try:
        model.hf_quantizer, model.config.quantization_config = None, _foreign_config(model, format)
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config


def _foreign_config(model: Any, format: str) -> dict[str, JSON]:
    dense = [name for name, _ in dense_linears(model)]
    layers = {name: layer.options for name, layer in quantized_layers(model)}
    configs: list[dict[str, JSON]] = []
    for _, layer in quantized_layers(model):
        made = load(layer.backend).export_config(
            options=layer.options, format=format, dtype=layer.compute_dtype, dense=dense, layers=layers
        )
        if made not in configs:
            configs.append(dict(made))
    if len(configs) != 1:
        raise OptionError(
            f"format {format!r} has one config for all layers, the model's would need {len(configs)}; "
            "quantize its layers alike, or save it as modq"
        )
    return configs[0]


def _check_writes(layer: QuantLinear, format: str) -> None:
    written = [known.name for backend, known in known_formats() if backend == layer.backend and known.written]
    if format not in written:
        names = ", ".join(map(repr, written)) or "none"
        raise OptionError(f"backend {layer.backend!r} does not write format {format!r}; it writes {names}")


def required_format(config: Mapping[str, JSON]) -> tuple[str, Format]:
    """Return the backend and the format of a foreign checkpoint.

    Raises:
        CheckpointError: if no usable backend reads it, or several formats fit.
    """
    found = find_format(config)
    if found is None:
        names = ", ".join(sorted({known.name for _, known in known_formats()})) or "none"
        method = config.get("quant_method")
        raise CheckpointError(
            f"no usable backend reads quant_method {method!r}; formats that are read: {names}"
        )
    return found


def _tensor_names(file: str) -> list[str]:
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{Path(file).name} is no safetensors file, and modq unpickles nothing; convert it"
        )
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _is_wanted(known: Format, given: object) -> bool:
    """Whether the checkpoint comes to modq: its own package is missing, or the user says so."""
    if isinstance(given, ModqConfig):
        return bool(given.takeover)
    names = os.environ.get(TAKEOVER, "").replace(" ", "").split(",")
    missing = all(find_spec(package) is None for package in known.native)
    return given is None and (missing or "all" in names or known.name in names)


def _claim(stored_config: Any, given: object) -> ModqConfig | None:
    """Return the config that makes a checkpoint modq's, None where its own loading stays."""
    config = stored_config if isinstance(stored_config, Mapping) else stored_config.to_dict()
    found = find_format(config)
    if found is not None and _is_wanted(found[1], given):
        return ModqConfig.of_source(dict(config))
    method = config.get("quant_method")
    if method != "modq" and isinstance(given, ModqConfig):
        if given.takeover:
            required_format(config)
        raise OptionError(
            f"the checkpoint is quantized already (quant_method {method!r}); "
            "to train on it through modq pass ModqConfig(takeover=True)"
        )
    return None


def _supporting(supports: Callable[..., bool]) -> Callable[..., bool]:
    def wrapped(quantization_config: Any) -> bool:
        """Know the methods that plugins know: of others transformers would load random linears."""
        known = isinstance(quantization_config, Mapping) and find_format(quantization_config) is not None
        return known or supports(quantization_config)

    return wrapped


def _merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        claimed = _claim(quantization_config, quantization_config_from_args)
        return claimed or merge(cls, quantization_config, quantization_config_from_args)

    return wrapped


def _choosing(choose: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, _KEY, None) is None:
            said = stored_config(config)
            if said is not None and _claim(said, quantization_config) is not None:
                setattr(config, _KEY, {**said, "quant_method": "modq"})  # which transformers knows
                for key in said.keys() & vars(config).keys():
                    delattr(config, key)  # from here on it is a model like any of modq's
        return choose(config, quantization_config, *args, **kwargs)

    return wrapped


def wrap_choice() -> None:
    """Let modq claim checkpoints where transformers chooses the quantizer; once."""
    wrap(auto.AutoHfQuantizer, "supports_quant_method", _supporting)
    wrap(auto.AutoHfQuantizer, "merge_quantization_configs", _merging)
    wrap(auto, "get_hf_quantizer", _choosing)
    if modeling := sys.modules.get("transformers.modeling_utils"):  # imported first: it has a name of its own
        wrap(modeling, "get_hf_quantizer", _choosing)


wrap_choice()
