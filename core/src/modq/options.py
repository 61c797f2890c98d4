"""Turns what a user gave, as keywords or as `key=value` text, into the options dataclass of a backend."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from modq.errors import OptionError
from modq.registry import describe_backend, options_class

SHORTHANDS = ("bits", "group_size")
"""Names that work with every backend: a plugin maps one to an option of its own by
`field(metadata={"shorthand": "group_size"})`. A backend with one width takes `bits` as a check."""


def build_options(backend: str, given: Mapping[str, Any]) -> Any:
    """Build the options of a backend from keywords.

    Raises:
        OptionError: for a name that the backend does not have, or a value that it does not take.
    """
    cls = options_class(backend)
    values = _by_field(backend, cls, given)
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise OptionError(f"backend {backend!r}: {name}={value!r}, expected {_spelled(hints[name])}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise OptionError(f"backend {backend!r}: {error}") from None


def options_to_json(options: Any) -> dict[str, Any]:
    """Return the options as a file gives them back, the inverse of `build_options`: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return plain


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` texts: a value is JSON if it reads as such (`64`, `true`), else a string."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise OptionError(f"{setting!r} is not a setting; expected key=value")
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return parsed


def _by_field(backend: str, cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve shorthands. A list becomes a tuple: options are hashable, and JSON has no tuples."""
    known = {field.name: field for field in fields(cls)}
    shorthands = {f.metadata["shorthand"]: name for name, f in known.items() if "shorthand" in f.metadata}
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key if key in known else shorthands.get(key, key)
        if name in values:
            raise OptionError(f"backend {backend!r}: {key!r} and {name!r} are one option, given twice")
        if name in known:
            values[name] = tuple(value) if isinstance(value, list) else value
        elif not (key == "bits" and _is_only_width(backend, value)):
            valid = ", ".join(sorted({*known, *shorthands})) or "none"
            raise OptionError(f"backend {backend!r} has no option {key!r}; it has {valid}")
    return values


def _is_only_width(backend: str, bits: object) -> bool:
    """Whether `bits`, from a backend that has no such option, is the width that it has anyway."""
    offered = describe_backend(backend).bits
    if len(offered) == 1 and bits != offered[0]:
        raise OptionError(f"backend {backend!r}: bits={bits!r}, expected {offered[0]:g}, its only width")
    return len(offered) == 1


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type that options have: bool, int, float, str, Literal, tuple, a union."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return str(hint) if get_origin(hint) else hint.__name__
