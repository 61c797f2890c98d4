"""The checks of the kit, a module a group."""

from __future__ import annotations

from importlib import import_module

from modq.testing.check import CHECKS, Check

GROUPS = ("contract", "purity", "numerics", "state", "autograd", "ecosystem", "refusal", "stateful")


def all_checks() -> dict[str, Check]:
    """Return every check by name, group by group."""
    for group in GROUPS:
        import_module(f"{__name__}.{group}")
    return CHECKS
