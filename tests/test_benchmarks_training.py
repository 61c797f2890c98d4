"""The suite `training`: its cells on small models, with a tokenizer and without, and what its report says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is run from the repository, never installed

from benchmarks import random_llama, runner, training, training_cell, training_report  # noqa: E402  # after the path
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.lora import Steps  # noqa: E402
from benchmarks.runner import Cell, Runs  # noqa: E402


def trained(system: str, speeds: list[float], peak: float = 100.0, dtype: str = "float32") -> Runs:
    """What the training suite has of a system."""
    settings = {"system": system, "setting": "", "dtype": dtype, "tokens": 8, "job": "train"}
    settings["checkpointing"] = False
    figures: Mapping[str, Any] = {
        "losses": [3.0],
        "peak_bytes": peak,
        "before_training_bytes": 50.0,
        "saved_for_backward_bytes": 1,
        "load_seconds": 1.0,
    }
    rounds = [{**figures, "tokens_per_second": [speed]} for speed in speeds]
    return Runs(Cell(f"train {system}", "", settings), list(rounds))


def test_modq_loses_or_leads_only_where_all_rounds_agree() -> None:
    ours = trained("modq", [8.0, 80.0], peak=60.0)
    others = [trained("dense", [10.0, 100.0]), trained("hqq", [9.0, 70.0]), trained("gptqmodel", [4.0, 40.0])]
    found = {(each.metric, each.against): each.verdict for each in training_report.compare([ours, *others])}
    assert found["training speed", "dense"] == "behind"
    assert found["training speed", "hqq"] == "not told apart"
    assert found["training speed", "gptqmodel"] == "ahead"
    assert found["peak memory of training", "dense"] == "ahead"
    assert found["time to load its checkpoint", "dense"] == "not told apart"


def test_only_cells_with_the_same_settings_are_compared() -> None:
    both = [trained("modq", [1.0]), trained("dense", [9.0], dtype="bfloat16")]
    assert list(training_report.compare(both)) == []


def test_the_training_report_names_losses_and_what_did_not_run() -> None:
    told = {"system": "hqq", "job": "train", "dtype": "float32", "checkpointing": False, "tokens": 8}
    missing = Runs(Cell("train hqq", "", told), [], "no environment for hqq")
    cells = runner.results([trained("modq", [5.0]), trained("dense", [10.0]), missing])
    report = training_report.render({"cells": cells})
    behind = report.partition("Where modq loses")[2].partition("###")[0]
    assert "training speed, float32: 0.50 times that of dense" in behind
    assert "- train hqq: no environment for hqq" in report


@pytest.mark.usefixtures("cells_in_this_process")
def test_the_training_suite_runs_from_end_to_end(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "training.json"
    arguments = ["training", "--out", str(out), "--model", str(tiny_llama), "--rounds", "2", "--threads", "1"]
    arguments += ["--systems", "modq,dense", "--dtypes", "float32", "--tokens", "16", "--steps", "1"]
    benchmarks_main(arguments)
    found = json.loads(out.read_text())
    cells = {each["name"]: each for each in found["cells"]}
    assert found["machine"]["threads"] == 1
    assert all(each["not_run"] is None for each in cells.values())
    assert {each["settings"]["text"] for each in cells.values()} == {"US annual messages"}
    (ours, again), (dense, _) = (cells[f"train {system} float32"]["rounds"] for system in ("modq", "dense"))
    assert ours["losses"] == again["losses"]
    assert len(ours["losses"]) == 2
    assert ours["losses"][0] == pytest.approx(dense["losses"][0], rel=0.1)
    assert ours["losses"][0] != dense["losses"][0]  # it is quantized
    assert 0 < ours["saved_for_backward_bytes"] <= dense["saved_for_backward_bytes"]
    less, _ = cells["train modq float32, checkpointing"]["rounds"]
    assert less["losses"] == pytest.approx(ours["losses"])
    assert 0 < less["saved_for_backward_bytes"] < ours["saved_for_backward_bytes"]
    assert str(tmp_path) not in json.dumps(found["cells"])
    report = out.with_suffix(".md").read_text()
    assert report in capsys.readouterr().out
    assert "Where modq loses" in report
    assert "| float32, 16 tokens a step " in report
    assert "random ids" not in report
    benchmarks_main(["table", str(out)])
    assert capsys.readouterr().out == report


def test_a_system_without_its_environment_is_reported_for_every_cell(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "python_of", lambda peer: tmp_path / "absent" / "python")
    out = tmp_path / "training.json"
    benchmarks_main(["training", "--out", str(out), "--model", str(tiny_llama), "--systems", "gptqmodel"])
    cells = json.loads(out.read_text())["cells"]
    name = "train gptqmodel float32"
    assert [each["name"] for each in cells] == [
        "prepare gptqmodel float32",
        name,
        f"{name}, checkpointing",
    ]
    assert all("python -m benchmarks.peers gptqmodel" in each["not_run"] for each in cells)
    assert "- train gptqmodel float32: no environment for gptqmodel" in out.with_suffix(".md").read_text()


@pytest.mark.usefixtures("cells_in_this_process")
def test_training_takes_batches_and_random_ids_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    model, out = tmp_path / "random-tiny", tmp_path / "training.json"
    random_llama.main(["--shape", "tiny", "--out", str(model)])
    arguments = ["training", "--out", str(out), "--model", str(model), "--rounds", "1", "--threads", "1"]
    arguments += ["--systems", "dense,modq", "--batch", "3", "--tokens", "8", "--steps", "1"]
    benchmarks_main([*arguments, "--checkpointing", "on"])
    found = json.loads(out.read_text())
    trained = [each for each in found["cells"] if each["settings"]["job"] == "train"]
    assert [each["name"] for each in trained] == [
        f"train {system} {dtype}, checkpointing"
        for dtype in ("float32", "bfloat16")
        for system in ("dense", "modq")
    ]
    assert all(each["not_run"] is None for each in found["cells"])
    assert [(each["settings"]["batch"], each["settings"]["text"]) for each in trained] == [
        (3, "random ids")
    ] * 4
    assert trained[0]["rounds"][0]["losses"][0] == pytest.approx(math.log(100), rel=0.1)  # knows nothing
    report = out.with_suffix(".md").read_text()
    assert "\nrandom-tiny; " in report
    assert "trains on random ids" in report
    for heading in ("| float32, 3 x 8 tokens a step ", "| bfloat16, 3 x 2 tokens a step "):
        assert heading in report


@pytest.mark.usefixtures("cells_in_this_process")
def test_all_tokens_of_a_batch_count(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_two_seconds(model: Any, batches: Any, loss_of: Any, rate: float) -> Steps:
        assert [tuple(batch.shape) for batch in batches] == [(3, 8)] * 2
        loss_of(model, batches[0]).backward()
        return Steps([1.0, 1.0], [9.0, 2.0])

    monkeypatch.setattr(training_cell, "train", take_two_seconds)
    out = tmp_path / "training.json"
    arguments = ["training", "--out", str(out), "--model", str(tiny_llama), "--rounds", "1", "--threads", "1"]
    arguments += ["--systems", "dense", "--dtypes", "float32", "--checkpointing", "off"]
    benchmarks_main([*arguments, "--batch", "3", "--tokens", "8", "--steps", "1"])
    _, train = json.loads(out.read_text())["cells"]
    assert train["rounds"][0]["tokens_per_second"] == [12.0]


def test_two_models_share_a_folder_for_checkpoints_but_no_checkpoint(tmp_path: Path) -> None:
    common = {"tokens": 8, "steps": 1, "threads": 1}
    one, other = (
        {
            cell.settings["checkpoint"]
            for cell in training.cells({**common, "model": model}, [False], tmp_path)
        }
        for model in ("models/one", "models/other")
    )
    assert not one & other


@pytest.mark.parametrize(("wanted", "count"), [("off", 1), ("on", 1), ("both", 2)])
def test_every_system_is_measured_with_checkpointing_and_without(
    wanted: str, count: int, tmp_path: Path
) -> None:
    common = {"model": "m", "tokens": 8, "steps": 1, "threads": 1}
    cells = [cell.settings for cell in training.cells(common, training.CHECKPOINTING[wanted], tmp_path)]
    for dtype, plan in training.PLANS.items():
        for system in plan.systems:
            told = {"job": "train", "system": system, "dtype": dtype}.items()
            found = [cell["checkpointing"] for cell in cells if told <= cell.items()]
            assert found == list(training.CHECKPOINTING[wanted])
            assert len(found) == count


def test_a_random_llama_is_dense_gaussian_and_the_same_again(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        random_llama.main(["--shape", "tiny", "--out", str(folder)])
    first, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert (first.config.num_key_value_heads, first.config.tie_word_embeddings) == (2, False)
    parameters = dict(again.named_parameters())
    for name, parameter in first.named_parameters():
        assert parameter.dtype is torch.bfloat16, name
        assert torch.equal(parameter, parameters[name]), name
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.05), name
    assert not torch.equal(first.lm_head.weight, first.model.embed_tokens.weight)
    with pytest.raises(SystemExit):
        random_llama.main(["--shape", "tiny", "--out", str(folders[0])])
