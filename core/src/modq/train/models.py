"""Loads and measures transformers models for the commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modq.errors import CheckpointError, ModqError, OptionError
from modq.model import quantized_layers
from modq.sharing import packed_bytes
from modq.train.processes import local_rank, process_count


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model holds, and what it would hold with no layer quantized, in bytes."""

    dense: int
    held: int
    quantized_layers: int
    bits_per_weight: float | None  # of the quantized layers, scales and all; None if there is none


def measure(model: Any) -> Sizes:
    """Measure a model in memory. Tied weights count once."""
    layers = dict(quantized_layers(model))
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    packed = round(sum(packed_bytes(layers).values()))
    would_be = sum(
        layer.out_features * layer.in_features * layer.compute_dtype.itemsize for layer in layers.values()
    )
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Sizes(held - packed + would_be, held, len(layers), 8 * packed / weights if weights else None)


def load_model(
    source: str,
    *,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    dtype: str = "auto",
) -> Any:
    """Load a causal language model, quantizing it on the way if `backend` is given.

    Args:
        source: a folder, or the name of a model on the hub.
        backend: the name of an installed quantizer; None loads the checkpoint as it is, quantized or not.
        options: the backend's options.
        layers: overrides by regex, as in `Recipe`.
        dtype: of what is not quantized: "auto" (as stored), "bfloat16", "float16" or "float32".

    Raises:
        CheckpointError: if the model is of a kind that the commands do not take, a file is damaged, or
            tensors are missing or of another shape: transformers would fill those with random numbers.
        BackendError, OptionError: as `modq.ModqConfig`.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    if backend is not None:
        refuse_quantized(source, config)
    wanted: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }
    if backend is not None:
        from modq.hf.config import ModqConfig

        wanted["quantization_config"] = ModqConfig(backend, layers=layers, **(options or {}))
    if torch.cuda.is_available():
        # Data parallel: each process has the whole model on an accelerator of its own
        wanted["device_map"] = "auto" if process_count() == 1 else {"": local_rank()}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(source, **wanted)
    except SafetensorError as error:
        raise CheckpointError(
            f"{_damaged_file(source)} cannot be read: {error}; is it copied or downloaded whole?"
        ) from error
    _refuse_gaps(source, found)
    return model


def _damaged_file(source: str) -> str:
    """Name the file of a model whose header cannot be read; the model itself if it is none of a folder's."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            return repr(str(path))
    return repr(source)


def _refuse_gaps(source: str, found: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are not all those that its config asks for."""
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{source!r}: {name} is {tuple(stored)}, its config expects {tuple(expected)}: "
            "config and tensors disagree"
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{source!r} has no tensor {missing[0]} ({len(missing)} missing in all); is a shard missing, "
            "or is it another kind of model?"
        )


def read_config(source: str, *, encoder_decoder: bool = False) -> Any:
    """Read a model's config, refusing early what would fail late or in a paragraph.

    Encoder-decoders are refused, too, unless `encoder_decoder`.
    """
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
    if config.is_encoder_decoder and not encoder_decoder:
        kind = config.model_type
        raise CheckpointError(
            f"{source!r} is an encoder-decoder ({kind}), expected a causal model; see README for those"
        )
    return config


def within_context(source: str, config: Any, tokens: int | None, default: int, option: str) -> int:
    """Return how many tokens to give a model at once: `tokens`, or `default` or its context if that is less.

    Raises:
        OptionError: if `tokens`, which the user gave as `option`, is more than the model's context.
    """
    context: int | None = getattr(config, "max_position_embeddings", None)
    if tokens is None:
        return min(default, context or default)
    if context is not None and tokens > context:
        raise OptionError(
            f"{option} {tokens} is longer than the context of {source!r}, {context} tokens; give at most that"
        )
    return tokens


def refuse_quantized(source: str, config: Any) -> None:
    """Refuse to quantize what is quantized already."""
    from modq.hf.foreign import stored_config

    stored = stored_config(config)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored.quant_method
        raise CheckpointError(
            f"{source!r} is quantized already (quant_method {method!r}); leave --backend out"
        )


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: if it cannot be loaded, or has no end-of-text token, which training and padding need.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the parser of tokenizer.json raises nothing narrower
        raise CheckpointError(
            f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}; "
            "is a file missing or damaged?"
        ) from error
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # what ends a text for BERT and its kin
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"the tokenizer of {source!r} has no eos_token; set one in its tokenizer_config.json"
        )
    return tokenizer


def add_adapter(model: Any, adapter: str) -> Any:
    """Put a saved adapter on a model, for inference; it is a folder, or a name on the hub.

    Raises:
        CheckpointError: if it is none, is damaged, does not fit the model, or belongs to another base.
    """
    from peft import PeftConfig, PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        try:
            PeftConfig.from_pretrained(adapter)
        except (ValueError, OSError):
            raise CheckpointError(
                f"{adapter!r} holds no adapter_config.json; expected the folder of a saved adapter, or its "
                "name on the hub"
            ) from None
    try:
        return PeftModel.from_pretrained(model, adapter)
    except ModqError:
        raise
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"adapter {adapter!r} cannot be put on this model: {_first_line(error)}; "
            "is a file damaged, or was it trained on another model?"
        ) from error


def _first_line(error: Exception) -> str:
    """Say what an error of another package is about: the rest is advice, or the same for other tensors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {shown.rstrip('.')}"
