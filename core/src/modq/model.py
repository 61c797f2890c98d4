"""Which layers of a model become quantized, and making them so in place."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from modq.errors import ModqError, OptionError
from modq.linear import QuantLinear
from modq.options import build_options

if TYPE_CHECKING:
    from modq.spec import JSON


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one layer is quantized: by which backend, with which options."""

    backend: str
    options: Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a user asks for: a default scheme, overrides by regex, and what to leave out.

    `layers` maps a regex, searched in the module's name, to overrides of the options, with `backend` among
    them where another backend is meant (the default's options do not carry over to it); None leaves the layer
    dense. The first match counts. `modules_to_not_convert` lists names or regexes of whole dotted parts of a
    name.
    """

    backend: str | None
    options: Mapping[str, JSON] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, JSON] | None] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] | None = None

    def scheme(self, name: str) -> Scheme | None:
        """Return the scheme of the module of this name, None if it stays dense."""
        for pattern, overrides in self.layers.items():
            if re.search(pattern, name):
                return None if overrides is None else self._overridden(overrides)
        return self._overridden({})

    def check(self) -> None:
        """Build every scheme once, so that a wrong option is known before anything is loaded."""
        if not isinstance(self.layers, Mapping):
            raise OptionError(f"layers={self.layers!r}, expected {{regex: overrides}}")
        for pattern, overrides in self.layers.items():
            _check_regex("layers", pattern)
            if not (overrides is None or isinstance(overrides, Mapping)):
                raise OptionError(f"layers: {pattern!r} maps to {overrides!r}, expected options or None")
            if overrides is not None:
                self._overridden(overrides)
        for pattern in self.modules_to_not_convert or ():
            _check_regex("modules_to_not_convert", pattern)
        if self.backend is not None:
            self._overridden({})

    def _overridden(self, overrides: Mapping[str, JSON]) -> Scheme | None:
        given = dict(overrides)
        backend = given.pop("backend", self.backend)
        if backend is None:
            return None
        inherited = self.options if backend == self.backend else {}
        return Scheme(backend, build_options(backend, {**inherited, **given}))


def quantize_model(
    model: nn.Module,
    backend: str,
    *,
    layers: Mapping[str, Mapping[str, JSON] | None] | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Quantize the linears of a model that is in memory, in place, and return it.

    A transformers model then saves, reloads and trains as one that was quantized while loading. Weights
    shared by several modules (tied embeddings) are left alone, and so is the output head of a transformers
    model unless `modules_to_not_convert` is given.

    Args:
        model: any module.
        backend: the name of an installed quantizer.
        layers: overrides by regex, as in `Recipe`.
        modules_to_not_convert: what to leave dense, as in `Recipe`.
        calibration: for backends that learn from data, and a transformers model: tensors of token ids, (rows,
            tokens), or dictionaries of the model's arguments, such as a data loader's batches. The linears of
            its blocks are quantized in their order, each from what the quantized ones before give it; other
            linears stay dense if their backend cannot do without data.
        **options: the backend's options.

    Raises:
        BackendError, OptionError, ShapeError, WeightError: with the layer's name where it is one layer's.
        CalibrationError: if the data or the model cannot be used for calibration.
    """
    skip = None if modules_to_not_convert is None else tuple(modules_to_not_convert)
    recipe = Recipe(backend, options, layers or {}, skip)
    recipe.check()
    if _is_transformers_model(model):
        from modq.hf.quantizer import quantize_pretrained  # transformers, which `import modq` must not import

        quantize_pretrained(model, recipe, calibration)
        return model
    if calibration is not None:
        raise OptionError(
            f"calibration data is for models of transformers, this is a {type(model).__name__}; "
            "quantize its weights one by one: modq.quantize(weight, backend, modq.Calibration(…))"
        )
    quantize_layers(model, plan_layers(model, recipe, [*(skip or ()), *shared_linears(model)]))
    return model


def plan_layers(model: nn.Module, recipe: Recipe, skip: Iterable[str] = ()) -> dict[str, Scheme]:
    """Return the scheme of each linear of `model` that becomes quantized, by module name.

    Args:
        model: any module; its weights may be on meta.
        recipe: what the user asked for.
        skip: names of modules to leave dense; names or regexes of whole dotted parts.

    Raises:
        OptionError: if a regex of `recipe.layers` matches no linear of the model.
    """
    skip = list(skip)
    linears = [name for name, _ in dense_linears(model)]
    for pattern in recipe.layers:
        if not any(re.search(pattern, name) for name in linears):
            shown = ", ".join(linears[:3])
            raise OptionError(
                f"layers: {pattern!r} matches no linear of the model; its linears are {shown}, …"
            )
    wanted = [name for name in linears if not is_skipped(name, skip)]
    schemes = {name: recipe.scheme(name) for name in wanted}
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def quantize_layers(model: nn.Module, plan: Mapping[str, Scheme]) -> None:
    """Replace the planned linears of `model` by quantized ones; each dense weight is freed at once."""
    for name, scheme in plan.items():
        linear = model.get_submodule(name)
        try:
            layer = QuantLinear.from_dense(linear, scheme.backend, scheme.options)
        except ModqError as error:
            raise type(error)(f"{name}: {error}") from None
        model.set_submodule(name, layer)


def dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears that could become quantized, with their names."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":  # GPT-2's, an (in, out) linear
            yield name, module


def shared_linears(model: nn.Module) -> list[str]:
    """Return the linears whose weight another module uses too: quantizing one would untie them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return [re.escape(name) for names in owners.values() if len(names) > 1 for name in names]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield the quantized layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def is_skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches whole dotted parts of a module's name: `lm_head`, `layers.0`, `wo`."""
    return any(re.search(rf"(^|\.)(?:{pattern})(\.|$)", name) for pattern in patterns)


def _check_regex(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise OptionError(f"{option}: {pattern!r} is not a regex: {error}") from None


def _is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel, which cannot be unless transformers has been imported."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
