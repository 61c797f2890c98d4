"""The quipsharp backend keeps every promise of the kit: at each width, and with these options."""

from __future__ import annotations

from modq.testing import QuantizerConformance


class TestConformance(QuantizerConformance):
    backend = "quipsharp"
    variants = ({"codebook": "uniform", "rotation": "kronecker"},)
