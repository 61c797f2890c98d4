"""Tells how training goes, stops it between two steps when asked to, and keeps what was logged."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from modq.errors import ModqError
from modq.train.memory import peak_rss
from modq.train.processes import any_process


class TrainingError(ModqError):
    """Training that cannot go on."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is: after which step of how many, and at what rate since it began or was resumed."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    peak_memory: int  # bytes: of the accelerator, or resident in this process where there is none


Report = Callable[[Progress], None]
"""Called after each step."""


class Stop:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first Ctrl-C, and SIGTERM, into a request to stop after the step; a second Ctrl-C interrupts.

    It must run in the main thread, as Python's signal handlers do.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Reports each step, and stops with a checkpoint when asked to, in all processes at the same step."""

    def __init__(self, report: Report | None, stop: Stop | None) -> None:
        self.report, self.stop = report, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.begun, self.first_token = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if any process was asked to."""
        if self.stop is not None and any_process(self.stop.requested, args.device):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """Report the step, and refuse to train on nothing but NaN."""
        if "loss" not in logs:
            return
        if not math.isfinite(loss := float(logs["loss"])):
            raise TrainingError(
                f"the loss at step {state.global_step} is {loss}, expected a finite number; "
                "lower --lr, or look for what is odd in the data"
            )
        if self.report is None or not state.is_world_process_zero:
            return
        step, tokens, seconds = (
            state.global_step,
            state.num_input_tokens_seen,
            time.perf_counter() - self.begun,
        )
        rate = (tokens - self.first_token) / seconds
        self.report(Progress(step, state.max_steps, loss, rate, peak_memory()))


def peak_memory() -> int:
    """Return the most memory in use so far, in bytes: the accelerator's, or what was resident without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()


@dataclass(frozen=True, slots=True)
class History:
    """What was logged over a whole run, the parts before it was resumed included."""

    steps: tuple[Mapping[str, float], ...]  # step, loss, learning_rate, grad_norm
    evals: tuple[Mapping[str, float], ...]  # step, loss

    @classmethod
    def of(cls, log: list[dict[str, Any]]) -> History:
        """Take it from a Trainer's log."""
        keys = ("step", "loss", "learning_rate", "grad_norm")
        steps = (entry for entry in log if "loss" in entry)
        evals = (entry for entry in log if "eval_loss" in entry)
        return cls(
            tuple({key: entry[key] for key in keys if key in entry} for entry in steps),
            tuple({"step": entry["step"], "loss": entry["eval_loss"]} for entry in evals),
        )
