"""The conformance kit: what a quantizer backend promises, as checks that say by name what is wrong.

One set of checks, three ways in:

    class TestMine(QuantizerConformance):                           # the whole test file of a plugin
        backend = "mine"

    pytest --pyargs modq.testing.conformance --modq-backend mine    # without a file
    modq check mine                                                 # without pytest
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modq.testing.check import Breach, Check, NotApplicable, Outcome, Verdict, check, run_check
from modq.testing.subject import Subject, Variant

if TYPE_CHECKING:
    from modq.testing.conformance import QuantizerConformance

__all__ = [
    "Breach",
    "Check",
    "NotApplicable",
    "Outcome",
    "QuantizerConformance",
    "Subject",
    "Variant",
    "Verdict",
    "check",
    "run_check",
]


def __getattr__(name: str) -> Any:
    """Import what needs pytest only when it is asked for: `modq check` does without."""
    if name == "QuantizerConformance":
        from modq.testing.conformance import QuantizerConformance

        return QuantizerConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
