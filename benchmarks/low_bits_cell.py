"""Scores, trains and scores one base: `python -m benchmarks.low_bits_cell SETTINGS`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cell
from benchmarks.lora import add_lora, train, training_windows
from benchmarks.quality_cell import bits_per_weight
from benchmarks.quality_systems import find
from modq.demo.texts import split_speeches, token_windows
from modq.train.memory import peak_rss, reset_peak
from modq.train.models import load_tokenizer
from modq.train.perplexity import score


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the losses a window before and after, and what the training took."""
    torch.set_num_threads(settings["threads"])
    dense, folder, tokens = Path(settings["model"]), Path(settings["checkpoint"]), settings["tokens"]
    model = find(settings["system"]).load(folder, torch.float32)
    bits = bits_per_weight(model, folder)
    held_out = token_windows(
        load_tokenizer(str(dense)), split_speeches().held_out, tokens, settings["windows"] * tokens
    )
    before = score(model, held_out)
    windows = training_windows(dense, settings["steps"], tokens)
    model = add_lora(model, settings["seed"])
    gc.collect()
    reset_peak()
    loaded = peak_rss()
    done = train(model, windows.split(1), _loss, settings["learning_rate"])
    peak = peak_rss()
    return {
        "bits_per_weight": bits,
        "before": list(before.window_nll),
        "after": list(score(model, held_out).window_nll),
        "losses": done.losses,
        "trained_tokens": windows.numel(),
        "tokens_per_second": [tokens / seconds for seconds in done.seconds[1:]],
        "peak_bytes": peak,
        "before_training_bytes": loaded,
        "versions": cell.versions(settings["system"]),
    }


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    assert isinstance(loss, Tensor)
    return loss


if __name__ == "__main__":
    cell.run(main)
