"""What the right backend and the wrong ones declare of themselves. This imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from modq import Format, QuantizerInfo


@dataclass(frozen=True)
class Options:
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}, expected 2 or more")


@dataclass(frozen=True)
class KeyedOptions(Options):
    def __post_init__(self) -> None:
        _ = {16: "small", 32: "usual", 64: "large"}[self.group_size]


SOUND = QuantizerInfo(
    name="sound",
    summary="groups of 4-bit integers",
    implementation="modq_sound:Sound",
    options="modq_mutants:Options",
    bits=(4,),
    max_relative_error={4: 0.1},
    calibration="optional",
    formats=(
        Format(
            name="sound-file",
            when={"quant_method": "sound-file"},
            tensors=("packed", "steps", "offsets"),
            marker="packed",
            native=(),
        ),
    ),
)

DECLARED: dict[str, dict[str, Any]] = {
    "FewerBitsDeclared": {"bits": (3,), "max_relative_error": {3: 0.1}},
    "LessErrorDeclared": {"max_relative_error": {4: 0.05}},
    "SlackErrorDeclared": {"max_relative_error": {4: 0.3}},
    "OptionErrorsOfItsOwn": {"options": "modq_mutants:KeyedOptions"},
}
"""Mistakes in what is declared, by the name of the mutant's class."""


def declare(module: str, cls: str, name: str) -> QuantizerInfo:
    return replace(SOUND, name=name, implementation=f"{module}:{cls}", **DECLARED.get(cls, {}))


def __getattr__(entry: str) -> QuantizerInfo:
    """Give the entry point `modq_mutants:<module>__<class>__<backend>` its INFO."""
    module, _, rest = entry.partition("__")
    cls, _, name = rest.partition("__")
    if not name:
        raise AttributeError(entry)
    return declare(module, cls, name.replace("_", "-"))
