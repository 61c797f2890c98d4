"""The systems that are compared: how each one quantizes a model, and how it loads what it quantized.

Everything after loading (adapter, loss, optimizer) is the same code for all of them: see lora.py. Each
library is imported in its own functions, because each cell runs in an environment that holds only the one
it measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

GROUP = 64
"""Weights that share a scale: the default of every 4-bit library here, and it divides the model's sizes."""

CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 16, 256

Load = Callable[[Path, torch.dtype], Any]
Told = TypeVar("Told")
Prepare = Callable[[Path, Path, torch.dtype], None]


@dataclass(frozen=True, slots=True)
class System(Generic[Told]):
    """A way to hold the frozen base.

    Attributes:
        setting: what it was asked for, in words for the table.
        prepare: writes the checkpoint that `load` reads: (the dense model's folder, the new one, what its
            suite decides: the dtype here, the calibration windows in `quality_systems`).
        load: loads that checkpoint, as training does.
        quantize: loads the dense model's folder, quantizing it; None where that takes a calibration.
        peer: the name of its environment; None is the project's own.
        packages: whose versions the results state.
    """

    setting: str
    prepare: Callable[[Path, Path, Told], None]
    load: Load
    quantize: Load | None = None
    peer: str | None = None
    packages: tuple[str, ...] = ()


def _from_pretrained(folder: Path, dtype: torch.dtype, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **more)


def _save_quantized_by(quantize: Load) -> Prepare:
    def prepare(dense: Path, folder: Path, dtype: torch.dtype) -> None:
        quantize(dense, dtype).save_pretrained(folder)

    return prepare


def _modq(dense: Path, dtype: torch.dtype) -> Any:
    from modq import ModqConfig

    config = ModqConfig("nf4", block_size=GROUP, double_quant=True)
    return _from_pretrained(dense, dtype, quantization_config=config)


def _bitsandbytes(dense: Path, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # its block size is 64
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return _from_pretrained(dense, dtype, quantization_config=config)


def _hqq(dense: Path, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = _from_pretrained(dense, dtype)
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
    return model


def _prepare_hqq(dense: Path, folder: Path, dtype: torch.dtype) -> None:
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.save_quantized(_hqq(dense, dtype), str(folder))


def _load_hqq(folder: Path, dtype: torch.dtype) -> Any:
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")
    model.tie_weights()  # it loads the head apart from the embeddings
    return model


def quantize_with_gptqmodel(
    dense: Path, folder: Path, windows: Tensor, dtype: torch.dtype, **config: Any
) -> None:
    """Write what GPTQModel makes of a model from (windows, tokens)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(dense), QuantizeConfig(group_size=GROUP, **config), dtype=dtype)
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(1)]
    model.quantize(examples, batch_size=1)
    model.save(str(folder))


def _prepare_gptqmodel(dense: Path, folder: Path, dtype: torch.dtype) -> None:
    from benchmarks.lora import training_windows

    windows = training_windows(dense, CALIBRATION_WINDOWS, CALIBRATION_TOKENS)
    quantize_with_gptqmodel(dense, folder, windows, dtype, bits=4)


def load_gptqmodel(bits: int) -> Load:
    """Return what loads GPTQModel's checkpoints of this width."""

    def load(folder: Path, dtype: torch.dtype) -> Any:
        from transformers import GPTQConfig

        # its default kernel for the CPU has no gradient
        config = GPTQConfig(bits=bits, group_size=GROUP, backend="gptq_torch")
        return _from_pretrained(folder, dtype, quantization_config=config, device_map="cpu")

    return load


SYSTEMS: dict[str, System[torch.dtype]] = {
    "dense": System("not quantized", _save_quantized_by(_from_pretrained), _from_pretrained),
    "modq": System(
        "nf4, block 64, double quantization",
        _save_quantized_by(_modq),
        _from_pretrained,
        _modq,
        packages=("modq", "modq-nf4"),
    ),
    "bitsandbytes": System(
        "nf4, block 64, double quantization",
        _save_quantized_by(_bitsandbytes),
        _from_pretrained,
        _bitsandbytes,
        packages=("bitsandbytes",),
    ),
    "hqq": System("4 bits, group 64", _prepare_hqq, _load_hqq, _hqq, peer="hqq", packages=("hqq",)),
    "gptqmodel": System(
        "GPTQ, 4 bits, group 64",
        _prepare_gptqmodel,
        load_gptqmodel(4),
        peer="gptqmodel",
        packages=("gptqmodel", "optimum"),
    ),
}
