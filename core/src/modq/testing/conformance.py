"""The kit under pytest: a test a check.

    class TestMine(QuantizerConformance):
        backend = "mine"

or, without a file, `pytest --pyargs modq.testing.conformance --modq-backend mine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from modq.spec import JSON
from modq.testing.check import Check, Verdict, run_check
from modq.testing.checks import all_checks
from modq.testing.subject import Subject

OPTION = "--modq-backend"


class QuantizerConformance:
    """Everything that a quantizer backend promises, one test for each check of the kit.

    Attributes:
        backend: its name.
        variants: options to check beside the defaults at each of its widths, as keywords of `modq.quantize`.
        expected_failures: reasons by the names of checks that fail and, for now, may. An entry whose check
            passes fails; so does one that names no check.
    """

    backend: ClassVar[str] = ""
    variants: ClassVar[Sequence[Mapping[str, JSON]]] = ()
    expected_failures: ClassVar[Mapping[str, str]] = {}
    _modq_subject: ClassVar[Subject]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse what would switch off a standard check without a word."""
        super().__init_subclass__(**kwargs)
        standard = {f"test_{name}" for name in all_checks()} | {"subject", "_modq_run", "_modq_subject"}
        if taken := sorted(standard & vars(cls).keys()):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(taken)} of the conformance kit; give your test another "
                "name, or state expected_failures = {check: reason}"
            )
        if unknown := sorted(cls.expected_failures.keys() - all_checks().keys()):
            raise TypeError(
                f"{cls.__name__} expects failures of {', '.join(unknown)}: there is no such check"
            )

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        """The backend under check, the same object for all tests of a class."""
        name = self.backend or request.config.getoption(OPTION)
        if not name:
            pytest.skip(f"no backend is named: give {OPTION} NAME")
        kept = vars(type(self)).get("_modq_subject")
        if kept is None or kept.backend != name:
            kept = type(self)._modq_subject = Subject(name, self.variants)
        return kept

    def _modq_run(self, check: Check, subject: Subject) -> None:
        __tracebackhide__ = True
        outcome = run_check(check, subject, self.expected_failures)
        if outcome.verdict is Verdict.FAILED:
            pytest.fail(f"{subject.backend}: {check.promise} {outcome.detail}", pytrace=False)
        if outcome.verdict in (Verdict.EXPECTED, Verdict.NEWER):
            pytest.xfail(outcome.detail)
        if outcome.verdict is Verdict.NOT_APPLICABLE:
            pytest.skip(outcome.detail)


def _test_of(check: Check) -> Callable[[QuantizerConformance, Subject], None]:
    def test(self: QuantizerConformance, subject: Subject) -> None:
        __tracebackhide__ = True
        self._modq_run(check, subject)

    test.__doc__ = check.promise
    test.__name__ = f"test_{check.name}"
    return test


for _check in all_checks().values():
    setattr(QuantizerConformance, f"test_{_check.name}", _test_of(_check))


class TestConformance(QuantizerConformance):
    """What runs when this module is given to pytest."""
