"""Judges how something is refused."""

from __future__ import annotations

from collections.abc import Callable

from modq.errors import ModqError
from modq.testing.check import Breach


def refuses(what: str, call: Callable[[], object], error: type[ModqError], *shown: object) -> None:
    """Demand that a call raises an error of modq, in one line with what was given and what was expected.

    Args:
        what: what is wrong with the call.
        call: makes it.
        error: what it must raise.
        *shown: what the message must have in it.
    """
    try:
        call()
    except error as refusal:
        judge(what, refusal, *shown)
    except Exception as other:
        said = f"{type(other).__name__}: {' '.join(str(other).split())}"
        raise Breach(f"{what} raises {said:.300}; expected modq.errors.{error.__name__}") from other
    else:
        raise Breach(f"{what} is taken without a word; expected modq.errors.{error.__name__}")


def judge(what: str, refusal: ModqError, *shown: object) -> None:
    """Demand that a message is one line and has all of this in it."""
    text = str(refusal)
    if len(text.splitlines()) != 1:
        raise Breach(f"{what}: the message is {text!r}, expected one line")
    if lacking := [str(part) for part in shown if str(part) not in text]:
        raise Breach(f"{what}: the message is {text!r}, expected {', '.join(map(repr, lacking))} in it")
