"""`modq quantize`: the error a layer, what it prints, what it writes beside the weights."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import modq
from modq.hf.observe import current_observer, observing
from modq.materialize import BLOCK_ELEMENTS
from modq.train import quantize as module
from modq.train.quantize import errors, quantize_folder


def whole_error(weight: Tensor, approximation: Tensor) -> float:
    """What `errors` computes, in float64 and on whole matrices."""
    dense = weight.double()
    return ((dense - approximation.double()).norm() / dense.norm()).item()


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_by_blocks_is_that_of_the_whole_matrix(dtype: torch.dtype) -> None:
    weight = random_weight(1031, 1021, dtype)
    assert weight.numel() > 2 * BLOCK_ELEMENTS
    qweight = modq.quantize(weight, "nf4")
    expected = whole_error(weight, modq.dequantize(qweight))
    assert 0.05 < expected < 0.2
    assert errors(weight, qweight)[0] == pytest.approx(expected, rel=1e-6)
    assert errors(weight.T.contiguous().T, qweight)[0] == pytest.approx(expected, rel=1e-6)


def test_the_error_needs_no_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(2048, 1024)
    qweight, sizes = modq.quantize(weight, "nf4"), []
    dequantize = module.dequantize_slice

    def watched(*args: Any) -> Tensor:
        block = dequantize(*args)
        sizes.append(block.numel())
        return block

    monkeypatch.setattr(module, "dequantize_slice", watched)
    errors(weight, qweight)
    assert max(sizes) <= BLOCK_ELEMENTS
    assert sum(sizes) == weight.numel()


def test_zeros_that_stay_zeros_have_no_error() -> None:
    weight = torch.zeros(4, 64)
    assert errors(weight, modq.quantize(weight, "nf4")) == (0.0, None)
    assert errors(weight, modq.quantize(random_weight(4, 64), "nf4"))[0] is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_report_has_every_layer_and_its_error(
    architecture: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny(architecture), tmp_path / "out"
    printed = json.loads(succeed("quantize", source, out, "--backend", "nf4", "--json").stdout)
    written = json.loads((out / "quantize.json").read_text())
    assert printed == written
    dense = AutoModelForCausalLM.from_pretrained(source)
    packed = AutoModelForCausalLM.from_pretrained(out)
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, modq.QuantLinear)}
    assert written["layers"].keys() == layers.keys()
    for name, layer in layers.items():
        report, weight = written["layers"][name], dense.get_submodule(name).weight
        expected = whole_error(weight.T if layer.conv1d else weight, layer.dequantize(torch.float32))
        assert report["relative_error"] == pytest.approx(expected, rel=1e-5)
        assert tuple(report["shape"]) == (layer.out_features, layer.in_features)
        assert report["backend"] == "nf4"
        assert report["bits_per_weight"] == layer.quantized_weight.bits_per_weight


def test_the_report_says_what_was_done(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("quantize", tiny_llama, out, "--backend", "nf4", "--group-size", 32)
    report = json.loads((out / "quantize.json").read_text())
    assert (report["schema"], report["modq"], report["model"]) == (1, modq.__version__, str(tiny_llama))
    assert (report["backend"], report["package"], report["version"]) == ("nf4", "modq-nf4", modq.__version__)
    assert report["options"] == {"quant_type": "nf4", "block_size": 32, "double_quant": True}
    held = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert report["sizes"]["held"] == held
    assert report["sizes"]["quantized_layers"] == len(report["layers"]) == 14
    assert 0 < sum(layer["seconds"] for layer in report["layers"].values()) < report["seconds"]


def test_the_table_has_a_line_for_each_kind_of_linear(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = succeed("quantize", tiny_llama, out, "--backend", "nf4").stdout
    head, _, table = shown.partition("\n\n")
    assert "14 linears with nf4" in head
    header, *rows = table.splitlines()
    assert header.split()[:4] == ["LINEARS", "COUNT", "BACKEND", "BITS"]
    assert len(rows) == 7
    layers = json.loads((out / "quantize.json").read_text())["layers"]
    errors = [layers[f"model.layers.{i}.mlp.up_proj"]["relative_error"] for i in range(2)]
    (row,) = [row.split() for row in rows if row.startswith("model.layers.*.mlp.up_proj ")]
    bits = layers["model.layers.0.mlp.up_proj"]["bits_per_weight"]
    worst = str(errors.index(max(errors)))
    assert row[1:] == ["2", "nf4", f"{bits:.3f}", f"{sum(errors) / 2:.2%}", f"{max(errors):.2%}", worst]


def test_layers_shows_each_linear(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = succeed("quantize", tiny_llama, out, "--backend", "nf4", "--each-layer").stdout
    rows = [line.split() for line in shown.partition("\n\n")[2].splitlines()[1:]]
    layers = json.loads((out / "quantize.json").read_text())["layers"]
    assert [row[0] for row in rows] == list(layers)
    error = layers["model.layers.1.mlp.down_proj"]["relative_error"]
    assert next(row for row in rows if row[0] == "model.layers.1.mlp.down_proj")[1:] == [
        "64x96", "nf4", f"{layers['model.layers.1.mlp.down_proj']['bits_per_weight']:.3f}", f"{error:.2%}"
    ]  # fmt: skip


def test_progress_names_each_layer_and_then_the_saving(tiny_llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    done = quantize_folder(
        str(tiny_llama),
        tmp_path / "out",
        backend="nf4",
        options={},
        progress=lambda *call: calls.append(call),
    )
    assert [name for _, _, name in calls] == [*done.layers, "saving"]
    assert [count for count, _, _ in calls] == [*range(14), 13]
    assert {total for _, total, _ in calls} == {14}


def test_a_terminal_gets_a_bar_on_stderr_and_the_report_on_stdout(tiny_llama: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from modq.cli import main; main(prog_name='modq')"]
    arguments = ["quantize", str(tiny_llama), str(tmp_path / "out"), "--backend", "nf4", "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as running:
        os.close(theirs)
        bar = b"".join(iter(lambda: read(ours), b"")).decode()
        assert running.stdout is not None
        document = json.loads(running.stdout.read())
    os.close(ours)
    assert running.returncode == 0, bar
    assert document["sizes"]["quantized_layers"] == 14
    assert "/14" in bar


def read(terminal: int) -> bytes:
    """Read on until the other end is closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


class Nobody:
    """An observer that sees nothing."""

    def planned(self, names: Any) -> None: ...

    def begins(self, name: str) -> None: ...

    def quantized(self, name: str, weight: Tensor, qweight: Any) -> None: ...


def test_an_observer_is_forgotten_after_its_block() -> None:
    outer, inner = Nobody(), Nobody()
    with observing(outer):
        with observing(inner):
            assert current_observer() is inner
        assert current_observer() is outer
        with pytest.raises(KeyError), observing(inner):
            raise KeyError
        assert current_observer() is outer
    assert current_observer() is None


def test_the_folder_of_another_format_loads_with_the_report_in_it(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="it is what loads this format")
    out = tmp_path / "out"
    succeed("quantize", tiny_llama, out, "--backend", "nf4", "--format", "bitsandbytes")
    report = json.loads((out / "quantize.json").read_text())
    assert (report["format"], len(report["layers"])) == ("bitsandbytes", 14)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(theirs.config.quantization_config, BitsAndBytesConfig)
    ours = AutoModelForCausalLM.from_pretrained(out, quantization_config=modq.ModqConfig(takeover=True))
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
