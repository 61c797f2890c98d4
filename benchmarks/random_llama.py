"""Llamas that were never trained: Gaussian weights, or random codes of a quantizer, a decoder layer a shard.

    python -m benchmarks.random_llama --shape tinyllama --out DIR

writes a dense one in bfloat16, without a tokenizer. What is measured on them is time and memory, for these do
not depend on what a model knows; no dense weight of a quantized one ever exists.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import modq
from benchmarks.cell import write_once
from modq.api import describe_weight
from modq.folders import write_json
from modq.hf.config import ModqConfig, resolve
from modq.linear import QuantLinear
from modq.model import Recipe, quantized_layers
from modq.op import stored
from modq.options import build_options
from modq.registry import describe_backend
from modq.spec import Calibration, QuantizedWeight, TensorSpec

SAMPLE = 256
"""Rows and columns of the real weight whose scales the random layers take theirs from."""

SPREAD = 0.02
"""The standard deviation of a weight."""

DENSE: Mapping[str, Any] = {"backend": None, "options": {}}
"""The settings of a model that is not quantized, on top of a shape's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int | None = None  # as many as heads
    vocabulary: int = 32000


SHAPES: dict[str, Shape] = {
    "tiny": Shape(256, 512, 2, 4, 2, vocabulary=100),  # to try things out
    "tinyllama": Shape(2048, 5632, 22, 32, 4),
    "7b": Shape(4096, 11008, 32, 32),
    "13b": Shape(5120, 13824, 40, 40),
    "30b": Shape(6656, 17920, 60, 52),
    "65b": Shape(8192, 22016, 80, 64),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dense model that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_llama", description="Write a random Llama"
    )
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama", help="default: tinyllama")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    given = parser.parse_args(arguments)
    if given.out.exists():
        parser.error(f"{given.out} exists already")
    settings = {**asdict(SHAPES[given.shape]), **DENSE}
    write_once(given.out, lambda folder: write_checkpoint(folder, settings))


def write_checkpoint(folder: Path, settings: dict[str, Any]) -> None:
    """Write a Llama with random codes, or of Gaussian weights where the settings' backend is None.

    Args:
        folder: a new one.
        settings: the fields of a Shape, a backend and its options.
    """
    folder.mkdir(parents=True)
    model, sample = empty_model(settings), None
    if settings["backend"] is not None:
        sample = quantized_sample(settings["backend"], settings["options"])
        _quantize(model, settings, sample)
    _write_shards(folder, model, sample)
    if sample is not None:
        config = ModqConfig.of(Recipe(settings["backend"], settings["options"]))
        config.resolved = resolve(quantized_layers(model))
        model.config.quantization_config = config
    model.config.save_pretrained(folder)


def _quantize(model: Any, settings: dict[str, Any], sample: QuantizedWeight) -> None:
    """Put an empty quantized layer in the place of every linear but the head."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            options = build_options(settings["backend"], settings["options"])
            layer = QuantLinear.like(linear, settings["backend"], options)
            layer.allocate(sample.format_version, sample.meta)
            model.set_submodule(name, layer)


def _write_shards(folder: Path, model: Any, sample: QuantizedWeight | None) -> None:
    """Draw and save a shard after the other: the decoder layers, then what is outside of them."""
    generator, total = torch.Generator().manual_seed(0), 0
    places: dict[str, str] = {}
    layers = model.model.layers
    for number, module in enumerate([*layers, model]):
        prefix = f"model.layers.{number}." if number < len(layers) else ""
        tensors = {prefix + name: tensor for name, tensor in _contents(module, sample, generator, prefix)}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )


def empty_model(settings: dict[str, Any]) -> Any:
    """Return the dense model on meta."""
    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def quantized_sample(backend: str, options: dict[str, Any]) -> QuantizedWeight:
    """Quantize a small Gaussian weight: its meta holds for all layers, its scales are of the right size."""
    weight = SPREAD * torch.randn(SAMPLE, SAMPLE, generator=torch.Generator().manual_seed(0))
    kind = describe_backend(backend).calibration
    known = None if kind == "none" else Calibration(hessian=torch.eye(SAMPLE), samples=SAMPLE)
    return modq.quantize(weight, backend, known, **options)


def _contents(
    module: nn.Module, sample: QuantizedWeight | None, generator: torch.Generator, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a decoder layer; of the model (no prefix), those outside its layers."""
    packed: dict[str, Tensor] = {}
    if prefix and sample is not None:
        for name, layer in quantized_layers(module):
            packed |= {f"{name}.{key}": tensor for key, tensor in random_packed(layer, sample, generator)}
    yield from packed.items()
    for name, parameter in module.named_parameters():
        if name not in packed and (prefix or not name.startswith("model.layers.")):
            content = torch.ones(parameter.shape, dtype=parameter.dtype)
            yield name, content if parameter.dim() == 1 else content.normal_(0, SPREAD, generator=generator)


def random_packed(
    layer: QuantLinear, sample: QuantizedWeight, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of the described shapes: any bytes for codes, the sample's scales for floats."""
    specs = describe_weight((layer.out_features, layer.in_features), layer.backend, layer.options)
    random = {name: _random(spec, sample.tensors[name], generator) for name, spec in specs.items()}
    yield from stored(random).items()


def _random(spec: TensorSpec, like: Tensor, generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        chosen = torch.randint(like.numel(), spec.shape, generator=generator)
        return like.reshape(-1)[chosen].to(spec.dtype)
    nbytes = torch.Size(spec.shape).numel() * spec.dtype.itemsize
    content = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)
    return content.view(spec.dtype).view(spec.shape)


if __name__ == "__main__":
    main()
