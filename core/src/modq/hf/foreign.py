"""Checkpoints in other packages' formats: loaded as modq bases, and written.

A plugin names the formats that it knows in `INFO.formats`. A checkpoint of one comes to modq where none of
the packages that load it natively is installed, or where the user asks: `ModqConfig(takeover=True)`, or
MODQ_TAKEOVER with names or `all`. Otherwise its own loading stays as it is. No format is named here.

transformers decides by the checkpoint's `quantization_config` alone, in one function, which is wrapped: to
register other config classes instead would not let `ModqConfig(takeover=True)` reach a checkpoint of another
method.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AutoHfQuantizer

from modq.errors import CheckpointError, OptionError
from modq.hf.config import ModqConfig
from modq.hf.provenance import hash_stored
from modq.linear import QuantLinear
from modq.model import dense_linears, quantized_layers
from modq.op import stored
from modq.registry import Status, list_backends, load
from modq.spec import JSON, Format, ImportedLayer

TAKEOVER = "MODQ_TAKEOVER"
_MARK = "_modq_wrapped"


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
    found = [
        (backend, known)
        for backend, known in known_formats()
        if all(
            config.get(key) in (value if isinstance(value, tuple) else (value,))
            for key, value in known.when.items()
        )
    ]
    if len(found) > 1:
        names = ", ".join(f"{known.name} of {backend}" for backend, known in found)
        raise CheckpointError(f"the checkpoint fits several formats: {names}; choose by MODQ_BACKENDS")
    return found[0] if found else None


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
    for name in names_in(model, dict.fromkeys(sorted(marked))):
        layer = QuantLinear.like(model.get_submodule(name), backend, None, dtype=dtype)
        layer.expect_dense()
        model.set_submodule(name, layer)


def conversions(quantizer: Any) -> list[WeightConverter]:
    """Return what the loader needs to hand each linear's tensors to the plugin together."""
    _, known = required_format(quantizer.quantization_config.source)
    return [WeightConverter(list(known.tensors), "weight", [ImportOnLoad(quantizer, known)])]


class ImportOnLoad(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Turn the foreign tensors of one linear into the packed tensors of its layer."""

    def __init__(self, quantizer: Any, known: Format) -> None:
        self.hf_quantizer = quantizer  # under this name transformers leaves the tensors' dtypes alone
        self.known = known

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
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if not (isinstance(layer, QuantLinear) and layer.expects_dense):
            return {"weight": tensors["weight"].to(model.get_parameter(full_layer_name).dtype)}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        packed: dict[str, Any] = self.hf_quantizer.collect_failure(
            name, lambda: self._import(layer, name, tensors)
        )
        return packed

    def _import(self, layer: QuantLinear, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        source = self.hf_quantizer.quantization_config.source
        layers = load(layer.backend).import_layers(tensors=tensors, config=source, format=self.known.name)
        imported: ImportedLayer = layers[""]
        if tuple(imported.qweight.shape) != (layer.out_features, layer.in_features):
            expected = (layer.out_features, layer.in_features)
            raise CheckpointError(
                f"the file's weight is {tuple(imported.qweight.shape)}, the model's {expected}"
            )
        self.hf_quantizer.weight_hashes[name] = hash_stored(tensors)
        layer.options = imported.options
        layer.allocate(imported.qweight.format_version, imported.qweight.meta)
        packed = stored({key: tensor.contiguous() for key, tensor in imported.qweight.tensors.items()})
        return {f"{name}.{tensor_name}": tensor for tensor_name, tensor in packed.items()}


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
    written = [known.name for backend, known in known_formats() if backend == layer.backend]
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
    if config.get("quant_method") == "modq":
        return None
    found = find_format(config)
    if found is not None and _is_wanted(found[1], given):
        return ModqConfig.of_source(dict(config))
    if isinstance(given, ModqConfig):
        if given.takeover:
            required_format(config)
        method = config.get("quant_method")
        raise OptionError(
            f"the checkpoint is quantized already (quant_method {method!r}); "
            "to train on it through modq pass ModqConfig(takeover=True)"
        )
    return None


def wrap_choice() -> None:
    """Let modq claim checkpoints where transformers chooses the quantizer; once."""
    merge = AutoHfQuantizer.merge_quantization_configs
    if hasattr(merge, _MARK):
        return

    @wraps(merge)
    def wrapped(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        claimed = _claim(quantization_config, quantization_config_from_args)
        return claimed or merge(quantization_config, quantization_config_from_args)

    setattr(wrapped, _MARK, True)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(wrapped)


wrap_choice()
