"""Tiny random models that a backend can hold. They are made in memory: nothing is downloaded."""

from __future__ import annotations

import logging as python_logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from modq.hf.config import ModqConfig
from modq.model import dense_linears, quantize_model, quantized_layers
from modq.options import options_to_json
from modq.spec import QuantizedWeight
from modq.testing.subject import Subject, Variant, copied

VOCABULARY = 32


def token_ids(rows: int = 8, tokens: int = 12, seed: int = 0) -> Tensor:
    """Draw token ids, (rows, tokens), without touching the global generator."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def dense_llama(subject: Subject, multiple: int = 1) -> Any:
    """Make a float32 Llama of two blocks whose linears the backend can hold.

    No two dimensions that meet in a linear are equal where the backend allows it: a transposed weight does
    not go unseen. Large initial values make the logits tell one weight from another.

    Args:
        subject: the backend.
        multiple: all dimensions divide by it, too.
    """
    least = lcm(*subject.info.multiple_of, multiple)
    head, hidden, intermediate = (_at_least(size, least) for size in (16, 48, 80))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head + head % 2 * least,  # rotary angles come in pairs
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def quantized_llama(subject: Subject, variants: Sequence[Variant], multiple: int = 1) -> Any:
    """Quantize it as users do: while it loads, or from data if the backend cannot do without.

    Args:
        subject: the backend.
        variants: how; its linears take turns.
        multiple: as for `dense_llama`.
    """
    model = dense_llama(subject, multiple)
    recipe: dict[str, Any] = {"layers": _by_turns(model, variants), **_options(variants[0])}
    if subject.info.calibration in ("hessian", "block"):
        return quantize_model(model, subject.backend, calibration=[token_ids(16)], **recipe).eval()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_llama(folder, ModqConfig(subject.backend, **recipe))


def load_llama(folder: Path | str, config: ModqConfig | None = None) -> Any:
    """Load a saved one."""
    given = {} if config is None else {"quantization_config": config}
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()


def logits(model: Any) -> Tensor:
    """Return what a model says to fixed tokens."""
    with torch.no_grad():
        found: Tensor = model(token_ids(2, seed=1)).logits
    return found


def held(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return copies of the quantized weights of a model, by the layer's name."""
    return {name: copied(layer.quantized_weight) for name, layer in quantized_layers(model)}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' warnings and progress bars away: pytest may make errors of warnings."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), python_logging.root.manager.disable
    logging.disable_progress_bar()
    python_logging.disable(python_logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        python_logging.disable(level)
        if bars:
            logging.enable_progress_bar()


def _by_turns(model: nn.Module, variants: Sequence[Variant]) -> Mapping[str, Mapping[str, Any]]:
    """Give each linear inside the blocks the options of the next variant."""
    names = [name for name, _ in dense_linears(model) if name != "lm_head"]
    turns = {name: variants[number % len(variants)] for number, name in enumerate(names)}
    return {f"^{re.escape(name)}$": _options(variant) for name, variant in turns.items()}


def _options(variant: Variant) -> dict[str, Any]:
    return options_to_json(variant.options)


def _at_least(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
