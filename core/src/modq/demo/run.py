"""The demo: quantize a real model to NF4, train LoRA on real text, score other years' text before and after.

Its parts are functions, for a benchmark trains the same way on shuffled tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modq.demo.texts import split_speeches, token_windows
from modq.demo.weights import demo_model
from modq.errors import ModqError
from modq.train.memory import peak_rss, reset_peak
from modq.train.models import Sizes, load_model, load_tokenizer, measure
from modq.train.perplexity import Perplexity, score
from modq.train.progress import Report
from modq.train.sft import LoraRecipe, Trained, train_adapter

BACKEND = "nf4"
OPTIONS = {"double_quant": True}
DTYPE = "float32"
"""Runs at a fair speed on every CPU; bfloat16 takes several times longer where the processor lacks it."""

WINDOW = 256
TRAIN_TOKENS = 8_192
HELD_OUT_TOKENS = 4_000
RECIPE = LoraRecipe(
    learning_rate=1e-3,
    epochs=1,
    batch_size=2,
    max_length=WINDOW,
    gradient_checkpointing=False,
)

PROMPT = "My fellow Americans, the state of our Union is"
SAMPLE_TOKENS = 20
MODEL_LINE = (
    "model: SmolLM2-135M-Instruct, its channels rescaled: the package's weights lie on a 4-bit grid, where 4 "
    "bits cost nothing; now they lie off it, the function unchanged (converted once, then cached)"
)

ENOUGH = 3.0
"""How many standard errors the gain must be, for the demo to call it learning."""


class DemoError(ModqError):
    """The demo ran, and did not show what it is there to show."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the demo works on: the converted model's folder, and (windows, WINDOW) token ids."""

    folder: Path
    tokenizer: Any
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo measured."""

    sizes: Sizes
    peak_rss: int
    before: Perplexity
    after: Perplexity
    sample_before: str
    sample_after: str
    trained: Trained
    adapter_bytes: int
    seconds: float


def gather() -> Material:
    """Convert the model, if that has not been done, and cut the texts."""
    folder = demo_model()
    tokenizer = load_tokenizer(str(folder))
    speeches = split_speeches()
    train = token_windows(tokenizer, speeches.train, WINDOW, TRAIN_TOKENS)
    return Material(
        folder, tokenizer, train, token_windows(tokenizer, speeches.held_out, WINDOW, HELD_OUT_TOKENS)
    )


def load_quantized(folder: Path) -> Any:
    """Load the demo's model, quantizing it on the way."""
    return load_model(str(folder), backend=BACKEND, options=OPTIONS, dtype=DTYPE)


def train_on(
    windows: Tensor, model: Any, tokenizer: Any, output: Path, report: Report | None = None
) -> tuple[Any, Trained]:
    """Train the demo's adapter on (windows, WINDOW) token ids."""
    rows = [{"input_ids": window.tolist()} for window in windows]
    return train_adapter(model, tokenizer, rows, RECIPE, output, report=report)


def run(say: Callable[[str], None], report: Report | None = None) -> Outcome:
    """Run the demo.

    Args:
        say: told what happens next.
        report: told about the loss while training.
    """
    started = time.perf_counter()
    say(MODEL_LINE)
    material = gather()
    train, held_out = material.train.numel(), material.held_out.numel()
    say(f"text:  US annual messages, {train:,} tokens of 1990-2008; held out, {held_out:,} of 2010-2016")
    reset_peak()  # the conversion is not what a user's own model would go through
    say(f"loading, quantizing to {BACKEND} with double quantization …")
    model = load_quantized(material.folder)
    sizes = measure(model)
    say("scoring the held-out text …")
    before, sample_before = score(model, material.held_out), continue_prompt(model, material.tokenizer)
    say("training LoRA, r=8 on every linear …")
    with tempfile.TemporaryDirectory(prefix="modq-demo-") as folder:
        model, trained = train_on(material.train, model, material.tokenizer, Path(folder), report)
        adapter_bytes = sum(file.stat().st_size for file in Path(folder).glob("adapter_*"))
    say("scoring again …")
    after, sample_after = score(model, material.held_out), continue_prompt(model, material.tokenizer)
    seconds = time.perf_counter() - started
    return Outcome(
        sizes, peak_rss(), before, after, sample_before, sample_after, trained, adapter_bytes, seconds
    )


@torch.no_grad()
def continue_prompt(model: Any, tokenizer: Any, prompt: str = PROMPT) -> str:
    """Let the model continue a prompt, greedily: no luck in it. Small models loop, hence the penalty."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**encoded, max_new_tokens=SAMPLE_TOKENS, do_sample=False, repetition_penalty=1.2)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return " ".join(text.split())


def main() -> None:
    """Run the demo and print its table.

    Raises:
        DemoError: if the held-out loss did not fall by more than `ENOUGH` standard errors.
    """
    from modq.demo.report import show, show_progress

    outcome = run(lambda line: print(line, flush=True), show_progress)
    show(outcome)
    gain = outcome.after.gain_over(outcome.before)
    if not gain.stderrs_from_zero > ENOUGH:
        raise DemoError(
            f"the held-out loss fell by {gain} nats a token, expected more than {ENOUGH:g} standard errors"
        )
