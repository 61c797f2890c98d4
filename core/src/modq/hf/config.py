"""ModqConfig: what a user passes as `quantization_config`, and what config.json holds under that key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from modq import __version__
from modq.errors import BackendError, CheckpointError, OptionError
from modq.linear import QuantLinear
from modq.model import Recipe, Scheme
from modq.op import handle_content
from modq.options import build_options, options_to_json
from modq.registry import KNOWN_PACKAGES, Status, check_format_version, find, list_backends
from modq.spec import JSON

SCHEMA = 1
"""The version of what `resolved` looks like in a saved config."""


class ModqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """Quantize a transformers model with a modq backend.

    >>> config = ModqConfig("nf4")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained(model_id, quantization_config=config)  # doctest: +SKIP

    Args:
        backend: the name of an installed quantizer; None leaves dense what no entry of `layers` matches.
        layers: {regex: overrides}, searched in module names, first match counts. Overrides are options, with
            `backend` among them to use another quantizer; None leaves the layer dense.
        modules_to_not_convert: names, or regexes of whole dotted parts of names, to leave dense. By default
            what is outside the base model (the output head, a classifier), tied weights and what the
            architecture keeps in float32; a list replaces that default, but tied weights are never quantized.
        takeover: load a checkpoint of a foreign format through the backend that reads it, though the package
            of that format is installed too; nothing else is given then.
        **options: the backend's options.

    Raises:
        BackendError: if a backend is not installed or not usable.
        OptionError: if an option does not exist or has a wrong value.
    """

    def __init__(
        self,
        backend: str | None = None,
        layers: Mapping[str, Mapping[str, JSON] | None] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        takeover: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(modules_to_not_convert, str):
            raise OptionError(f"modules_to_not_convert={modules_to_not_convert!r}, expected a list of names")
        if takeover and (backend or layers or modules_to_not_convert or options):
            raise OptionError("ModqConfig(takeover=True) takes nothing else: the checkpoint says it all")
        if backend is None and not layers and not takeover:
            raise OptionError(
                "ModqConfig() names no backend; expected ModqConfig(backend=...) or layers={...}"
            )
        self._set(
            backend=backend,
            layers=layers,
            modules_to_not_convert=None if modules_to_not_convert is None else list(modules_to_not_convert),
            options=options,
            takeover=takeover,
        )
        self.recipe.check()

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what `to_dict` wrote. Nothing is imported here: a file never causes an import.

        Returns:
            The config; with `return_unused_kwargs`, as transformers asks, it and the other keywords.
        """
        config = cls.__new__(cls)
        missing = [
            key
            for key in ("backend", "layers", "modules_to_not_convert", "options")
            if key not in config_dict
        ]
        if missing:
            raise CheckpointError(
                f"quantization_config of modq lacks {', '.join(missing)}; is it edited by hand?"
            )
        resolved = config_dict.get("resolved")
        if resolved is not None and resolved.get("schema") != SCHEMA:
            written = resolved.get("modq")
            raise CheckpointError(
                f"quantization_config has schema {resolved.get('schema')!r}, written by modq {written}; "
                f"this modq {__version__} reads schema {SCHEMA}: update modq"
            )
        known: dict[str, Any] = {key: config_dict.get(key) for key in config._keys}
        config._set(**known)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: what was asked for and, once a model was quantized, what each module became."""
        copied: dict[str, Any] = json.loads(json.dumps({key: getattr(self, key) for key in self._keys}))
        return {"quant_method": "modq", **copied}

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    @property
    def recipe(self) -> Recipe:
        """What was asked for."""
        skip = self.modules_to_not_convert
        return Recipe(self.backend, self.options, self.layers, None if skip is None else tuple(skip))

    _keys = ("backend", "layers", "modules_to_not_convert", "options", "resolved")
    """What is saved."""

    def _set(
        self,
        *,
        backend: str | None = None,
        layers: Mapping[str, Any] | None = None,
        modules_to_not_convert: list[str] | None = None,
        options: Mapping[str, Any] | None = None,
        resolved: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        takeover: bool = False,
    ) -> None:
        self.quant_method = "modq"
        self.backend = backend
        self.layers = {} if layers is None else layers
        self.modules_to_not_convert = modules_to_not_convert
        self.options = {} if options is None else options
        self.resolved = resolved
        self.source = source  # what a foreign checkpoint that is being loaded says, see modq.hf.foreign
        self.takeover = takeover

    @classmethod
    def of_source(cls, source: dict[str, JSON]) -> ModqConfig:
        """Make the config for a foreign checkpoint with this `quantization_config`."""
        config = cls.__new__(cls)
        config._set(source=source)
        return config

    @classmethod
    def of(cls, recipe: Recipe) -> ModqConfig:
        """Make the config of a recipe that has been checked."""
        config = cls.__new__(cls)
        skip = recipe.modules_to_not_convert
        config._set(
            backend=recipe.backend,
            layers=dict(recipe.layers),
            modules_to_not_convert=None if skip is None else list(skip),
            options=dict(recipe.options),
        )
        return config


def resolve(layers: Iterable[tuple[str, QuantLinear]], source: str | None = None) -> dict[str, JSON]:
    """Record what each quantized module of a model is: schemes once each, modules by the scheme's number.

    A checkpoint is read back from this record alone; rules and regexes are not matched again.

    Args:
        layers: the quantized modules, by name.
        source: the hash of the weights that they were quantized from; it is recorded while that is so.
    """
    schemes: list[dict[str, JSON]] = []
    modules: dict[str, int] = {}
    for name, layer in layers:
        source = source if is_original(layer) else None
        content = handle_content(layer.handle)
        backend = find(layer.backend)
        scheme = {
            "backend": layer.backend,
            "package": backend.package,
            "version": backend.version,
            "format_version": content["format_version"],
            "options": options_to_json(layer.options),
            "meta": content["meta"],
        }
        if scheme not in schemes:
            schemes.append(scheme)
        modules[name] = schemes.index(scheme)
    record = {"schema": SCHEMA, "modq": __version__, "schemes": schemes, "modules": modules}
    return record if source is None else {**record, "source": source}


def is_original(layer: QuantLinear) -> bool:
    """Whether a layer holds what the base came with: nothing was merged into it, or all was taken out."""
    original: int = layer.__dict__.get("_modq_original_write", 1)
    return layer.writes == original


def read_modules(resolved: Mapping[str, JSON]) -> dict[str, tuple[Scheme, int, Mapping[str, JSON]]]:
    """Return the recorded scheme, format version and meta of each recorded module, the inverse of `resolve`.

    Raises:
        BackendError: if a scheme's backend is not installed or not usable; it names the package recorded.
        CheckpointError: if the record is incomplete, or of a format that the backend does not read.
    """
    try:
        schemes = [
            (Scheme(_usable(record), _options(record)), record["format_version"], record["meta"])
            for record in resolved["schemes"]
        ]
        for scheme, format_version, _ in schemes:
            check_format_version(scheme.backend, format_version)
        return {name: schemes[number] for name, number in resolved["modules"].items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"quantization_config's record of the quantized modules is incomplete ({error!r}); "
            "is it edited by hand?"
        ) from None


def read_shared(resolved: Mapping[str, JSON], names: Mapping[str, str]) -> dict[str, str]:
    """Return which packed tensors a model's layers have in common, {name: first name}.

    Args:
        resolved: the record.
        names: what each recorded module is called in this model; of others nothing is returned.

    Raises:
        CheckpointError: if the record is damaged.
    """
    try:
        recorded = [
            (*name.rsplit(".", 1), *first.rsplit(".", 1))
            for name, first in resolved.get("shared", {}).items()
        ]
        return {
            f"{names[module]}.{tensor}": f"{names[other]}.{source}"
            for module, tensor, other, source in recorded
            if module in names and other in names
        }
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"quantization_config's record of shared tensors is damaged ({error}); is it edited by hand?"
        ) from None


def _usable(record: Mapping[str, JSON]) -> str:
    name: str = record["backend"]
    if not any(backend.name == name and backend.status is Status.OK for backend in list_backends()):
        written = f"{record['package']} {record['version']}"
        ours = KNOWN_PACKAGES.get(name) == record["package"]
        hint = f"pip install {record['package']}" if ours else "install that package if you trust it"
        raise BackendError(
            f"the checkpoint needs backend {name!r} of {written}, which is not usable here: {hint}"
        )
    return name


def _options(record: Mapping[str, JSON]) -> Any:
    try:
        return build_options(record["backend"], record["options"])
    except OptionError as error:
        written = f"{record['package']} {record['version']}"
        raise CheckpointError(
            f"the checkpoint was written with other options of {written}: {error}"
        ) from None


if "modq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("modq")(ModqConfig)
