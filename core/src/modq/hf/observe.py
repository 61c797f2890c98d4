"""Lets who calls `from_pretrained` see each weight while it is quantized: for progress and for reports.

transformers makes the quantizer itself, out of a config that is saved as JSON, so there is no argument to
pass an observer in. It is a context variable: a model that is quantized on load is converted in the caller's
thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from modq.spec import QuantizedWeight


class Observer(Protocol):
    """What is told of a model that is quantized on load."""

    def planned(self, names: Sequence[str]) -> None:
        """Say which linears will be quantized."""

    def begins(self, name: str) -> None:
        """Say which one is next."""

    def quantized(self, name: str, weight: Tensor, qweight: QuantizedWeight) -> None:
        """Say what became of one: `weight` is the dense (out_features, in_features), dropped afterwards."""


_observer: ContextVar[Observer | None] = ContextVar("modq_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Have `observer` told of what is quantized on load inside this block."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def current_observer() -> Observer | None:
    """Return who observes, if anyone does."""
    return _observer.get()
