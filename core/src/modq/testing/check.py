"""What a check is: a promise with a name, a way to see whether it is kept, and what is said if it is not."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from modq.errors import ModqError

if TYPE_CHECKING:
    from modq.testing.subject import Subject


class Breach(AssertionError):  # noqa: N818  # the name of what happened
    """A promise that is not kept; the message names the quantity, and says what was found and expected."""


class NotApplicable(Exception):  # noqa: N818  # not an error
    """The backend makes no such promise; the message says why."""


class Verdict(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    EXPECTED = "expected failure"  # it failed, and the author said that it would
    NEWER = "newer"  # it failed, and is newer than the API that the backend declares


@dataclass(frozen=True, slots=True)
class Check:
    """One promise.

    Attributes:
        name: the promise in a few words, as an identifier.
        group: what it is about: the module that it stands in.
        promise: the promise in a sentence.
        since: the plugin API from which on it is asked for.
        run: raises Breach, or whatever the plugin raises, if it is not kept.
    """

    name: str
    group: str
    promise: str
    since: tuple[int, int]
    run: Callable[[Subject], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one check of a backend, and why."""

    check: Check
    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be mended."""
        return self.verdict is not Verdict.FAILED


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which their modules are imported: see `modq.testing.checks`."""


def check(
    *, since: tuple[int, int] = (1, 0)
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Make a check of a function that takes a Subject: its name and its docstring are the promise."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name, group = run.__name__, run.__module__.rpartition(".")[2]
        if name in CHECKS:
            raise ValueError(f"there is a check {name!r} already, in the group {CHECKS[name].group!r}")
        promise = (run.__doc__ or "").partition("\n")[0]
        CHECKS[name] = Check(name, group, promise, since, run)
        return run

    return register


def run_check(check: Check, subject: Subject, expected_failures: Mapping[str, str] | None = None) -> Outcome:
    """Run one check on a backend.

    Args:
        check: which one.
        subject: the backend.
        expected_failures: reasons by the names of checks. One of them that passes is a failure: the entry is
            stale.
    """
    reason = (expected_failures or {}).get(check.name)
    detail = ""
    try:
        check.run(subject)
    except NotApplicable as why:
        return Outcome(check, Verdict.NOT_APPLICABLE, str(why))
    except Exception as error:
        detail = _said(error)
    if reason is not None:
        if detail:
            return Outcome(check, Verdict.EXPECTED, f"{reason} ({detail})")
        return Outcome(check, Verdict.FAILED, f"it passes; take it out of expected_failures ({reason!r})")
    if detail and check.since > subject.info.api:
        declared, asked = (".".join(map(str, version)) for version in (subject.info.api, check.since))
        return Outcome(check, Verdict.NEWER, f"asked for since API {asked}, declared is {declared}: {detail}")
    return Outcome(check, Verdict.FAILED if detail else Verdict.PASSED, detail)


def _said(error: Exception) -> str:
    """Say what went wrong in a line; of an error that nobody raised on purpose, where."""
    text = " ".join(str(error).split())
    if isinstance(error, Breach):
        return text or "a promise is not kept"
    if isinstance(error, ModqError):
        return f"{type(error).__name__}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} (in {last.name}, {last.filename}:{last.lineno})"
