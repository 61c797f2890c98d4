"""Wraps functions of other packages, each once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_modq_wrapped"


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Callable[..., Any]]) -> None:
    """Put `wrapper(function)` in the place of a module's function or a class's own method.

    What is wrapped already, or is not there, stays as it is.
    """
    found = vars(owner).get(name)
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    function = found.__func__ if kind else found
    if function is not None and not hasattr(function, _MARK):
        wrapped = wraps(function)(wrapper(function))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, kind(wrapped) if kind else wrapped)
