"""The frame of the conformance kit: verdicts, expected failures, and what a subclass may not do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from modq.errors import BackendError, OptionError
from modq.testing import Breach, Check, NotApplicable, QuantizerConformance, Subject, Verdict, run_check
from modq.testing.check import CHECKS, check
from modq.testing.checks import GROUPS, all_checks

pytest_plugins = ["pytester"]


def keeps(subject: Subject) -> None:
    pass


def breaks(subject: Subject) -> None:
    raise Breach("y is 3, expected 4")


def knows_not(subject: Subject) -> None:
    raise NotApplicable("it has no y")


def falls_over(subject: Subject) -> None:
    raise KeyError("y")


def a_check(run: Callable[[Subject], None], since: tuple[int, int] = (1, 0)) -> Check:
    return Check("y_is_four", "numbers", "y is four.", since, run)


@pytest.fixture
def subject() -> Subject:
    return Subject("toy-affine")


@pytest.mark.parametrize(
    ("run", "verdict", "detail"),
    [
        (keeps, Verdict.PASSED, "^$"),
        (breaks, Verdict.FAILED, "^y is 3, expected 4$"),
        (knows_not, Verdict.NOT_APPLICABLE, "^it has no y$"),
        (falls_over, Verdict.FAILED, r"^KeyError: 'y' \(in falls_over, .*test_testing.py:\d+\)$"),
    ],
)
def test_a_check_has_a_verdict_and_a_reason(
    run: Callable[[Subject], None], verdict: Verdict, detail: str, subject: Subject
) -> None:
    outcome = run_check(a_check(run), subject)
    assert outcome.verdict is verdict
    assert re.search(detail, outcome.detail), outcome.detail
    assert outcome.ok == (verdict is not Verdict.FAILED)


def test_an_expected_failure_may_fail_and_may_not_pass(subject: Subject) -> None:
    expected = {"y_is_four": "it is five on Mondays"}
    failed = run_check(a_check(breaks), subject, expected)
    assert failed.verdict is Verdict.EXPECTED
    assert failed.detail == "it is five on Mondays (y is 3, expected 4)"
    stale = run_check(a_check(keeps), subject, expected)
    assert stale.verdict is Verdict.FAILED
    assert "it passes; take it out of expected_failures" in stale.detail


def test_a_failing_check_that_is_newer_than_the_declared_api_is_reported_and_not_failed(
    subject: Subject,
) -> None:
    newer = run_check(a_check(breaks, since=(1, 1)), subject)
    assert newer.verdict is Verdict.NEWER
    assert newer.ok
    assert newer.detail == "asked for since API 1.1, declared is 1.0: y is 3, expected 4"
    assert run_check(a_check(keeps, since=(1, 1)), subject).verdict is Verdict.PASSED
    subject.info = replace(subject.info, api=(1, 1))
    assert run_check(a_check(breaks, since=(1, 1)), subject).verdict is Verdict.FAILED


def test_every_check_states_its_promise_in_a_sentence_and_stands_in_a_group() -> None:
    assert len(all_checks()) >= 30
    for each in all_checks().values():
        assert each.group in GROUPS
        assert each.promise.endswith("."), each.name


def test_two_checks_may_not_share_a_name() -> None:
    taken = next(iter(all_checks()))
    with pytest.raises(ValueError, match=taken):
        check()(type(keeps)(keeps.__code__, {"__name__": __name__}, taken))
    assert CHECKS[taken].run is all_checks()[taken].run


def test_a_standard_check_cannot_be_overridden_without_a_word() -> None:
    taken = f"test_{next(iter(all_checks()))}"
    with pytest.raises(TypeError, match=f"overrides {taken} .* expected_failures"):
        type("TestMine", (QuantizerConformance,), {"backend": "toy-affine", taken: lambda self: None})
    with pytest.raises(TypeError, match="no_such"):
        type("TestMine", (QuantizerConformance,), {"expected_failures": {"no_such": "because"}})


@pytest.mark.parametrize("group", ["purity", "numerics", "state", "autograd"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # of functorch, under compile
def test_a_backend_that_works_on_blocks_is_given_a_block_of_one_linear(group: str) -> None:
    subject = Subject("toy-block")
    outcomes = [run_check(each, subject) for each in all_checks().values() if each.group == group]
    assert [f"{outcome.check.name}: {outcome.detail}" for outcome in outcomes if not outcome.ok] == []
    assert any(outcome.verdict is Verdict.PASSED for outcome in outcomes)


def test_a_width_that_the_options_do_not_take_is_named() -> None:
    with pytest.raises(OptionError, match="9"):
        Subject("toy-affine", [{"bits": "9"}])
    with pytest.raises(BackendError, match="no quantizer backend 'absent'"):
        Subject("absent")


def test_it_runs_without_a_file_and_skips_without_a_name(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "backends"))
    which = ("--pyargs", "modq.testing.conformance", "-p", "no:cacheprovider", "-k", "inputs_stay_untouched")
    found = pytester.runpytest_subprocess(*which, "--modq-backend", "toy-affine")
    found.assert_outcomes(passed=1, deselected=len(all_checks()) - 1)
    found = pytester.runpytest_subprocess(*which)
    found.assert_outcomes(skipped=1, deselected=len(all_checks()) - 1)


def test_a_test_file_of_three_lines_is_enough_and_the_failure_says_which_promise(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "backends"))
    pytester.makepyfile(
        """
        from modq.testing import QuantizerConformance

        class TestMine(QuantizerConformance):
            backend = "toy-affine"
            expected_failures = {"inputs_stay_untouched": "it never failed"}
        """
    )
    found = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "untouched")
    found.assert_outcomes(passed=1, failed=1, deselected=len(all_checks()) - 2)
    found.stdout.fnmatch_lines(["*toy-affine: No hook changes the weight*it passes; take it out*"])
