"""The optq backend keeps every promise of the kit: at each width, and with these options."""

from __future__ import annotations

from modq.testing import QuantizerConformance


class TestConformance(QuantizerConformance):
    backend = "optq"
    variants = ({"bits": 4, "group_size": 32, "symmetric": False, "act_order": "full"},)
