"""A register of mistakes: which check must catch each, and what its message must say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modq_sound import Sound


@dataclass(frozen=True)
class Mutant:
    """A mistake, the check that must catch it, and what its message must say (a regex)."""

    mistake: str
    caught_by: str
    says: str
    entry_point: str


MUTANTS: dict[str, Mutant] = {}

ENTRY_POINTS = {"torch-at-the-entry-point": "modq_mutant_torch:INFO"}
"""Where it is not made by `modq_mutants`."""


def caught_by(check: str, says: str = "") -> Callable[[type[Sound]], type[Sound]]:
    """Register a mutant under the name of its class."""

    def register(cls: type[Sound]) -> type[Sound]:
        name = cls.NAME = re.sub("(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        made = f"modq_mutants:{cls.__module__}__{cls.__name__}__{name.replace('-', '_')}"
        mistake = " ".join((cls.__doc__ or "").split())
        MUTANTS[name] = Mutant(mistake, check, says, ENTRY_POINTS.get(name, made))
        return cls

    return register


def install(folder: Path) -> None:
    """Declare the right backend and all registered mutants in `folder`, as an installed package would."""
    info = folder / "modq_mutants-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modq-mutants\nVersion: 1.0\n")
    points = [f"{name} = {mutant.entry_point}" for name, mutant in MUTANTS.items()]
    lines = ["[modq.quantizers]", "sound = modq_mutants:SOUND", *points]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
