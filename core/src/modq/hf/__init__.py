"""The transformers side: `quantization_config=ModqConfig(...)`, quantize-on-load, save and reload."""

import modq.hf.card  # noqa: F401  # what is pushed to the hub gets a card
from modq.hf.config import ModqConfig
from modq.hf.quantizer import ModqHfQuantizer

__all__ = ["ModqConfig", "ModqHfQuantizer"]
