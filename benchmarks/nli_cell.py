"""Trains and scores one system on the NLI task in this process: `python -m benchmarks.nli_cell SETTINGS`."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cell
from benchmarks.lora import add_lora, train
from benchmarks.nli_data import LABELS, Example, read_examples, split
from benchmarks.quality_systems import find
from modq.train.models import load_tokenizer

Batch = tuple[dict[str, Tensor], Tensor, Tensor]
"""The model's inputs, the position of each row's last token, and the labels."""


class Task:
    """The task in tokens: which examples, how they are batched, what they cost."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(settings["model"])
        self.tokenizer.padding_side = "right"
        self.batch_size = settings["batch_size"]
        self.label_ids = torch.tensor([self._label_token(label) for label in LABELS])
        short = self._at_most(read_examples(Path(settings["data"])), settings["longest"])
        self.split = split(short, settings["train"], settings["held_out"])

    def _label_token(self, label: str) -> int:
        ids = self.tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SystemExit(f"the tokenizer cuts the label {label!r} into {len(ids)} tokens, expected one")
        return int(ids[0])

    def _at_most(self, examples: list[Example], longest: int) -> list[Example]:
        lengths = self.tokenizer([example.prompt for example in examples])["input_ids"]
        return [example for example, ids in zip(examples, lengths, strict=True) if len(ids) <= longest]

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Cut the examples into padded batches, in their order."""
        for start in range(0, len(examples), self.batch_size):
            rows = examples[start : start + self.batch_size]
            inputs = dict(self.tokenizer([row.prompt for row in rows], padding=True, return_tensors="pt"))
            last = inputs["attention_mask"].sum(dim=1) - 1
            yield inputs, last, torch.tensor([row.label for row in rows])

    def label_logits(self, model: Any, batch: Batch) -> Tensor:
        """Return the log-probabilities of what follows the prompts: [rows, vocabulary]."""
        inputs, last, _ = batch
        logits = model(**inputs).logits  # [rows, tokens, vocabulary]
        return F.log_softmax(logits[torch.arange(len(last)), last].float(), dim=-1)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The negative log-likelihood of the right labels, in nats."""
        return F.nll_loss(self.label_logits(model, batch), self.label_ids[batch[2]])


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize, train (unless there are no steps), score; return the figures, example by example."""
    torch.set_num_threads(settings["threads"])
    task = Task(settings)
    model = _load(settings)
    started = time.perf_counter()
    trained_on = _in_order(task.split.train, settings["seed"]) if settings["trained"] else []
    model = add_lora(model, settings["seed"])
    batches = list(task.batches(trained_on))
    done = train(model, batches, task.loss, settings["learning_rate"])
    training_seconds = time.perf_counter() - started
    return {
        "losses": done.losses,
        "trained_tokens": sum(int(inputs["attention_mask"].sum()) for inputs, _, _ in batches),
        "training_seconds": training_seconds,
        **score(task, model.eval()),
        "versions": cell.versions(settings["system"]),
    }


def score(task: Task, model: Any) -> dict[str, Any]:
    """Score the held-out examples: the chosen label is the likelier one.

    Gradients stay enabled: without them bitsandbytes, on a processor with AVX512-BF16, takes a kernel that
    rounds activations and scales to bfloat16, and a difference would be the kernel's.
    """
    correct: list[int] = []
    nats: list[float] = []
    for batch in task.batches(task.split.held_out):
        logprobs = task.label_logits(model, batch).detach()
        label_ids = task.label_ids[batch[2]]
        correct += (logprobs[:, task.label_ids].argmax(dim=1) == batch[2]).int().tolist()
        nats += (-logprobs.gather(1, label_ids[:, None])[:, 0]).tolist()
    return {
        "accuracy": sum(correct) / len(correct),
        "eval_loss": sum(nats) / len(nats),
        "correct": correct,
        "nats": nats,
    }


def _load(settings: dict[str, Any]) -> Any:
    system, dtype = find(settings["system"]), getattr(torch, settings["dtype"])
    if settings["checkpoint"] is not None:
        return system.load(Path(settings["checkpoint"]), dtype)
    return (system.quantize or system.load)(Path(settings["model"]), dtype)


def _in_order(examples: Sequence[Example], seed: int) -> list[Example]:
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    return shuffled


if __name__ == "__main__":
    cell.run(main)
