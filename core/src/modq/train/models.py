"""Loads, measures and quantizes transformers models for the commands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modq.errors import CheckpointError
from modq.model import quantized_layers
from modq.train.folders import new_folder


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model holds, and what it would hold with no layer quantized, in bytes."""

    dense: int
    held: int
    quantized_layers: int
    bits_per_weight: float | None  # of the quantized layers, scales and all; None if there is none


def measure(model: Any) -> Sizes:
    """Measure a model in memory. Tied weights count once."""
    layers = [(layer.quantized_weight, layer.compute_dtype.itemsize) for _, layer in quantized_layers(model)]
    weights = sum(qweight.shape[0] * qweight.shape[1] for qweight, _ in layers)
    packed = sum(qweight.nbytes for qweight, _ in layers)
    would_be = sum(qweight.shape[0] * qweight.shape[1] * itemsize for qweight, itemsize in layers)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Sizes(held - packed + would_be, held, len(layers), 8 * packed / weights if weights else None)


def load_model(
    source: str, *, backend: str | None = None, options: Mapping[str, Any] | None = None, dtype: str = "auto"
) -> Any:
    """Load a causal language model, quantizing it on the way if `backend` is given.

    Args:
        source: a folder, or the name of a model on the hub.
        backend: the name of an installed quantizer; None loads the checkpoint as it is, quantized or not.
        options: the backend's options.
        dtype: of what is not quantized: "auto" (as stored), "bfloat16", "float16" or "float32".

    Raises:
        CheckpointError: if the model is of a kind that the commands do not take.
        BackendError, OptionError: as `modq.ModqConfig`.
    """
    from transformers import AutoModelForCausalLM

    _refuse_twice(source, read_config(source), backend)
    wanted: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if backend is not None:
        from modq.hf.config import ModqConfig

        wanted["quantization_config"] = ModqConfig(backend, **(options or {}))
    if torch.cuda.is_available():
        wanted["device_map"] = "auto"
    return AutoModelForCausalLM.from_pretrained(source, **wanted)


def read_config(source: str) -> Any:
    """Read a model's config, refusing early what would fail late or in a paragraph."""
    from transformers import AutoConfig

    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise CheckpointError(
            f"{source!r} is no folder; expected a folder with a model, or its name on the hub"
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except ValueError as error:
        raise CheckpointError(f"{source!r}: {error}") from error
    except OSError as error:
        # transformers adds a paragraph on access tokens
        raise CheckpointError(f"{source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if config.is_encoder_decoder:
        kind = config.model_type
        raise CheckpointError(
            f"{source!r} is an encoder-decoder ({kind}), expected a causal model; see README for those"
        )
    return config


def _refuse_twice(source: str, config: Any, backend: str | None) -> None:
    """Refuse to quantize what is quantized already."""
    stored = getattr(config, "quantization_config", None)
    if backend is not None and stored is not None:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored.quant_method
        raise CheckpointError(
            f"{source!r} is quantized already (quant_method {method!r}); leave --backend out"
        )


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: if it has no end-of-text token, which training and padding need.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"the tokenizer of {source!r} has no eos_token; set one in its tokenizer_config.json"
        )
    return tokenizer


def add_adapter(model: Any, adapter: str) -> Any:
    """Put a saved adapter on a model, for inference."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapter!r} holds no adapter_config.json; expected the folder of a saved adapter"
        )
    return PeftModel.from_pretrained(model, adapter)


def quantize_folder(
    source: str,
    output: Path,
    *,
    backend: str,
    options: Mapping[str, Any],
    dtype: str = "auto",
    format: str | None = None,
) -> tuple[Sizes, float]:
    """Quantize a model into a new folder, tokenizer included; return its sizes and the seconds it took.

    With `format` the folder is in another package's format, see `modq.hf.foreign`.
    """
    started = time.perf_counter()
    with new_folder(output) as unfinished:
        model = load_model(source, backend=backend, options=options, dtype=dtype)
        if format is None:
            model.save_pretrained(unfinished)
        else:
            from modq.hf.foreign import save_as

            save_as(model, unfinished, format)
        load_tokenizer(source).save_pretrained(unfinished)
        sizes = measure(model)
    return sizes, time.perf_counter() - started
