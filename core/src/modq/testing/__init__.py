"""The conformance kit: what a quantizer backend promises, as checks that say by name what is wrong.

One set of checks, three ways in:

    class TestMine(QuantizerConformance):                           # the whole test file of a plugin
        backend = "mine"

    pytest --pyargs modq.testing.conformance --modq-backend mine    # without a file
    modq check mine                                                 # without pytest
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modq.testing.check import Breach, Check, NotApplicable, Outcome, Verdict, run_check
    from modq.testing.conformance import QuantizerConformance
    from modq.testing.subject import Subject, Variant

_HOME = {
    "Breach": "check",
    "Check": "check",
    "NotApplicable": "check",
    "Outcome": "check",
    "QuantizerConformance": "conformance",
    "Subject": "subject",
    "Variant": "subject",
    "Verdict": "check",
    "run_check": "check",
}

__all__ = [
    "Breach",
    "Check",
    "NotApplicable",
    "Outcome",
    "QuantizerConformance",
    "Subject",
    "Variant",
    "Verdict",
    "run_check",
]


def __getattr__(name: str) -> Any:
    """Import only what is asked for: every session of pytest passes through here."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
