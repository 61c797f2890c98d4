"""Calibration on bad input: what is refused is refused in one line, what can be borne is borne (S7)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from commands import error_line, succeed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modq.model import quantized_layers

OPTQ = ("--backend", "optq", "--bits", 4, "--group-size", 16, "--samples", 4, "--length", 16)


def test_a_hessian_that_the_allowed_damping_does_not_mend(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    few = ("--samples", 1, "--length", 4, "--set", "damping=1e-12", "--set", "max_damping=1e-12")
    line = error_line("quantize", tiny_llama, tmp_path / "out", *OPTQ, *few, "--calibration", data)
    assert line.startswith("error: model.layers.0.self_attn.q_proj: ")
    assert "damping" in line
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_always_zero_are_borne(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    dead, model = tmp_path / "dead", AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].input_layernorm.weight.data[3:7] = 0
    model.save_pretrained(dead)
    PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(dead)
    succeed("quantize", dead, tmp_path / "out", *OPTQ, "--calibration", data)
    errors = json.loads((tmp_path / "out" / "quantize.json").read_text())["layers"]
    assert all(0 < layer["hessian_error"] < 0.3 for layer in errors.values())
    layers = dict(quantized_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    query = layers["model.layers.0.self_attn.q_proj"].dequantize()
    assert torch.isfinite(query).all()
    assert query[:, 3:7].abs().max() == 0


def test_a_shape_that_the_backend_cannot_hold(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    config = LlamaConfig.from_pretrained(tiny_llama, intermediate_size=92)
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(odd)
    PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(odd)
    given = ("--backend", "quipsharp", "--samples", 2, "--length", 8, "--calibration", data)
    line = error_line("quantize", odd, tmp_path / "out", *given)
    assert "model.layers.0.mlp.down_proj: weight has shape (64, 92)" in line
    assert "needs multiples of (1, 8)" in line
    assert not (tmp_path / "out").exists()
    succeed("quantize", odd, tmp_path / "out", *given, "--layers", "down_proj", "hqq,group_size=null")
