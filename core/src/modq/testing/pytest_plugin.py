"""What pytest loads of modq, in any session: an option, so it imports nothing that costs time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `pytest --pyargs modq.testing.conformance`."""
    parser.addoption(
        "--modq-backend",
        metavar="NAME",
        help="the quantizer backend that modq.testing.conformance checks",
    )
