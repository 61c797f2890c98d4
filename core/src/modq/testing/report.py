"""What `modq check` says: the checks run one after another, each timed, as lines and as a JSON document."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modq.registry import Backend
from modq.testing.check import Check, Outcome, Verdict, run_check
from modq.testing.subject import Subject

SCHEMA = 1
"""The version of the JSON document: it goes up when a key changes its meaning, not when one is added."""

_INDENT = " " * 6


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a check, and what it took."""

    outcome: Outcome
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether something needs to be mended."""
        return not self.outcome.ok


def run_checks(subject: Subject, checks: Iterable[Check]) -> Iterator[Result]:
    """Run the checks in order, yielding each result as it comes."""
    for check in checks:
        start = time.perf_counter()
        outcome = run_check(check, subject)
        yield Result(outcome, time.perf_counter() - start)


def lines_of(result: Result) -> list[str]:
    """Say what came of one check: a line, and below it what there is to know."""
    outcome = result.outcome
    verdict = "FAILED" if result.failed else str(outcome.verdict)
    first = f"  {verdict:<14} {result.seconds:6.2f} s  {outcome.check.name}"
    if result.failed:
        return [first, f"{_INDENT}promised: {outcome.check.promise}", f"{_INDENT}found:    {outcome.detail}"]
    return [first, *([f"{_INDENT}{outcome.detail}"] if outcome.detail else [])]


def summary_of(backend: Backend, results: Sequence[Result]) -> list[str]:
    """Say how many checks came out how, and what to do next."""
    counts = counts_of(results)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    seconds = sum(result.seconds for result in results)
    lines = [f"{len(results)} checks of {backend.name} ({backend.distribution}): {said}; {seconds:.1f} s"]
    if failed := [result.outcome.check.name for result in results if result.failed]:
        again = " ".join(f"--only {name}" for name in failed)
        lines.append(f"mend what was found, then: modq check {backend.name} {again}")
    elif counts[Verdict.NEWER]:
        lines.append("what is newer is asked for once INFO.api says so")
    return lines


def document_of(backend: Backend, subject: Subject, results: Sequence[Result]) -> dict[str, Any]:
    """Return all of it as JSON."""
    return {
        "schema": SCHEMA,
        "backend": backend.name,
        "package": backend.package,
        "version": backend.version,
        "api": _version(subject.info.api),
        "variants": [variant.label for variant in subject.variants],
        "ok": not any(result.failed for result in results),
        "seconds": round(sum(result.seconds for result in results), 3),
        "counts": {str(verdict): count for verdict, count in counts_of(results).items()},
        "checks": [_record(result) for result in results],
    }


def counts_of(results: Iterable[Result]) -> Counter[Verdict]:
    """Count the verdicts."""
    return Counter(result.outcome.verdict for result in results)


def _record(result: Result) -> dict[str, Any]:
    check = result.outcome.check
    return {
        "name": check.name,
        "group": check.group,
        "promise": check.promise,
        "since": _version(check.since),
        "verdict": str(result.outcome.verdict),
        "detail": result.outcome.detail or None,
        "seconds": round(result.seconds, 3),
    }


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
