"""The nf4 backend keeps every promise of the kit: at each width, and with these options."""

from __future__ import annotations

from modq.testing import QuantizerConformance


class TestConformance(QuantizerConformance):
    backend = "nf4"
    variants = ({"quant_type": "fp4"}, {"double_quant": False, "block_size": 128})
