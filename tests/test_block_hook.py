"""`quantize_block`: a backend sees a block as it was and as it is, and what it gives back takes its place, in
memory, streamed, killed and resumed, to the same bits.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import error_line, succeed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import modq
from modq.calibrate.replay import Replay, find_blocks
from modq.calibrate.texts import text_samples
from modq.calibrate.whole import DenseBlock
from modq.errors import BackendError
from modq.model import quantized_layers
from modq.train.models import load_tokenizer

BACKENDS = Path(__file__).parent / "backends"
NORM = "post_attention_layernorm.weight"
DOWN = "mlp.down_proj"
GIVEN = ("--samples", 4, "--length", 16)

KILLED_AT_THE_SECOND_BLOCK = """
import os, signal, sys
from modq.calibrate import stream
from modq.cli import main

write, blocks = stream.write_json, []

def write_or_die(path, content):
    blocks.append(path)
    if len(blocks) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

stream.write_json = write_or_die
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Install the backends; what their hooks are given is kept here."""
    monkeypatch.syspath_prepend(BACKENDS)
    kept = importlib.import_module("modq_in_blocks_hooks").CALLS
    kept.clear()
    yield kept
    kept.clear()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 19, (1, 20), generator=generator) for _ in range(count)]


def hidden_states(model: Any, block: str, samples: list[Tensor]) -> list[Tensor]:
    """What a block of a model returns in plain forward passes."""
    found: list[Tensor] = []
    handle = model.get_submodule(block).register_forward_hook(
        lambda _, args, output: found.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        for ids in samples:
            model(ids)
    handle.remove()
    return found


def assert_same(one: Any, other: Any) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# What the hook is given


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_it_sees_the_block_as_it_was_and_as_it_is(
    architecture: str, tiny: Callable[..., Path], calls: list[Any]
) -> None:
    dense, samples = load(tiny(architecture)), tokens()
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    modq.quantize_model(model, "mending", calibration=samples)
    modq.quantize_model(plain, "mending")
    names = [name for name, _ in quantized_layers(model)]
    for block, call in zip(find_blocks(dense, names), calls, strict=True):
        inside = [name.removeprefix(block.prefix) for name in names if name.startswith(block.prefix)]
        assert (
            set(call.weights) == set(call.options) == set(call.quantized) == set(call.layers) == set(inside)
        )
        for name in inside:
            assert torch.equal(call.weights[name], dense.get_submodule(block.prefix + name).weight)
            assert not (call.quantized[name].tensors["values"].float() * 8 % 1).any()
            assert call.layers[name].hessian.shape[0] == call.weights[name].shape[1]
        for other, found in ((dense, call.targets), (plain, call.outputs)):
            mixed = copy.deepcopy(model)  # the blocks before this one are what they became
            mixed.set_submodule(block.name, copy.deepcopy(other.get_submodule(block.name)))
            for one, expected in zip(found, hidden_states(mixed, block.name, samples), strict=True):
                torch.testing.assert_close(one, expected)


def test_what_it_gives_back_takes_the_place_of_what_was_there(tiny_llama: Path, calls: list[Any]) -> None:
    dense, model, samples = load(tiny_llama), load(tiny_llama), tokens()
    modq.quantize_model(model, "mending", calibration=samples)
    for number, call in enumerate(calls):
        was, now = dense.model.layers[number], model.model.layers[number]
        ratio = torch.stack(call.targets).norm() / torch.stack(call.outputs).norm()
        assert ratio != 1
        assert torch.equal(now.get_parameter(NORM), was.get_parameter(NORM) * ratio)
        assert torch.equal(now.mlp.down_proj.dequantize(), was.mlp.down_proj.weight.half().float())
        assert torch.equal(now.mlp.up_proj.dequantize(), (was.mlp.up_proj.weight * 8).round() / 8)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "norm" in name)


def test_modules_and_tensors_stand_in_for_one_run(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    blocks = find_blocks(model, [f"model.layers.0.{DOWN}"])
    replay = Replay(model, blocks, [{"input_ids": tokens(1)[0]}], model.device)
    dense = DenseBlock(replay, blocks[0], {DOWN: model.model.layers[0].mlp.down_proj})
    parts = dict(dense.module.named_modules())
    silent, quiet = nn.Linear(96, 64, bias=False), {NORM: torch.zeros(64)}
    nn.init.zeros_(silent.weight)
    with torch.no_grad():
        assert torch.equal(dense.run(0, {DOWN: silent}), dense.run(0, {}, quiet))  # no MLP, in two ways
        assert not torch.equal(dense.run(0), dense.run(0, {}, quiet))
        assert torch.equal(dense.run(0), dense.target(0))
    with pytest.raises(RuntimeError, match="shapes"):
        dense.run(0, {DOWN: nn.Linear(5, 5)})
    half = torch.full((64,), 0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(dense.run(0, {}, {NORM: half}).sum(), [half])
    assert grad.any()
    assert dict(dense.module.named_modules()) == parts
    assert all(parameter.grad is None for parameter in model.parameters())


# Who is asked


def test_who_declines_leaves_what_quantize_made(tiny_llama: Path, calls: list[Any]) -> None:
    model, plain = load(tiny_llama), load(tiny_llama)
    modq.quantize_model(model, "mending", calibration=tokens(), mend=False)
    assert len(calls) == 2
    modq.quantize_model(plain, "mending", mend=False)
    assert len(calls) == 2  # without samples there is nothing to ask
    assert_same(model, plain)


def test_a_backend_may_do_all_in_its_hook(tiny_llama: Path, calls: list[Any]) -> None:
    dense, model = load(tiny_llama), load(tiny_llama)
    modq.quantize_model(model, "at-once", calibration=tokens())
    assert len(dict(quantized_layers(model))) == 14
    for name, layer in quantized_layers(model):
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight.half().float())
    for call in calls:
        assert not call.quantized
        assert not call.layers
        assert all(map(torch.equal, call.targets, call.outputs))  # it is still dense


def test_backends_share_a_block_and_one_target(tiny_llama: Path, calls: list[Any]) -> None:
    dense, model, samples = load(tiny_llama), load(tiny_llama), tokens()
    layers = {"mlp": {"backend": "at-once"}, "k_proj": {"backend": "nf4"}, "q_proj": {"mend": False}}
    modq.quantize_model(model, "mending", calibration=samples, layers={**layers, "o_proj": None})
    first, second, *_ = calls
    assert list(first.weights) == ["self_attn.q_proj", "self_attn.v_proj"]
    assert {name: its.mend for name, its in first.options.items()} == {
        "self_attn.q_proj": False,
        "self_attn.v_proj": True,
    }
    assert list(second.weights) == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = hidden_states(dense, "model.layers.0", samples)
    for call in (first, second):  # the first changes no norm, being told so of its first linear
        for one, other in zip(call.targets, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_the_target_stays_dense_where_another_backend_changed_a_norm(
    tiny_llama: Path, calls: list[Any]
) -> None:
    dense, model, samples = load(tiny_llama), load(tiny_llama), tokens()
    modq.quantize_model(model, "mending", calibration=samples, layers={"(q|k)_proj": {"backend": "at-once"}})
    assert [len(call.weights) for call in calls[:2]] == [2, 5]
    assert not torch.equal(
        model.model.layers[0].get_parameter(NORM), dense.model.layers[0].get_parameter(NORM)
    )
    for one, other in zip(calls[1].targets, hidden_states(dense, "model.layers.0", samples), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("type", "gave a dict, expected a BlockResult or None"),
        ("name", "gave a weight for 'mlp.side_proj', expected self_attn.q_proj, "),
        ("shape", "gave a weight of 'mending' (96, 64), expected 'mending' (64, 96)"),
        ("no tensor", "gave the dense tensor 'mlp.norm.weight'"),
        ("packed tensor", "gave the dense tensor 'mlp.down_proj.values'"),
        (
            "dtype",
            f"gave the dense tensor {NORM!r} as ((64,), torch.float64), expected ((64,), torch.float32)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(wrong: str, said: str, tiny_llama: Path) -> None:
    model, plain = load(tiny_llama), load(tiny_llama)
    with pytest.raises(BackendError) as error:
        modq.quantize_model(model, "mending", calibration=tokens(), wrong=wrong)
    assert str(error.value).startswith("model.layers.0: backend 'mending': quantize_block() ")
    assert said in str(error.value)
    modq.quantize_model(plain, "mending", layers={r"layers\.1": None}, wrong=wrong)
    assert_same(model, plain)


def test_a_linear_that_a_hook_forgets_is_said(tiny_llama: Path) -> None:
    with pytest.raises(BackendError, match=r"gave no weight for 'mlp\.down_proj', expected one"):
        modq.quantize_model(load(tiny_llama), "at-once", calibration=tokens(), mend=False)


# In memory, streamed, killed and resumed


@pytest.mark.parametrize("backend", ["mending", "at-once"])
def test_streamed_killed_and_resumed_it_is_the_same(
    backend: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    through, out = tmp_path / "through", tmp_path / "out"
    job = ("--backend", backend, *GIVEN, "--calibration", data)
    succeed("quantize", tiny_llama, through, *job)
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT_THE_SECOND_BLOCK]
    killed = subprocess.run(
        [*command, "quantize", str(tiny_llama), str(out), *map(str, job)],
        env={**os.environ, "PYTHONPATH": str(BACKENDS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert "add --resume" in error_line("quantize", tiny_llama, out, *job)
    succeed("quantize", tiny_llama, out, *job, "--resume")
    for path in sorted(through.iterdir()):
        if path.name not in ("quantize.json", "README.md"):  # they have the time it took; the folder's name
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    model, streamed = load(tiny_llama), load(out)
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    samples = text_samples(texts, load_tokenizer(str(tiny_llama)), samples=4, length=16)
    modq.quantize_model(model, backend, calibration=samples)
    assert_same(streamed, model)
    norms = [each.model.layers[1].get_parameter(NORM) for each in (streamed, load(tiny_llama))]
    assert torch.equal(*norms) == (backend == "at-once")  # nothing is lost there, so nothing to make up for


def test_the_report_is_of_what_a_layer_became_in_the_end(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    succeed("quantize", tiny_llama, tmp_path / "out", "--backend", "mending", *GIVEN, "--calibration", data)
    layers = json.loads((tmp_path / "out" / "quantize.json").read_text())["layers"]
    assert len(layers) == 14
    for name, layer in layers.items():
        mended = name.endswith(DOWN)
        assert (layer["relative_error"] < 1e-3) == mended, name
        assert (layer["hessian_error"] < 1e-3) == mended, name
