"""Makes a random checkpoint, or generates from it: `python -m benchmarks.generate_cell SETTINGS`."""

from __future__ import annotations

import gc
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import BaseStreamer

from benchmarks import cell
from benchmarks.cell import write_once
from benchmarks.random_llama import DENSE, write_checkpoint
from benchmarks.systems import SYSTEMS
from modq.train.memory import peak_rss, reset_peak

WARM_TOKENS = 4
"""Written before the clock runs: they touch the weights, make the threads, fill the caches."""


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `settings["job"]` says; return the figures."""
    torch.set_num_threads(settings["threads"])
    assert transformers.LlamaForCausalLM  # imported now: a load's time is not an import's
    found = {"prepare": prepare, "generate": load_and_generate}[settings["job"]](settings)
    return {**found, "versions": cell.versions_of(settings["packages"])}


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint unless an earlier run left it."""
    folder = Path(settings["checkpoint"])
    write_once(folder, lambda unfinished: _write(unfinished, settings))
    return {"checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def _write(folder: Path, settings: dict[str, Any]) -> None:
    if settings["system"] != "bitsandbytes":
        write_checkpoint(folder, settings)
        return
    source = Path(settings["model"])
    write_once(source, lambda unfinished: write_checkpoint(unfinished, {**settings, **DENSE}))
    SYSTEMS["bitsandbytes"].prepare(source, folder, _dtype(settings))


def load_and_generate(settings: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and generate; the peak is counted anew after loading."""
    started = time.perf_counter()
    load = SYSTEMS["dense"].load  # the checkpoint's config tells who quantized it
    model = load(Path(settings["checkpoint"]), _dtype(settings)).eval()
    load_seconds, load_peak = time.perf_counter() - started, peak_rss()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(settings["vocabulary"], (1, settings["prompt_tokens"]), generator=generator)
    gc.collect()
    reset_peak()
    generate(model, prompt, WARM_TOKENS)
    written, moments = generate(model, prompt, settings["new_tokens"])
    first, *others = [later - earlier for earlier, later in pairwise(moments)]
    return {
        "tokens_per_second": [1 / seconds for seconds in others],
        "first_token_seconds": first,
        "tokens": written,
        "peak_bytes": peak_rss(),
        "load_seconds": load_seconds,
        "load_peak_bytes": load_peak,
    }


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers ships no types
    """Notes when the prompt and each token comes by: `generate` hands them over as they are known."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Take the end of it."""


def generate(model: Any, prompt: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Write exactly `count` tokens after (1, tokens), each the likeliest.

    Returns:
        The tokens; the moment before the first and the one after each, in seconds.
    """
    clock = _Clock()
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        use_cache=True,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
        streamer=clock,
    )
    return ids[0, prompt.shape[1] :].tolist(), clock.moments


def _dtype(settings: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, settings["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


if __name__ == "__main__":
    cell.run(main)
