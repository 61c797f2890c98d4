"""All that modq asks of a quantizer, one test for each promise."""

from modq.testing import QuantizerConformance


class TestConformance(QuantizerConformance):
    """The defaults, and more columns kept."""

    backend = "outlier-int8"
    variants = ({"kept": 0.1},)
