"""Gets an entailment task out of the sdist of vaderSentiment: `python -m benchmarks.nli_data`, 0.2 MB once.

The package is never installed: pip fetches its archive, one file is read from it, and only that is kept, in
benchmarks/.cache/. It has 10,605 snippets of film reviews, each with the mean rating of 20 people from -4 to
4 (Hutto and Gilbert 2014, MIT licence). Cast as inference, as Wang et al. 2021 (arXiv:2104.14690) cast
sentiment: does the snippet entail "The critic recommends the film."? Snippets rated at least 1 do, those
rated at most -1 do not, the rest is left out.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.download import download

CACHE = Path(__file__).parent / ".cache"
PACKAGE = "vaderSentiment==3.3.2"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

LABELS = ("Yes", "No")
CLEAR = 1.0
"""The least rating, for or against, of a snippet that is used."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the label that follows it."""

    prompt: str
    label: int  # of LABELS


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint, and balanced: as many examples of each label."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def fetch() -> Path:
    """Return the file of snippets, fetching it first if it is not in the cache."""
    file = CACHE / "snippets.txt"
    if not file.is_file():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vader-") as folder:
            content = _read_member(download(PACKAGE, Path(folder), source=True))
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(file)
    return file


def _read_member(archive: Path) -> bytes:
    with tarfile.open(archive) as opened:
        inner = opened.extractfile(INNER)
        with tarfile.open(fileobj=io.BytesIO(inner.read() if inner else b"")) as nested:
            member = nested.extractfile(MEMBER)
            content = member.read() if member else b""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise SystemExit(f"{MEMBER} has sha256 {found}, expected {SHA256}")
    return content


def read_examples(file: Path) -> list[Example]:
    """Read the snippets with a clear rating, in their order."""
    lines = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    rated = ((float(rating), snippet.strip()) for _, rating, snippet in lines)
    return [_example(snippet, rating) for rating, snippet in rated if abs(rating) >= CLEAR]


def _example(snippet: str, rating: float) -> Example:
    prompt = (
        f"Premise: {snippet}\nHypothesis: The critic recommends the film.\n"
        "Does the premise entail the hypothesis, Yes or No?"
    )
    return Example(prompt, 0 if rating > 0 else 1)


def split(examples: Iterable[Example], train: int, held_out: int, seed: int = 0) -> Split:
    """Draw both sides: of the shuffled examples, the first half is held out, the other trained on.

    Args:
        examples: all that may be drawn.
        train: how many to train on, a multiple of the labels.
        held_out: how many to score, a multiple of the labels.
        seed: of the shuffle; the held-out side shall be the same for every cell, so it is not a cell's seed.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    half = len(shuffled) // 2
    return Split(_balanced(shuffled[half:], train), _balanced(shuffled[:half], held_out))


def _balanced(examples: Iterable[Example], count: int) -> tuple[Example, ...]:
    """Take examples as long as their label is still short."""
    wanted = {label: count // len(LABELS) for label in range(len(LABELS))}
    taken = []
    for example in examples:
        if wanted[example.label]:
            wanted[example.label] -= 1
            taken.append(example)
    if any(wanted.values()):
        raise SystemExit(f"too few examples for {count} balanced ones: short of {wanted}")
    return tuple(taken)


if __name__ == "__main__":
    print(fetch())
