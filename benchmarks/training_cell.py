"""Measures one system in this process: `python -m benchmarks.training_cell SETTINGS`, JSON in and out."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import cell
from benchmarks.cell import write_once
from benchmarks.lora import add_lora, train, training_windows
from benchmarks.systems import SYSTEMS
from modq.train.memory import peak_rss, reset_peak


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `settings["job"]` says; return the figures."""
    jobs = {"prepare": prepare, "quantize": quantize_on_load, "train": load_and_train}
    torch.set_num_threads(settings["threads"])
    assert transformers.LlamaForCausalLM  # imported now: a load's time is not an import's
    return {**jobs[settings["job"]](settings), "versions": cell.versions(settings["system"])}


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint that the training loads, unless an earlier run left it."""
    folder, system = Path(settings["checkpoint"]), SYSTEMS[settings["system"]]
    took = write_once(
        folder,
        lambda unfinished: system.prepare(Path(settings["model"]), unfinished, _dtype(settings)),
    )
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".pt"))
    return {**({} if took is None else {"prepare_seconds": took}), "checkpoint_bytes": size}


def quantize_on_load(settings: dict[str, Any]) -> dict[str, Any]:
    """Load the dense checkpoint, quantizing it."""
    quantize = SYSTEMS[settings["system"]].quantize
    if quantize is None:
        raise SystemExit(f"{settings['system']} does not quantize while loading")
    _, seconds, peak = _timed(lambda: quantize(Path(settings["model"]), _dtype(settings)))
    return {"quantize_seconds": seconds, "quantize_peak_bytes": peak}


def load_and_train(settings: dict[str, Any]) -> dict[str, Any]:
    """Load the prepared checkpoint and train a few steps; the first of them warms up and is not timed."""
    load, dtype = SYSTEMS[settings["system"]].load, _dtype(settings)
    model, load_seconds, load_peak = _timed(lambda: load(Path(settings["checkpoint"]), dtype))
    model = add_lora(model, settings["seed"], checkpointing=settings["checkpointing"])
    batch, tokens, warm = settings["batch"], settings["tokens"], settings["warm_steps"]
    steps = warm + settings["steps"]
    windows = training_windows(Path(settings["model"]), steps * batch, tokens)
    batches = windows.view(steps, batch, tokens).unbind()
    saved: list[int] = []

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        if saved:
            return _loss(model, ids)
        with _count_saved(model, saved):  # in the first step only, which is not timed
            return _loss(model, ids)

    gc.collect()
    reset_peak()
    before = peak_rss()
    done = train(model, batches, loss_of, settings["learning_rate"])
    return {
        "tokens_per_second": [batch * tokens / seconds for seconds in done.seconds[warm:]],
        "losses": done.losses,
        "peak_bytes": peak_rss(),
        "before_training_bytes": before,
        "saved_for_backward_bytes": saved[0],
        "load_seconds": load_seconds,
        "load_peak_bytes": load_peak,
    }


def _dtype(settings: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, settings["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _timed(load: Any) -> tuple[Any, float, int]:
    gc.collect()
    reset_peak()
    started = time.perf_counter()
    model = load()
    return model, time.perf_counter() - started, peak_rss()


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    assert isinstance(loss, Tensor)
    return loss


@contextmanager
def _count_saved(model: Any, saved: list[int]) -> Iterator[None]:
    """Append how many bytes autograd keeps for the backward pass, the model's own tensors not counted.

    What a library hides from autograd (attributes of its context) is not seen here; the peak memory has it
    all.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    saved.append(sum(found.values()))


if __name__ == "__main__":
    cell.run(main)
