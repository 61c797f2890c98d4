"""The transformers side: `quantization_config=ModqConfig(...)`, quantize-on-load, save and reload."""

from modq.hf.config import ModqConfig
from modq.hf.quantizer import ModqHfQuantizer

__all__ = ["ModqConfig", "ModqHfQuantizer"]
