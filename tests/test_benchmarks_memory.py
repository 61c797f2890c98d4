"""The suite `memory`: its checkpoints, its step and its table, on a Llama that is small."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is run from the repository, never installed

from benchmarks import memory, memory_report, runner  # noqa: E402  # after the path
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.random_llama import Shape  # noqa: E402
from benchmarks.runner import Cell, Runs  # noqa: E402


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_memory_suite_runs_from_end_to_end(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.SHAPES, "7b", Shape(256, 256, 2, 4, vocabulary=100))
    monkeypatch.setattr("modq.estimate.parts.process_bytes", lambda trainer: 1000)
    out, work = tmp_path / "memory.json", tmp_path / "work"
    words = ["memory", "--out", str(out), "--model", str(tiny_llama), "--rounds", "1", "--threads", "1"]
    benchmarks_main([*words, "--work", str(work), "--tokens", "8"])
    cells = {each["name"]: each for each in json.loads(out.read_text())["cells"]}
    assert [each["not_run"] for each in cells.values()] == [None] * 6
    for system, base in memory.BASES.items():
        (prepared,), (step,) = (cells[f"{job} 7b {system}"]["rounds"] for job in ("prepare", "step"))
        assert 0 < step["loss"] < 20
        assert step["layers_quantized"] == 14
        peaks = [step[f"{name}_bytes"] for name in ("load_peak", "before_step", "peak")]
        # The kernel counts pages by thread and sums them lazily: its peak may fall by some pages.
        assert all(earlier <= later + 2**20 for earlier, later in itertools.pairwise(peaks))
        assert peaks[0] > 0
        assert prepared["estimate_bytes"] == sum(prepared["parts"].values())
        packed = prepared["parts"]["codes"] + prepared["parts"]["scales"]
        linears, rest = 2 * 7 * 256 * 256, 2 * (2 * 100 * 256 + 5 * 256)
        bits = 8 * packed / linears
        assert bits == pytest.approx(4.127 if system == "nf4" else 2.07, abs=0.15), base
        assert packed + rest <= prepared["checkpoint_bytes"] < packed + rest + 40_000  # names and shapes
        assert f"| 7b {system}, 2 layers " in out.with_suffix(".md").read_text()
        files = sorted((work / f"memory-{system}-7b-2").glob("*.safetensors"))
        assert len(files) == 3  # two layers, and what is outside of them
        with safe_open(files[0], "pt") as opened:
            codes = opened.get_tensor("model.layers.0.mlp.up_proj.codes")
        assert len(codes.view(torch.uint8).unique()) == 256


def step(peak: float, target: float | None) -> list[Runs]:
    told: dict[str, Any] = {"shape": "7b", "system": "nf4", "dtype": "bfloat16", "layers": 32, "setting": "s"}
    parts = {"codes": int(1e9), "process": int(2e9)}
    prepared = {"estimate_bytes": 3e9, "checkpoint_bytes": 1e9, "parts": parts}
    figures = {"peak_bytes": peak, "step_seconds": 7.0, "loss": 10.5}
    return [
        Runs(Cell("prepare", "", {**told, "job": "prepare", "target": target}), [prepared]),
        Runs(Cell("step", "", {**told, "job": "step", "target": target}), [figures]),
    ]


@pytest.mark.parametrize(
    ("peak", "target", "shown"), [(3.1e9, 3.2, "3.2 holds"), (3.3e9, 3.2, "3.2 MISSED"), (3.3e9, None, "-")]
)
def test_the_report_says_whether_a_target_holds(peak: float, target: float | None, shown: str) -> None:
    report = memory_report.render({"cells": runner.results(step(peak, target))})
    row = next(line for line in report.splitlines() if line.startswith("| 7b nf4, 32 layers"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2] == shown
    assert f"{3e9 / peak:.3f}" in row
    assert "2.000" in report  # the part "process"
