"""Perplexity by one stated protocol, with its standard error.

The text is tokenized whole, as the tokenizer does it for any text, and cut into non-overlapping windows of N
tokens; a shorter tail is dropped. The model sees each window alone and is scored on every token of it but the
first. With m_i the mean negative log-likelihood (nats a token) of window i of n:

    nll = mean of m_i                      all windows score N - 1 tokens, so this is the mean over tokens
    se(nll) = std(m_i, n - 1) / sqrt(n)    windows are the sample: tokens within one are not independent
    ppl = exp(nll),  se(ppl) = ppl · se(nll)                                      (the delta method)

Two models are compared window by window: the mean of the differences over its own standard error, which is
far smaller than either model's, since what makes a window hard is mostly the same for both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modq.errors import ModqError
from modq.train.data import read_text

TOKENS_A_FORWARD = 1024
"""Windows are run together up to this many tokens: the logits, tokens x vocabulary, dominate the memory."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, which is NaN where there was one sample."""

    mean: float
    stderr: float

    @property
    def stderrs_from_zero(self) -> float:
        """How many standard errors the mean is away from zero."""
        return self.mean / self.stderr if self.stderr else math.copysign(math.inf, self.mean)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.stderr:.2g}"


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a model scored on some windows of one length."""

    window: int
    window_nll: tuple[float, ...]

    @property
    def scored_tokens(self) -> int:
        """How many tokens the mean is over."""
        return len(self.window_nll) * (self.window - 1)

    @property
    def nll(self) -> Estimate:
        """The mean negative log-likelihood in nats a token."""
        return _estimate(self.window_nll)

    @property
    def perplexity(self) -> Estimate:
        """exp(nll), with its standard error by the delta method."""
        perplexity = math.exp(self.nll.mean)
        return Estimate(perplexity, perplexity * self.nll.stderr)

    def gain_over(self, before: Perplexity) -> Estimate:
        """How much lower the loss is than `before`, in nats a token, paired window by window."""
        return _estimate([old - new for old, new in zip(before.window_nll, self.window_nll, strict=True)])

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON; the standard errors are null where there is one window."""

        def finite(number: float) -> float | None:
            return number if math.isfinite(number) else None

        return {
            "perplexity": finite(self.perplexity.mean),
            "perplexity_stderr": finite(self.perplexity.stderr),
            "nll": finite(self.nll.mean),
            "nll_stderr": finite(self.nll.stderr),
            "window": self.window,
            "windows": len(self.window_nll),
            "scored_tokens": self.scored_tokens,
        }


def _estimate(sample: Sequence[float]) -> Estimate:
    spread = statistics.stdev(sample) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan
    return Estimate(statistics.fmean(sample), spread)


def text_windows(tokenizer: Any, text: Path, window: int, max_tokens: int | None = None) -> Tensor:
    """Tokenize a text file and cut it into (windows, window)."""
    ids = tokenizer(read_text(text), return_tensors="pt")["input_ids"][0]
    return cut_windows(ids, window, max_tokens)


def cut_windows(ids: Tensor, window: int, max_tokens: int | None) -> Tensor:
    """Cut token ids into (windows, window), dropping the tail.

    Raises:
        ModqError: if there is not one whole window.
    """
    ids = ids[: max_tokens if max_tokens is not None else ids.numel()]
    count = ids.numel() // window
    if not count:
        raise ModqError(
            f"the text has {ids.numel()} tokens, expected at least one window of {window}; lower --window"
        )
    return ids[: count * window].view(count, window)


@torch.no_grad()
def score(model: Any, windows: Tensor) -> Perplexity:
    """Score a causal language model on (windows, window) token ids; its training mode is left as it was."""
    training = model.training
    model.eval()
    try:
        rows = max(1, TOKENS_A_FORWARD // windows.shape[1])
        losses = [loss for batch in torch.split(windows, rows) for loss in _window_losses(model, batch)]
    finally:
        model.train(training)
    return Perplexity(windows.shape[1], tuple(losses))


def _window_losses(model: Any, batch: Tensor) -> list[float]:
    """The mean loss of each window: [B, N] -> B numbers."""
    batch = batch.to(model.device)
    logits = model(input_ids=batch, use_cache=False).logits  # [B, N, vocabulary]
    # One window at a time: float32 log-probabilities of the whole batch would double the peak memory.
    return [F.cross_entropy(row[:-1].float(), ids[1:]).item() for row, ids in zip(logits, batch, strict=True)]
