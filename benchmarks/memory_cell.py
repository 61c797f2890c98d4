"""Makes a checkpoint of random codes, or trains on it: `python -m benchmarks.memory_cell SETTINGS`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import modq
from benchmarks import cell
from benchmarks.lora import LINEARS, add_lora
from modq.api import describe_weight
from modq.estimate import Training, estimate
from modq.folders import write_json
from modq.hf.config import ModqConfig, resolve
from modq.linear import QuantLinear
from modq.model import Recipe, quantized_layers
from modq.op import stored
from modq.options import build_options
from modq.registry import describe_backend
from modq.spec import Calibration, QuantizedWeight, TensorSpec
from modq.train.memory import peak_rss

SAMPLE = 256
"""Rows and columns of the real weight whose scales the random layers take theirs from."""


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `settings["job"]` says; return the figures."""
    torch.set_num_threads(settings["threads"])
    found = {"prepare": prepare, "step": train_step}[settings["job"]](settings)
    return {**found, "versions": cell.versions_of(["modq"])}


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint unless an earlier run left it, and predict the step from its config."""
    folder = Path(settings["checkpoint"])
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_checkpoint(unfinished, settings)
        unfinished.rename(folder)
    training = Training(batch=1, length=settings["tokens"], target_modules=tuple(LINEARS), trainer=False)
    predicted = estimate(str(folder), training, dtype=settings["dtype"])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"checkpoint_bytes": size, "estimate_bytes": predicted.total, "parts": predicted.parts}


def train_step(settings: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and train for a step; the peak is that of this process since its start."""
    started = time.perf_counter()
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], dtype=dtype)
    loaded, load_peak = time.perf_counter(), peak_rss()
    model = add_lora(model, seed=0, checkpointing=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(settings["vocabulary"], (1, settings["tokens"]), generator=generator)
    before = peak_rss()
    begun = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return {
        "peak_bytes": peak_rss(),
        "load_peak_bytes": load_peak,
        "before_step_bytes": before,
        "load_seconds": loaded - started,
        "step_seconds": time.perf_counter() - begun,
        "loss": loss.item(),
        "layers_quantized": sum(1 for _ in quantized_layers(model)),
    }


# The checkpoint


def write_checkpoint(folder: Path, settings: dict[str, Any]) -> None:
    """Write a Llama with random codes, a decoder layer a shard."""
    folder.mkdir(parents=True)
    model = empty_model(settings)
    sample = quantized_sample(settings["backend"], settings["options"])
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            options = build_options(settings["backend"], settings["options"])
            layer = QuantLinear.like(linear, settings["backend"], options)
            layer.allocate(sample.format_version, sample.meta)
            model.set_submodule(name, layer)
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    for number, module in enumerate([*model.model.layers, model]):
        prefix = f"model.layers.{number}." if number < settings["layers"] else ""
        tensors = {prefix + name: tensor for name, tensor in _contents(module, sample, generator, prefix)}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )
    config = ModqConfig.of(Recipe(settings["backend"], settings["options"]))
    config.resolved = resolve(quantized_layers(model))
    model.config.quantization_config = config
    model.config.save_pretrained(folder)


def empty_model(settings: dict[str, Any]) -> Any:
    """Return the dense model on meta."""
    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def quantized_sample(backend: str, options: dict[str, Any]) -> QuantizedWeight:
    """Quantize a small Gaussian weight: its meta holds for all layers, its scales are of the right size."""
    weight = 0.02 * torch.randn(SAMPLE, SAMPLE, generator=torch.Generator().manual_seed(0))
    kind = describe_backend(backend).calibration
    known = None if kind == "none" else Calibration(hessian=torch.eye(SAMPLE), samples=SAMPLE)
    return modq.quantize(weight, backend, known, **options)


def _contents(
    module: nn.Module, sample: QuantizedWeight, generator: torch.Generator, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a decoder layer; of the model (no prefix), those outside its layers."""
    packed: dict[str, Tensor] = {}
    if prefix:
        for name, layer in quantized_layers(module):
            packed |= {f"{name}.{key}": tensor for key, tensor in random_packed(layer, sample, generator)}
    yield from packed.items()
    for name, parameter in module.named_parameters():
        if name not in packed and (prefix or not name.startswith("model.layers.")):
            content = torch.ones(parameter.shape, dtype=parameter.dtype)
            yield name, content if parameter.dim() == 1 else content.normal_(0, 0.02, generator=generator)


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
    cell.run(main)
