"""Several backends in one model: quantized, saved, loaded, trained and inspected as any other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import error_line, run, succeed
from transformers import AutoModelForCausalLM

import modq
from modq.model import quantized_layers

LAYERS = (
    "--layers",
    "down_proj",
    "hqq,bits=4,group_size=32",
    "--layers",
    r"layers[.]0[.]self_attn[.]q",
    "dense",
)
EXPECTED = {
    **{f"model.layers.{block}.self_attn.{part}_proj": "quipsharp" for block in (0, 1) for part in "qkvo"},
    **{f"model.layers.{block}.mlp.{part}_proj": "quipsharp" for block in (0, 1) for part in ("gate", "up")},
    **{f"model.layers.{block}.mlp.down_proj": "hqq" for block in (0, 1)},
}
del EXPECTED["model.layers.0.self_attn.q_proj"]


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    text = ("--calibration", data, "--samples", 4, "--length", 32)
    succeed("quantize", tiny_llama, out, "--backend", "quipsharp", "--bits", 2, *LAYERS, *text)
    return out


def test_each_linear_is_quantized_as_the_first_regex_says(mixed: Path) -> None:
    report = json.loads((mixed / "quantize.json").read_text())
    assert {name: layer["backend"] for name, layer in report["layers"].items()} == EXPECTED
    assert report["overrides"]["down_proj"] == {"backend": "hqq", "bits": 4, "group_size": 32}
    calibrated = {
        layer["backend"] for layer in report["layers"].values() if layer["hessian_error"] is not None
    }
    assert calibrated == {"quipsharp"}  # HQQ learns nothing from data


def test_the_table_shows_the_error_of_outputs_where_it_is_known(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    given = ("--backend", "optq", "--group-size", 32, "--layers", "down_proj", "hqq,group_size=32")
    text = ("--calibration", data, "--samples", 2, "--length", 16)
    for number, each in enumerate(((), ("--each-layer",))):
        out = tmp_path / str(number)
        shown = succeed("quantize", tiny_llama, out, *given, *text, *each).stdout
        layers = json.loads((out / "quantize.json").read_text())["layers"]
        header, *rows = [re.split("  +", line) for line in shown.partition("\n\n")[2].splitlines()]
        assert header[-1] == "OF OUTPUTS"
        last = {row[0]: row[-1] for row in rows}
        error = layers["model.layers.0.mlp.up_proj"]["hessian_error"]
        if each:
            assert last["model.layers.0.mlp.up_proj"] == f"{error:.2%}"
            assert last["model.layers.0.mlp.down_proj"] == "-"
        else:
            mean = (error + layers["model.layers.1.mlp.up_proj"]["hessian_error"]) / 2
            assert last["model.layers.*.mlp.up_proj"] == f"{mean:.2%}"
            assert last["model.layers.*.mlp.down_proj"] == "-"


def test_it_loads_bit_for_bit_and_trains(mixed: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed)
    assert {name: layer.backend for name, layer in quantized_layers(model)} == EXPECTED
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=0, atol=0)
    adapter = tmp_path / "adapter"
    succeed("finetune", mixed, "--data", data, "--output", adapter, "--max-steps", 6, "--lr", 1e-2)
    history = json.loads((adapter / "train.json").read_text())["history"]
    losses = [entry["loss"] for entry in history["steps"]]
    assert losses[-1] < losses[0]


def test_inspect_shows_both(mixed: Path) -> None:
    schemes = json.loads(succeed("inspect", mixed, "--json").stdout)["schemes"]
    assert {scheme["backend"]: scheme["layers"] for scheme in schemes} == {"quipsharp": 11, "hqq": 2}


def test_in_memory_it_is_the_same(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    samples = [torch.arange(32)[None] % 19 for _ in range(2)]
    layers = {
        "down_proj": {"backend": "hqq", "bits": 4, "group_size": 32},
        "layers[.]0[.]self_attn[.]q": None,
    }
    modq.quantize_model(model, "quipsharp", bits=2, layers=layers, calibration=samples)
    assert {name: layer.backend for name, layer in quantized_layers(model)} == EXPECTED


def test_without_calibration_backends_that_need_none_mix_while_loading(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    layers = ("--layers", "down_proj", "hqq", "--layers", "q_proj", "block_size=32")
    succeed("quantize", tiny_llama, out, "--backend", "nf4", *layers)
    model = AutoModelForCausalLM.from_pretrained(out)
    found = {name.rpartition(".")[2]: layer for name, layer in quantized_layers(model)}
    assert (found["down_proj"].backend, found["up_proj"].backend) == ("hqq", "nf4")
    assert (found["q_proj"].options.block_size, found["k_proj"].options.block_size) == (32, 64)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (("down_proj", "optq"), "backend 'optq' learns from text, and none was given"),
        (("down_proj", "gguf"), "gguf"),
        (("down_proj", "hqq,width=4"), "backend 'hqq' has no option 'width'"),
        (("down_proj", "hqq,4"), "'4' is not a setting; expected key=value"),
        (("(", "hqq"), "("),
        (("down_projection", "hqq"), "'down_projection' matches no linear of the model"),
    ],
)
def test_what_is_wrong_is_one_line(
    tiny_llama: Path, tmp_path: Path, layers: tuple[str, str], said: str
) -> None:
    out = tmp_path / "out"
    assert said in error_line("quantize", tiny_llama, out, "--backend", "nf4", "--layers", *layers)
    assert not out.exists()


def test_a_regex_without_how_is_a_usage_error(tiny_llama: Path, tmp_path: Path) -> None:
    given = run("quantize", tiny_llama, tmp_path / "out", "--backend", "nf4", "--layers", "down_proj")
    assert given.exit_code == 2
