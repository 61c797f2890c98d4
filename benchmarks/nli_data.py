"""Gets natural-language inference out of the sdist of bigbench: `python -m benchmarks.nli_data`, 358 MB once.

The package is never installed: pip fetches its archive, one task is read from it, and only that is kept, in
benchmarks/.cache/. The task is epistemic_reasoning, 2,000 pairs of sentences: does "James knows that Ava
suspects that it rains" entail "Ava suspects that it rains"? (Yes; not if James only thinks so.) Its authors
ask that it never be part of a training corpus: nothing of it goes into this repository, and the adapters that
are trained on it are thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / ".cache"
PACKAGE = "bigbench==1.0.0"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/epistemic_reasoning/task.json"
SHA256 = "98209623d1bf28ed6b99ec50b772b367f24467d190ceb9d1c0298e91c04548f1"

LABELS = ("Yes", "No")
ANSWERS = ("entailment", "non-entailment")
"""What the task calls them."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the label that follows it."""

    prompt: str
    label: int  # of LABELS
    scene: str  # many examples are about one scene: they never go to both sides of a split


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint in scenes, and balanced: as many examples of each label."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def fetch() -> Path:
    """Return the task's file, fetching it first if it is not in the cache."""
    file = CACHE / "nli.json"
    if not file.is_file():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bigbench-") as folder:
            task = _read_member(_download(Path(folder)))
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(task)
        unfinished.replace(file)
    return file


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "bigbench"]
    subprocess.run([*pip, "-d", str(folder), PACKAGE], check=True)
    (archive,) = folder.glob("bigbench-*")
    return archive


def _read_member(archive: Path) -> bytes:
    with tarfile.open(archive) as opened:
        member = opened.extractfile(MEMBER)
        task = member.read() if member else b""
    if (found := hashlib.sha256(task).hexdigest()) != SHA256:
        raise SystemExit(f"{MEMBER} has sha256 {found}, expected {SHA256}")
    return task


def read_examples(file: Path) -> list[Example]:
    """Read the task's examples, in their order."""
    return [_example(each) for each in json.loads(file.read_text(encoding="utf-8"))["examples"]]


def _example(found: dict[str, Any]) -> Example:
    scores = found["target_scores"]
    premise = found["input"].partition(" Hypothesis: ")[0]
    prompt = f"{found['input']}\nDoes the premise entail the hypothesis, Yes or No?"
    return Example(prompt, [scores[answer] for answer in ANSWERS].index(1), premise.rpartition(" that ")[2])


def split(examples: Iterable[Example], train: int, held_out: int, seed: int = 0) -> Split:
    """Draw both sides: of the shuffled scenes, the first half is held out, the other trained on.

    Args:
        examples: all that may be drawn.
        train: how many to train on, a multiple of the labels.
        held_out: how many to score, a multiple of the labels.
        seed: of the shuffle; the held-out side shall be the same for every cell, so it is not a cell's seed.
    """
    by_scene: dict[str, list[Example]] = {}
    for example in examples:
        by_scene.setdefault(example.scene, []).append(example)
    scenes = sorted(by_scene)
    random.Random(seed).shuffle(scenes)
    half = len(scenes) // 2
    return Split(
        _balanced((by_scene[scene] for scene in scenes[half:]), train),
        _balanced((by_scene[scene] for scene in scenes[:half]), held_out),
    )


def _balanced(scenes: Iterable[list[Example]], count: int) -> tuple[Example, ...]:
    """Take one example an scene, as long as its label is still short."""
    wanted = {label: count // len(LABELS) for label in range(len(LABELS))}
    taken = []
    for examples in scenes:
        chosen = next((example for example in examples if wanted[example.label]), None)
        if chosen is not None:
            wanted[chosen.label] -= 1
            taken.append(chosen)
    if any(wanted.values()):
        raise SystemExit(f"too few scenes for {count} balanced examples: short of {wanted}")
    return tuple(taken)


if __name__ == "__main__":
    print(fetch())
