"""The hqq backend keeps every promise of the kit: at each width, and with these options."""

from __future__ import annotations

from modq.testing import QuantizerConformance


class TestConformance(QuantizerConformance):
    backend = "hqq"
    variants = ({"bits": 4, "axis": 0},)
