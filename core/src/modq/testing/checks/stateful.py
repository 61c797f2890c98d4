"""Hypothesis calls whatever can be done to quantized layers in any order."""

from __future__ import annotations

from importlib.util import find_spec

from modq.testing.check import NotApplicable, check
from modq.testing.subject import Subject


@check()
def no_order_of_calls_changes_a_weight(subject: Subject) -> None:
    """Weights stay as they are in whatever order they are quantized, moved, copied, saved and multiplied."""
    if find_spec("hypothesis") is None:
        raise NotApplicable("hypothesis is not installed: pip install 'modq[testing]'")
    from modq.testing.machine import run_machine  # an optional package, which the other checks do without

    run_machine(subject)
