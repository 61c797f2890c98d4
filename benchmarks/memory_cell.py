"""Makes a checkpoint of random codes, or trains on it: `python -m benchmarks.memory_cell SETTINGS`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import cell
from benchmarks.lora import LINEARS, add_lora
from benchmarks.random_llama import write_checkpoint
from modq.estimate import Training, estimate
from modq.model import quantized_layers
from modq.train.memory import peak_rss


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `settings["job"]` says; return the figures."""
    torch.set_num_threads(settings["threads"])
    found = {"prepare": prepare, "step": train_step}[settings["job"]](settings)
    return {**found, "versions": cell.versions_of(["modq"])}


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint unless an earlier run left it, and predict the step from its config."""
    folder = Path(settings["checkpoint"])
    cell.write_once(folder, lambda unfinished: write_checkpoint(unfinished, settings))
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


if __name__ == "__main__":
    cell.run(main)
