"""Prepares or scores one system of the suite `quality`: `python -m benchmarks.quality_cell SETTINGS`.

A causal language model is scored by its perplexity (modq.train.perplexity). Any other model is scored by
its embeddings, the mean of the last hidden states over a window: how far each is from the dense model's,
relative to that one's length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import cell
from benchmarks.quality_systems import SYSTEMS, calibration_windows, load_dense
from modq.demo.texts import split_speeches, token_windows
from modq.train.memory import peak_rss
from modq.train.models import load_tokenizer, measure
from modq.train.perplexity import score

FACTS = "prepared.json"
GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `settings["job"]` says; return the figures."""
    torch.set_num_threads(settings["threads"])
    found = prepare(settings) if settings["job"] == "prepare" else score_checkpoint(settings)
    return {**found, "versions": cell.versions(settings["system"])}


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint unless an earlier run left it; its peak memory is kept beside its files."""
    folder, model = Path(settings["checkpoint"]), Path(settings["model"])

    def write(unfinished: Path) -> None:
        unfinished.mkdir(parents=True)
        windows = calibration_windows(model, settings["calibration_windows"])
        SYSTEMS[settings["system"]].prepare(model, unfinished, windows)
        facts = {"prepare_peak_bytes": peak_rss()}  # the suite `layers` has the time
        (unfinished / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    cell.write_once(folder, write)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    assert isinstance(facts, dict)
    return facts


@torch.no_grad()
def score_checkpoint(settings: dict[str, Any]) -> dict[str, Any]:
    """Score one system on the held-out windows."""
    dense, name = Path(settings["model"]), settings["system"]
    folder = dense if name == "dense" else Path(settings["checkpoint"])
    model = SYSTEMS[name].load(folder, torch.float32).eval()
    tokens = settings["tokens"]
    windows = token_windows(
        load_tokenizer(str(dense)), split_speeches().held_out, tokens, settings["windows"] * tokens
    )
    started = time.perf_counter()
    if hasattr(model, "lm_head") or model.get_output_embeddings() is not None:
        scores = {"kind": "nll", "scores": list(score(model, windows).window_nll)}
    else:
        reference = list(embeddings(load_dense(dense).eval(), windows))
        pairs = zip(embeddings(model, windows), reference, strict=True)
        apart = [float((ours - exact).norm() / exact.norm()) for ours, exact in pairs]
        scores = {"kind": "embedding error", "scores": apart}
    seconds = time.perf_counter() - started
    return {"bits_per_weight": bits_per_weight(model, folder), "score_seconds": seconds, **scores}


def embeddings(model: Any, windows: Tensor) -> Iterator[Tensor]:
    """Yield each window's embedding."""
    for window in windows.split(1):
        yield model(input_ids=window).last_hidden_state.mean(dim=1)[0]


def bits_per_weight(model: Any, folder: Path) -> float | None:
    """Return what the quantized linears take, scales and all; None where they are not held quantized."""
    held = measure(model).bits_per_weight
    if held is not None:
        return held
    stated = getattr(model.config, "bits_per_weight", None)  # of what is kept dequantized
    return stated if stated is not None else _gptq_bits(folder)


def _gptq_bits(folder: Path) -> float | None:
    held = weights = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a mapping
                layer, _, tensor = key.rpartition(".")
                if tensor in GPTQ_TENSORS:
                    part = opened.get_tensor(key)
                    held += 8 * part.numel() * part.element_size()
                if tensor == "g_idx":
                    weights += opened.get_slice(key).get_shape()[0] * _outputs(opened, layer)
    return held / weights if weights else None


def _outputs(opened: Any, layer: str) -> int:
    return int(opened.get_slice(f"{layer}.scales").get_shape()[1])


if __name__ == "__main__":
    cell.run(main)
