"""The demo's model: SmolLM2-135M-Instruct, converted once to safetensors with its channels rescaled.

The only copy inside a registry package is a GGUF file in Q4_1: every linear already lies on a 4-bit grid of
blocks of 32 along its inputs. On such a model a 4-bit asymmetric quantizer with groups of 32 has an error of
exactly zero, and any figure of quality is flattery. So neighbouring layers trade factors that cancel in the
function but not on the grid. With log-normal vectors s, s', t, u per layer:

    input norm  · s      q, k, v: columns / s           RMSNorm scales a channel, the next linears read it
    second norm · s'     gate, up: columns / s'
    up: rows · t         down: columns / t              down(act(gate x) · up x): up enters linearly
    v: rows · u          o: columns / u                 attention mixes positions, not channels; a
                                                        key-value head's u repeats for its query heads

The logits stay equal to about 1e-6 relative, and rounding then costs what it costs on a model that was never
quantized, or nearly so: much of the 16-level structure survives, which is why no 4-bit ranking rests on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modq.demo.packages import INSTALL, MODEL_PACKAGE, MissingPackageError, package_files
from modq.folders import OutputError, new_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SIGMA = 0.15
"""The spread of the log-normal factors: enough to leave the grid, too little to strain any float format."""

SEED = 0
FOLDER = "smollm2-135m-instruct-rescaled-1"
"""The name in the cache; its number goes up with any change to the conversion."""


def cache_folder() -> Path:
    """Return where modq keeps what it can make again: $MODQ_CACHE, else modq/ in the XDG cache."""
    if chosen := os.environ.get("MODQ_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modq"


def demo_model() -> Path:
    """Return the folder of the converted model, converting it first if it is not in the cache."""
    folder = cache_folder() / FOLDER
    if not folder.is_dir():
        _convert(package_files(MODEL_PACKAGE, ".gguf")[0], folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer; a killed run leaves nothing under the name that is looked for."""
    try:
        with new_folder(folder) as unfinished:
            model, tokenizer = read_gguf(gguf)
            rescale_channels(model, torch.Generator().manual_seed(SEED))
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except OutputError:
        if not folder.is_dir():  # otherwise another process made the same folder first
            raise


def read_gguf(gguf: Path) -> tuple[LlamaForCausalLM, Any]:
    """Load a GGUF file as an ordinary dense float32 model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf as _  # noqa: F401  # transformers says what is missing in a paragraph, this in one line
    except ImportError:
        raise MissingPackageError(
            f"reading the demo's model needs gguf: pip install gguf; and {INSTALL}"
        ) from None
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # It is dense now; transformers still calls it quantized and would refuse to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(**where)


@torch.no_grad()
def rescale_channels(
    model: Any,
    generator: torch.Generator,
    sigma: float = SIGMA,
    *,
    second_norm: str = "post_attention_layernorm",
    norm_offset: float = 0.0,
) -> None:
    """Rescale the channels of a Llama without biases in place, keeping the function that it computes.

    Args:
        model: a Llama, or one whose layers differ from its in the two points below only.
        generator: draws the factors.
        sigma: their spread.
        second_norm: the norm that the MLP reads.
        norm_offset: what a norm adds to its weight before it scales.
    """
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads

    def factors(count: int) -> Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        _trade(layer.input_layernorm, norm_offset, readers, factors)
        _trade(layer.get_submodule(second_norm), norm_offset, (mlp.gate_proj, mlp.up_proj), factors)
        t = factors(mlp.up_proj.out_features)
        _scale(mlp.up_proj, t[:, None])
        _scale(mlp.down_proj, 1 / t)
        u = factors(attention.v_proj.out_features)
        per_query_head = u.view(-1, 1, attention.head_dim).expand(-1, repeats, -1)  # [kv, repeats, head]
        _scale(attention.v_proj, u[:, None])
        _scale(attention.o_proj, 1 / per_query_head.reshape(-1))


def _trade(norm: Any, offset: float, readers: tuple[Any, ...], factors: Any) -> None:
    """Scale a norm's channels up and the columns that read them down."""
    s = factors(norm.weight.numel())
    norm.weight.copy_((norm.weight.double() + offset) * s - offset)
    for linear in readers:
        _scale(linear, 1 / s)


def _scale(module: Any, factor: Tensor) -> None:
    """Multiply in float64 and round once, so that four trades cost no more than one rounding each."""
    module.weight.copy_(module.weight.double() * factor)
