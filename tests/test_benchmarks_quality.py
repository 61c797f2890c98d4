"""The suites on quality: that they measure what they say, each from end to end on a tiny model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is run from the repository, never installed

from benchmarks import layers, low_bits_report, quality_cell, quality_report, quality_systems, runner  # noqa: E402
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.real_models import rescale_gemma3  # noqa: E402
from benchmarks.runner import Cell, Runs  # noqa: E402


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_systems, "CALIBRATION_TOKENS", 16)
    monkeypatch.setattr(quality_systems, "GROUP", 32)
    monkeypatch.setattr(layers, "SHAPES", ((16, 128),))


def run_suite(out: Path, *arguments: str) -> dict[str, Any]:
    common = ["--out", str(out), "--threads", "1", "--work", str(out.parent / "work")]
    if out.stem != "layers":
        common += ["--calibration-windows", "4"]
    benchmarks_main([out.stem, *common, *arguments])
    found = json.loads(out.read_text())
    assert isinstance(found, dict)
    return found


def scored(system: str, losses: list[float], kind: str = "nll") -> Runs:
    settings = {
        "job": "score",
        "system": system,
        "setting": "s",
        "weights": "smollm2",
        "tokens": 8,
        "calibration_windows": 4,
    }
    figures = {"kind": kind, "scores": losses, "bits_per_weight": 4.5, "score_seconds": 1.0}
    return Runs(Cell(f"score {system}", "", settings), [figures])


def test_perplexities_are_compared_window_by_window() -> None:
    runs = [scored("modq-hqq-4", [3.0, 5.0]), scored("hqq-4", [3.1, 4.9])]
    (found,) = quality_report.comparisons(runs)
    assert found.ratio == pytest.approx(1.0)  # exp of the mean of -0.1 and +0.1
    assert found.stderr == pytest.approx(0.1)
    assert found.holds
    (worse,) = quality_report.comparisons([scored("modq-hqq-4", [3.2, 5.1]), runs[1]])
    assert worse.ratio == pytest.approx(math.exp(0.15))
    assert not worse.holds
    assert "NO" in quality_report.render(
        {"cells": runner.results([scored("modq-hqq-4", [9.0, 9.0]), runs[1]])}
    )


def test_embedding_errors_are_compared_by_their_means() -> None:
    ours, theirs = scored("modq-hqq-4", [0.11, 0.11], "embedding error"), scored("hqq-4", [0.1, 0.1], "e")
    (found,) = quality_report.comparisons([ours, theirs])
    assert found.ratio == pytest.approx(1.1)


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_to_the_nearest_has_even_steps_and_keeps_what_lies_on_them(bits: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rounded = quality_systems.round_to_nearest(weight, bits)
    groups = rounded.unflatten(1, (-1, 32))
    assert all(len(group.unique()) <= 2**bits for row in groups for group in row)
    step = weight.unflatten(1, (-1, 32))
    step = (step.amax(2).clamp(min=0) - step.amin(2).clamp(max=0)) / (2**bits - 1)
    apart = (rounded - weight).unflatten(1, (-1, 32)).abs().amax(2)
    assert (apart <= 1.01 * step).all()  # the zero is rounded, so that an end may be cut by half a step
    torch.testing.assert_close(quality_systems.round_to_nearest(rounded, bits), rounded, rtol=2e-3, atol=1e-3)


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_quality_suite_runs_from_end_to_end(tiny_llama: Path, tmp_path: Path) -> None:
    names = "dense,rtn-2,modq-optq-2,modq-optq-4,modq-quipsharp-2"
    given = ("--model", str(tiny_llama), "--systems", names, "--windows", "4", "--tokens", "16")
    found = run_suite(tmp_path / "quality.json", *given)
    cells = {each["name"]: each["rounds"][0] for each in found["cells"]}
    assert all(each["not_run"] is None for each in found["cells"])
    nll = {name: sum(cells[f"score {name}"]["scores"]) for name in names.split(",")}
    assert len(cells["score dense"]["scores"]) == 4
    assert len({round(value, 6) for value in nll.values()}) == 5  # each is another model
    bits = {name: cells[f"score {name}"]["bits_per_weight"] for name in names.split(",")}
    assert bits["dense"] is None
    assert bits["rtn-2"] == 2 + 18 / 32
    assert 2 < bits["modq-optq-2"] < 3 < bits["modq-optq-4"] < 5
    assert 2 < bits["modq-quipsharp-2"] < 3
    report = (tmp_path / "quality.md").read_text()
    assert "modq-quipsharp-2 (2 bits" in report
    assert str(tmp_path) not in json.dumps(found["cells"])


def test_a_model_without_a_head_is_scored_by_its_embeddings(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    model = quality_systems.load_dense(tiny_llama).model
    model.save_pretrained(bare)
    quality_systems.load_tokenizer(str(tiny_llama)).save_pretrained(bare)
    errors = {}
    for name in ("dense", "modq-hqq-4", "modq-hqq-2"):
        settings = {
            "system": name, "model": str(bare), "checkpoint": str(tmp_path / name),
            "threads": torch.get_num_threads(), "windows": 3, "tokens": 16, "calibration_windows": 4,
        }  # fmt: skip
        quality_cell.main({**settings, "job": "prepare"})
        figures = quality_cell.main({**settings, "job": "score"})
        assert figures["kind"] == "embedding error"
        errors[name] = sum(figures["scores"])
    assert errors["dense"] == 0
    assert 0 < errors["modq-hqq-4"] < errors["modq-hqq-2"]


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_suite_on_low_bits_runs_from_end_to_end(tiny_llama: Path, tmp_path: Path) -> None:
    given = ("--model", str(tiny_llama), "--systems", "dense,modq-hqq-4", "--windows", "4", "--tokens", "16")
    found = run_suite(
        tmp_path / "low_bits.json", *given,
        "--rounds", "1", "--steps", "6", "--learning-rate", "1e-2",
    )  # fmt: skip
    cells = {each["name"]: each["rounds"][0] for each in found["cells"]}
    for figures in cells.values():
        assert sum(figures["after"]) < sum(figures["before"])
        assert figures["trained_tokens"] == 6 * 16
    assert "- modq-hqq-4, trained: " in (tmp_path / "low_bits.md").read_text()


def test_low_bits_lose_where_the_numbers_say_so() -> None:
    assert "0.500 nats a token worse" in low_bits_report._apart([2.5, 2.51], [2.0, 2.01])
    assert "better" in low_bits_report._apart([1.5, 1.51], [2.0, 2.01])
    assert "no worse or better" in low_bits_report._apart([2.5, 1.5], [2.0, 2.0])


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_suite_on_layers_runs_from_end_to_end(tmp_path: Path) -> None:
    given = ("--systems", "modq-optq,modq-hqq", "--rounds", "2", "--repetitions", "1")
    found = run_suite(tmp_path / "layers.json", "--model", str(tmp_path), *given)
    optq, hqq = (each["rounds"][1] for each in found["cells"])
    assert [len(optq[f"seconds 16x128, {bits} bits"]) for bits in (4, 3, 2)] == [1, 1, 1]
    for bits in (4, 3, 2):
        key = f"error 16x128, {bits} bits"
        assert 0 < optq[key] < hqq[key] < 1.5  # the Hessian is of use


def test_rescaling_gemma3_keeps_the_function_and_leaves_the_grid() -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
        for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
            torch.nn.init.normal_(norm.weight, std=0.2)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before, weight = model(ids).logits, model.model.layers[0].mlp.down_proj.weight.clone()
        rescale_gemma3(model, torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.model.layers[0].mlp.down_proj.weight, weight, rtol=0.05)
