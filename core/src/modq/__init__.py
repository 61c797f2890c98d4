"""modq: LoRA fine-tuning on top of any weight quantizer.

Importing this imports nothing else: a plugin's INFO, the CLI and torch's autoload all pass through here, so
each public name is fetched on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modq import errors, layouts
    from modq.api import dequantize, matmul, quantize
    from modq.hf.config import ModqConfig
    from modq.kernels.library import get_include
    from modq.linear import QuantLinear
    from modq.materialize import blockwise_matmul
    from modq.model import quantize_model
    from modq.registry import Backend, Status, list_backends, load
    from modq.spec import (
        API_VERSION,
        BlockCalibration,
        BlockResult,
        Calibration,
        Format,
        ImportedLayer,
        Provider,
        QuantizedWeight,
        QuantizerInfo,
        TensorSpec,
        hookimpl,
    )

__version__ = "0.1.0"

_HOME = {
    "API_VERSION": "modq.spec",
    "Backend": "modq.registry",
    "BlockCalibration": "modq.spec",
    "BlockResult": "modq.spec",
    "Calibration": "modq.spec",
    "Format": "modq.spec",
    "ImportedLayer": "modq.spec",
    "ModqConfig": "modq.hf.config",
    "Provider": "modq.spec",
    "QuantLinear": "modq.linear",
    "QuantizedWeight": "modq.spec",
    "QuantizerInfo": "modq.spec",
    "Status": "modq.registry",
    "TensorSpec": "modq.spec",
    "blockwise_matmul": "modq.materialize",
    "dequantize": "modq.api",
    "get_include": "modq.kernels.library",
    "hookimpl": "modq.spec",
    "list_backends": "modq.registry",
    "load": "modq.registry",
    "matmul": "modq.api",
    "quantize": "modq.api",
    "quantize_model": "modq.model",
}
_SUBMODULES = ("errors", "layouts")

__all__ = [
    "API_VERSION",
    "Backend",
    "BlockCalibration",
    "BlockResult",
    "Calibration",
    "Format",
    "ImportedLayer",
    "ModqConfig",
    "Provider",
    "QuantLinear",
    "QuantizedWeight",
    "QuantizerInfo",
    "Status",
    "TensorSpec",
    "blockwise_matmul",
    "dequantize",
    "errors",
    "get_include",
    "hookimpl",
    "layouts",
    "list_backends",
    "load",
    "matmul",
    "quantize",
    "quantize_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"modq.{name}")
    raise AttributeError(f"module 'modq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
