"""The benchmarks: how cells are run and compared, what the reports say, and a suite from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is run from the repository, never installed

from benchmarks import nli, nli_report, runner, tables  # noqa: E402  # after the path
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.nli_data import LABELS, Example, read_examples, split  # noqa: E402
from benchmarks.runner import Cell, CellError, Runs, Spread  # noqa: E402


def quiet(line: str) -> None:
    """Take what a runner says."""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cell]:
    """`script("a", code)`: a cell that runs `code`, and appends its name to the file `order`."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def cell(name: str, code: str = 'print("RESULT " + json.dumps({"speed": 1.0}))', **more: Any) -> Cell:
        start = f"import json, os, sys, time\nopen({str(tmp_path / 'order')!r}, 'a').write('{name} ')\n"
        (tmp_path / f"script_{name}.py").write_text(start + code)
        return Cell(name, f"script_{name}", {"number": 7}, **more)

    return cell


def test_rounds_are_interleaved(script: Callable[..., Cell], tmp_path: Path) -> None:
    runs = runner.run_rounds([script("a"), script("b")], 2, tmp_path / "work", timeout=60, say=quiet)
    assert (tmp_path / "order").read_text().split() == ["a", "b", "a", "b"]
    assert [each.rounds for each in runs] == [[{"speed": 1.0}] * 2] * 2


def test_a_cell_gets_its_settings_and_variables_and_works_elsewhere(
    script: Callable[..., Cell], tmp_path: Path
) -> None:
    code = (
        'told = json.loads(sys.argv[1])["number"]\n'
        'print("noise\\nRESULT " + json.dumps({"told": told, "v": os.environ["V"], "in": os.getcwd()}))'
    )
    figures = runner.run_cell(script("a", code, environment={"V": "x"}), tmp_path / "work", 60)
    assert figures == {"told": 7, "v": "x", "in": str(tmp_path / "work")}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('raise ValueError("no such kernel")', "exit code 1: ValueError: no such kernel"),
        ('print("hello")', "printed 0 lines"),
        ('print("RESULT {}"); print("RESULT {}")', "printed 2 lines"),
        ("time.sleep(60)", "took more than 2 s"),
    ],
)
def test_a_cell_that_fails_says_why_and_does_not_stop_the_others(
    script: Callable[..., Cell], tmp_path: Path, code: str, reason: str
) -> None:
    cells = [script("bad", code), script("good")]
    bad, good = runner.run_rounds(cells, 2, tmp_path / "work", timeout=2, say=quiet)
    assert bad.not_run is not None
    assert bad.not_run.startswith(reason)
    assert bad.rounds == [None]
    assert len(good.rounds) == 2


def test_a_missing_environment_is_reported_with_the_command_that_makes_it(
    script: Callable[..., Cell], tmp_path: Path
) -> None:
    with pytest.raises(CellError, match=r"no environment for absent: .*python -m benchmarks\.peers absent"):
        runner.run_cell(script("a", peer="absent"), tmp_path, 60)


def runs(name: str, values: list[Any], *, not_run: str | None = None, **settings: Any) -> Runs:
    """A cell's runs with one metric."""
    return Runs(Cell(name, "", settings), [None if v is None else {"speed": v} for v in values], not_run)


def test_cells_are_compared_round_by_round() -> None:
    slow_machine = [10.0, 1.0, 4.0]
    ours, other = runs("ours", [2 * v for v in slow_machine]), runs("other", slow_machine)
    assert runner.ratio(ours, other, "speed") == Spread(2.0, 2.0, 2.0)


def test_a_spread_is_a_median_and_the_extremes() -> None:
    assert Spread.of([9.0, 1.0, 2.0]) == Spread(2.0, 1.0, 9.0)
    assert Spread.of([]) is None


def test_a_series_counts_by_its_median_and_a_lost_round_not_at_all() -> None:
    ours, other = runs("ours", [[1.0, 2.0, 90.0], None]), runs("other", [4.0, 4.0])
    assert ours.values("speed") == [2.0]
    assert runner.ratio(ours, other, "speed") == Spread(0.5, 0.5, 0.5)
    assert runner.ratio(runs("none", [None]), other, "speed") is None


def test_results_survive_json_and_hold_no_path() -> None:
    one = runs(
        "a", [[1.0, 2.0], None], not_run="failed", system="modq", model="/x", checkpoint="/y", data="/z"
    )
    found = json.loads(json.dumps(runner.results([one])))
    (back,) = runner.from_results(found)
    assert (back.cell.name, back.rounds, back.not_run) == ("a", one.rounds, "failed")
    assert back.cell.settings == {"system": "modq"}


def test_a_table_is_aligned_markdown() -> None:
    assert tables.table(["name", "n"], [["a", "12"], ["long name", "3"]]).splitlines() == [
        "| name      |  n |",
        "| --------- | -: |",
        "| a         | 12 |",
        "| long name |  3 |",
    ]


@pytest.mark.parametrize(
    ("spread", "expected"),
    [(Spread(2.0, 1.0, 3.0), "2.00 (1.00-3.00)"), (Spread(2.0, 2.0, 2.0), "2.00"), (None, "-")],
)
def test_a_spread_is_shown_only_where_there_is_one(spread: Spread | None, expected: str) -> None:
    assert tables.shown(spread) == expected


def scored(system: str, seeds: list[list[int]], *, is_trained: bool = True) -> Runs:
    """What the NLI suite has of a system: whether each example is right, a list a seed."""
    rounds = [
        {
            "accuracy": sum(right) / len(right),
            "eval_loss": 1.0,
            "correct": right,
            "nats": [1.0] * len(right),
            "trained_tokens": 10,
        }
        for right in seeds
    ]
    settings = {"system": system, "setting": "", "trained": is_trained}
    return Runs(Cell(system, "", settings), list(rounds))


def test_a_difference_is_paired_by_seed_and_by_example() -> None:
    ours, other = scored("modq", [[1, 1, 0, 0], [1, 1, 1, 0]]), scored("dense", [[1, 0, 0, 0], [1, 1, 1, 1]])
    accuracy = next(d for d in nli_report.differences([ours, other]) if d.metric == "accuracy")
    assert accuracy.mean == 0.0
    assert accuracy.seed_stderr == pytest.approx(0.25)  # seeds differ by +1/4 and -1/4
    assert accuracy.example_stderr == pytest.approx(nli_report.stderr([0, 0.5, 0, -0.5]))


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ([0, 0, 0], "no difference beyond noise"),
        ([1, 0, 0], "no difference beyond noise"),
        ([9, 0, 12], "modq is worse than dense by 0.07, beyond noise over examples only"),
        ([1, 1, 1], "modq is worse than dense by 0.01, beyond noise over seeds only"),
        ([9, 9, 9], "modq is worse than dense by 0.09, beyond noise"),
    ],
)
def test_noise_is_only_called_noise_where_the_numbers_say_so(worse: list[int], said: str) -> None:
    right = [1] * 60 + [0] * 40
    ours = scored("modq", [[0] * count + right[count:] for count in worse])
    report = nli_report.render({"cells": runner.results([ours, scored("dense", [right] * 3)])})
    accuracy = next(line for line in report.splitlines() if line.startswith("- accuracy"))
    assert said in accuracy
    assert ("only" in said) == ("only" in accuracy)


def test_the_sides_are_disjoint_and_the_labels_balanced() -> None:
    examples = [Example(f"{number}", number % 2) for number in range(40)]
    drawn = split(examples, 12, 8)
    assert not {each.prompt for each in drawn.train} & {each.prompt for each in drawn.held_out}
    for side, count in ((drawn.train, 12), (drawn.held_out, 8)):
        assert [sum(each.label == label for each in side) for label in range(len(LABELS))] == [count // 2] * 2
    assert drawn == split(examples, 12, 8)
    with pytest.raises(SystemExit, match="too few examples"):
        split(examples, 300, 8)


def test_a_snippet_with_a_clear_rating_becomes_a_prompt_and_a_label(tmp_path: Path) -> None:
    file = tmp_path / "snippets.txt"
    file.write_text("1\t2.5\tA joy. \r\n2\t0.5\tSo so.\r\n3\t-1.0\tDull.\r\n")
    good, bad = read_examples(file)
    assert "A joy." in good.prompt
    assert [LABELS[each.label] for each in (good, bad)] == ["Yes", "No"]


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_nli_suite_runs_from_end_to_end(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "snippets.txt"
    ratings = [(2.0, "the union is strong"), (-2.0, "the future is for all of us")]
    data.write_text("".join(f"{n}\t{ratings[n % 2][0]}\t{ratings[n % 2][1]}\n" for n in range(60)))
    monkeypatch.setattr(nli, "fetch", lambda: data)
    arguments = ["nli", "--out", str(tmp_path / "nli.json"), "--model", str(tiny_llama), "--rounds", "2"]
    arguments += ["--threads", "1", "--systems", "modq,dense", "--train", "12", "--held-out", "6"]
    benchmarks_main(arguments)
    found = json.loads((tmp_path / "nli.json").read_text())
    cells = {each["name"]: each["rounds"] for each in found["cells"]}
    assert list(cells) == ["modq, untrained", "dense, untrained", "modq, trained", "dense, trained"]
    assert [len(rounds) for rounds in cells.values()] == [1, 1, 2, 2]
    assert [each["trained_tokens"] > 0 for each in (*cells["modq, untrained"], *cells["modq, trained"])] == [
        False,
        True,
        True,
    ]
    first, second = cells["dense, trained"]
    assert first["losses"] != second["losses"]  # another seed
    assert first["eval_loss"] < cells["dense, untrained"][0]["eval_loss"]
    assert len(found["differences"]) == 2


def test_a_cell_runs_in_a_process_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"job": "prepare", "system": "dense", "dtype": "bfloat16", "threads": 1}
    paths = {"model": str(tiny_llama), "checkpoint": str(tmp_path / "checkpoint")}
    cell = Cell(
        "prepare", "benchmarks.training_cell", {**settings, **paths}, environment={"MODQ_AUTOLOAD": "0"}
    )
    figures = runner.run_cell(cell, tmp_path / "work", 300)
    assert figures["checkpoint_bytes"] == (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
