"""Is it the text that the demo's adapter learns? The same training on the same tokens in random order says.

    python benchmarks/demo_control.py [--json FILE]

Three models are scored on the demo's held-out windows: untrained, trained on the speeches, and trained on the
speeches with all tokens shuffled across the training set. The shuffled adapter sees the same vocabulary as
often, for as many steps, with the same seed; what it cannot see is language. Real must beat both by more than
3 standard errors, paired window by window.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor

from modq.demo.run import ENOUGH, Material, gather, load_quantized, train_on
from modq.train.perplexity import Perplexity, score
from modq.train.quiet import quiet


def shuffled(windows: Tensor, seed: int = 0) -> Tensor:
    """Permute all tokens of all windows."""
    order = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(seed))
    return windows.reshape(-1)[order].view_as(windows)


def score_trained_on(windows: Tensor, material: Material) -> Perplexity:
    """Train the demo's adapter from scratch on these windows and score it."""
    with tempfile.TemporaryDirectory(prefix="modq-control-") as folder:
        model, _ = train_on(windows, load_quantized(material.folder), material.tokenizer, Path(folder))
        return score(model, material.held_out)


def measure() -> dict[str, Perplexity]:
    """Score the three models."""
    material = gather()
    return {
        "untrained": score(load_quantized(material.folder), material.held_out),
        "shuffled": score_trained_on(shuffled(material.train), material),
        "real": score_trained_on(material.train, material),
    }


def compare(scores: dict[str, Perplexity]) -> dict[str, Any]:
    """Return the figures as JSON: each score, and by how much the real adapter beats the others."""
    gains = {name: scores["real"].gain_over(scores[name]) for name in ("untrained", "shuffled")}
    return {
        "machine": describe("transformers", "peft", "trl"),
        "scores": {name: scored.to_json() for name, scored in scores.items()},
        "real_gain_over": {
            name: {"nll": gain.mean, "stderr": gain.stderr, "stderrs": gain.stderrs_from_zero}
            for name, gain in gains.items()
        },
    }


def main() -> None:
    """Run, print a table and the JSON, and fail if the text is not what is learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    with quiet():
        scores = measure()
    figures = compare(scores)
    print(f"{'adapter':<10}  {'perplexity':>16}  {'nats a token':>18}")
    for name, scored in scores.items():
        print(f"{name:<10}  {scored.perplexity!s:>16}  {scored.nll!s:>18}")
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    weakest = min(gain["stderrs"] for gain in figures["real_gain_over"].values())
    if not weakest > ENOUGH:
        raise SystemExit(
            f"the real adapter is ahead by {weakest:.1f} standard errors, expected more than {ENOUGH:g}"
        )


if __name__ == "__main__":
    main()
