"""The conformance kit itself: it passes a right backend and catches each wrong one where its mistake is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modq.testing import Subject, Verdict, run_check
from modq.testing.checks import all_checks

FOLDER = Path(__file__).parent / "mutants"
TABLE = FOLDER / "README.md"

sys.path.insert(0, str(FOLDER))
import modq_mutants_declared  # noqa: E402, F401  # found through the line above; it fills the register
import modq_mutants_kept  # noqa: E402, F401
import modq_mutants_numbers  # noqa: E402, F401
from modq_mutant_register import MUTANTS, install  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Declare the mutants as an installed package would; no other test shall meet them."""
    folder = tmp_path_factory.mktemp("installed")
    install(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_there_are_at_least_forty_mutants() -> None:
    assert len(MUTANTS) >= 40
    assert {mutant.caught_by for mutant in MUTANTS.values()} <= all_checks().keys()


def test_the_right_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODQ_BACKENDS", "sound")  # all mutants know the same format
    subject = Subject("sound")
    outcomes = [run_check(each, subject) for each in all_checks().values()]
    assert [f"{outcome.check.name}: {outcome.detail}" for outcome in outcomes if not outcome.ok] == []
    unasked = [outcome.check.name for outcome in outcomes if outcome.verdict is Verdict.NOT_APPLICABLE]
    assert unasked == ["missing_calibration_is_refused"]


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught_where_its_mistake_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODQ_BACKENDS", name)
    mutant = MUTANTS[name]
    outcome = run_check(all_checks()[mutant.caught_by], Subject(name))
    assert outcome.verdict is Verdict.FAILED
    assert re.search(mutant.says, outcome.detail), outcome.detail


def test_the_table_names_each_mutant_and_its_check() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| .*? \| `(\w+)` \|", TABLE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, mutant.caught_by) for name, mutant in MUTANTS.items()]
