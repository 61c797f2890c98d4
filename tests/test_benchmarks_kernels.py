"""The suite `kernels`: its cells on a small weight, what is left out, and what its tables say."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is run from the repository, never installed

from benchmarks import kernels, kernels_cell, kernels_report, kernels_systems, runner  # noqa: E402  # after the path
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.kernels_report import Series  # noqa: E402
from benchmarks.runner import Cell, Runs  # noqa: E402

HERE = [name for name, system in kernels.SYSTEMS.items() if system.peer is None]
"""The systems that run in the project's environment."""

SHAPE, CACHE = (128, 256), 1 << 15


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two calls for a series, and a cache that a few copies of a small weight fill."""
    monkeypatch.setattr(kernels, "LEAST_CALLS", 2)
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(kernels_cell, "last_cache_bytes", lambda: CACHE)
    monkeypatch.setenv("MODQ_FUSED_ROWS", "4")  # nothing is measured, nothing is kept


@pytest.mark.usefixtures("cells_in_this_process", "quick")
def test_the_kernels_suite_runs_from_end_to_end(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    words = ["kernels", "--out", str(out), "--model", str(tiny_llama), "--rounds", "1", "--threads", "1"]
    few = ["--shapes", "128x256,64x128", "--rows", "1,16,64", "--systems", ",".join(HERE)]
    benchmarks_main([*words, *few, "--work", str(tmp_path / "work")])
    cells = {each["name"]: each for each in json.loads(out.read_text())["cells"]}
    assert [each["not_run"] for each in cells.values()] == [None] * len(HERE)
    for name, each in cells.items():
        (figures,) = each["rounds"]
        columns = figures["series"]
        measured = columns.get("point", [])
        assert sorted([*measured, *figures["skipped"]]) == sorted(each["settings"]["points"]), name
        for point, low, median, copies, nbytes in zip(
            *(columns.get(column, []) for column in ("point", "least", "median", "copies", "bytes")),
            strict=True,
        ):
            assert 0 < low <= median < 60, (name, point)
            distinct = copies * nbytes
            assert distinct >= kernels.CACHES * CACHE or name.startswith("quantize-"), (name, point)
    assert not cells["modq-nf4"]["rounds"][0]["skipped"]
    report = out.with_suffix(".md").read_text()
    for heading in (
        "One row, bfloat16",
        "Few rows, 128x256",
        "Times of dense float32's",
        "Quantizing a float32",
    ):
        assert f"## {heading}" in report


@pytest.mark.parametrize(
    "name", [name for name in kernels_systems.MAKE if kernels.SYSTEMS[name].peer is None]
)
def test_a_systems_copies_give_the_same_product_and_its_gradient(name: str) -> None:
    if name == "read":
        work = kernels_systems.MAKE[name](SHAPE, torch.int64)
        assert work.nbytes == 2 * SHAPE[0] * SHAPE[1]
        return
    try:
        work = kernels_systems.MAKE[name](SHAPE, torch.bfloat16)
    except kernels_systems.UnavailableError as reason:
        assert "AVX512-BF16" in str(reason)  # noqa: PT017  # the other branch is the rest of the test
        return
    work.copy(3 * work.nbytes, 10)
    generator = torch.Generator().manual_seed(1)
    grad, x = (torch.randn(3, size, generator=generator).bfloat16() for size in SHAPE)
    first, *others = (work.forward(copy, x) for copy in work.copies)
    assert first.shape == (3, SHAPE[0])
    assert first.isfinite().all()
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)
    if work.transposed is not None:
        dx = work.transposed(work.copies[0], grad)
        eye = torch.eye(SHAPE[1]).bfloat16()
        dense = work.forward(work.copies[0], eye).double().T
        close = (dx.double() - grad.double() @ dense).norm() / dx.double().norm()
        assert close < 2**-7  # a rounding of dX to bfloat16, and one of the weight


def test_only_points_that_a_plan_names_are_measured() -> None:
    rows, shapes = [1, 4, 64], ["8x8", "16x8"]
    assert list(kernels.points("forward", shapes, rows, None)) == [
        *(f"8x8 {count} forward bfloat16" for count in rows),
        "16x8 1 forward bfloat16",
    ]
    assert list(kernels.points("read", shapes, rows, None)) == ["8x8 1 read -", "16x8 1 read -"]
    peer = list(kernels.points("peer", shapes, rows, ["float32"]))
    assert peer == [f"8x8 {count} both float32" for count in rows]


@pytest.mark.parametrize(
    ("plan", "rows", "direction", "dtype", "left_out"),
    [
        ("dense", 256, "forward", "bfloat16", False),
        ("dense", 1024, "forward", "bfloat16", True),
        ("dense", 1, "dX", "bfloat16", False),
        ("peer", 4, "both", "bfloat16", True),
        ("dense32", 2048, "both", "float32", False),
        ("modq", 2048, "both", "bfloat16", False),
    ],
)
@pytest.mark.parametrize("instructions", [False, True])
def test_a_dense_product_that_is_a_loop_is_left_out_of_many_rows(
    plan: str,
    rows: int,
    direction: str,
    dtype: str,
    left_out: bool,
    instructions: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels_cell, "fast_bfloat16", lambda: instructions)
    reason = kernels_cell.too_slow(plan, rows, direction, dtype)
    assert (reason is not None) == (left_out and not instructions)


@pytest.mark.parametrize(
    ("plan", "calls", "seconds", "more"),
    [({}, 14, 0.5, True), ({}, 15, 0.1, True), ({}, 15, 0.3, False), ({}, 2, 5.0, True), ({}, 3, 5.0, False)],
)
def test_a_series_ends_after_enough_calls_and_time(
    plan: dict[str, Any], calls: int, seconds: float, more: bool
) -> None:
    told = {"least_calls": 15, "least_seconds": 0.25, "most_seconds": 2.0, **plan}
    assert kernels_cell.goes_on(calls, seconds, told) == more


def test_a_series_counts_its_calls_and_knows_whose_time_it_was() -> None:
    told = {"least_calls": 4, "least_seconds": 0.0, "most_seconds": 60.0, "threads": 1}
    calls: list[float] = []

    def sleep() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.02)

    figures = kernels_cell.series(sleep, 3, told)
    assert (len(calls), figures["calls"]) == (7, 4)  # three to warm up
    assert 0.02 <= figures["least"] <= figures["lower"] <= figures["median"] <= figures["upper"]
    assert figures["cpu_share"] < 0.5  # it slept
    assert 0 <= figures["own_share"] <= 1


def measured(name: str, *rounds: tuple[float, float], point: str, nbytes: int = 1000) -> Runs:
    """A system's runs at one point; a round is (median, own share)."""
    series = [
        {
            "point": [point],
            "median": [median],
            "least": [0.9 * median],
            "own_share": [share],
            "bytes": [nbytes],
        }
        for median, share in rounds
    ]
    told = {"setting": "s", "points": [point]}
    return Runs(Cell(name, "", told), [{"series": each, "skipped": {}} for each in series])


POINT = "8x8 1 forward bfloat16"


def test_a_polluted_series_is_left_out_where_a_round_is_clean() -> None:
    series = Series([measured("modq-nf4", (1.0, 0.9), (9.0, 0.3), (3.0, 0.8), point=POINT)])
    assert series.spread("modq-nf4", POINT, "median") == runner.Spread(2.0, 1.0, 3.0)
    assert not series.polluted("modq-nf4", POINT)


def test_where_all_series_are_polluted_they_count_and_are_marked() -> None:
    series = Series([measured("modq-nf4", (1.0, 0.3), (9.0, 0.3), point=POINT)])
    spread = series.spread("modq-nf4", POINT, "median")
    assert spread == runner.Spread(5.0, 1.0, 9.0)
    assert series.marked(spread, ("modq-nf4", POINT), digits=0) == "5 (1-9)*"


def test_a_ratio_is_that_of_medians_and_spans_the_rounds() -> None:
    dense = measured("dense-bf16", (8.0, 1.0), (6.0, 1.0), (9.0, 0.2), point=POINT)
    ours = measured("modq-nf4", (2.0, 1.0), (2.0, 0.1), (1.0, 1.0), point=POINT)
    found = Series([dense, ours]).ratio(("dense-bf16", POINT), ("modq-nf4", POINT))
    assert found == runner.Spread(7.0 / 1.5, 4.0, 7.0 / 1.5)  # of the rounds only the first has both clean


def row_of(report: str, start: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("ours", "shown"), [(0.2, "4.5: met"), (0.25, "4.5: NOT MET")])
def test_one_row_is_held_against_dense_and_the_plain_read(ours: float, shown: str) -> None:
    runs = [
        measured("read", (0.5, 1.0), point="8x8 1 read -", nbytes=1000),
        measured("dense-bf16", (1.0, 1.0), point=POINT, nbytes=1000),
        measured("modq-nf4", (ours, 1.0), point=POINT, nbytes=250),
    ]
    cells = row_of(kernels_report.render({"cells": runner.results(runs)}), "8x8 modq-nf4")
    assert cells[1:5] == [f"{ours * 1e3:.3f}", f"{0.9 * ours * 1e3:.3f}", f"{1 / ours:.2f}", shown]
    assert cells[6] == f"{100 * (250 / ours) / (1000 / 0.5):.0f}"
    assert cells[7] == "85 %: NOT MET"


@pytest.mark.parametrize(("ours", "missed"), [(0.5, "hqq"), (0.05, "-")])
def test_few_rows_name_the_peers_whose_target_is_missed(ours: float, missed: str) -> None:
    point = "8x8 4 forward bfloat16"
    runs = [measured("modq-affine-4", (ours, 1.0), point=point), measured("hqq", (2.0, 1.0), point=point)]
    report = kernels_report.render({"cells": runner.results(runs)})
    assert row_of(report, "4, modq-affine-4")[2:] == [f"{2 / ours:.2f}", missed]
    assert "No peer is ahead of modq's weights of its kind at any of 1 points" in report


def test_llama_cpps_types_are_held_against_the_nearest_of_ours_only() -> None:
    point = "8x8 1 forward bfloat16"
    names = {"modq-affine-4": 0.5, "modq-affine-2": 2.0, "llama-q4_0": 1.0, "llama-q2_k": 1.0}
    runs = [measured(name, (median, 1.0), point=point) for name, median in names.items()]
    report = kernels_report.render({"cells": runner.results(runs)})
    assert row_of(report, "1, modq-affine-4")[2:] == ["2.00", "-", "-"]
    assert row_of(report, "1, modq-affine-2")[2:] == ["-", "0.50", "llama-q2_k"]


@pytest.mark.parametrize(("ours", "shown"), [(1.04, "1.04 met"), (1.06, "1.06 NOT MET")])
def test_many_rows_are_divided_by_dense_float32(ours: float, shown: str) -> None:
    runs = [
        measured("dense-fp32", (1.0, 1.0), point="8x8 1024 both float32"),
        measured("modq-nf4", (ours, 1.0), point="8x8 1024 both bfloat16"),
        measured("bitsandbytes-train", (0.5, 1.0), point="8x8 1024 both bfloat16"),
    ]
    report = kernels_report.render({"cells": runner.results(runs)})
    assert row_of(report, "modq-nf4, both, bfloat16")[1] == shown
    assert "- bitsandbytes-train is ahead of modq-nf4 at 8x8 1024 both bfloat16" in report


@pytest.mark.parametrize(("ours", "shown"), [(0.4, "2.0: met"), (0.6, "2.0: NOT MET")])
def test_quantizing_is_held_against_the_peer(ours: float, shown: str) -> None:
    point = "8x8 1 quantize -"
    runs = [
        measured("quantize-modq-nf4", (ours, 1.0), point=point),
        measured("quantize-bitsandbytes", (1.0, 1.0), point=point),
        measured("quantize-modq-e8p", (21.0, 1.0), point=point),
    ]
    report = kernels_report.render({"cells": runner.results(runs)})
    assert row_of(report, "8x8 modq-nf4")[1:] == [f"{ours:.3f}", f"{1 / ours:.2f}", shown]
    assert row_of(report, "8x8 modq-e8p")[3] == "< 20 s: NOT MET"
