"""Calibration: each linear learns from the inputs that the quantized linears before it give it, in memory or
streamed, killed and resumed, to the same bits.

This file is also the program that is killed: `python test_calibrate.py MODEL OUTPUT DATA POINT`.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import error_line, run
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import modq
from modq.calibrate import stream
from modq.calibrate.engine import quantize_blocks
from modq.calibrate.replay import Block, CalibrationError, Outputs, find_blocks, inside_blocks
from modq.calibrate.texts import as_samples, text_samples
from modq.cli import main
from modq.errors import CheckpointError, OptionError
from modq.hf.quantizer import default_skips
from modq.model import Recipe, quantized_layers
from modq.model import plan_layers as plan_of
from modq.spec import Calibration
from modq.train.models import load_tokenizer

ARCHITECTURES = ["llama", "gemma", "qwen3", "opt", "bloom", "gpt2", "t5"]
BACKEND, OPTIONS = "optq", {"bits": 4, "group_size": 32}
GIVEN = ("--backend", "optq", "--bits", 4, "--group-size", 32, "--samples", 4, "--length", 16)


def load(folder: Path) -> Any:
    auto = (
        AutoModelForSeq2SeqLM
        if AutoConfig.from_pretrained(folder).is_encoder_decoder
        else AutoModelForCausalLM
    )
    return auto.from_pretrained(folder, dtype=torch.float32)


def samples_for(model: Any, count: int = 3) -> list[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return as_samples(
        [torch.randint(4, 19, (1, 20), generator=generator) for _ in range(count)], model.config
    )


def plan(model: nn.Module, backend: str = BACKEND, **options: Any) -> dict[str, Any]:
    recipe = Recipe(backend, options or OPTIONS)
    wanted = plan_of(model, recipe, default_skips(model, recipe))
    return inside_blocks(wanted, find_blocks(model, wanted))


class Seen:
    """Keeps what each linear was given to learn from."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.hessians: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def begins(self, name: str) -> None:
        self.order.append(name)

    def quantized(self, name: str, weight: Tensor, layer: nn.Module, calibration: Calibration | None) -> None:
        assert calibration is not None
        assert calibration.hessian is not None
        self.hessians[name] = calibration.hessian.clone()
        self.tokens[name] = calibration.samples


def moments(model: Any, names: list[str], samples: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The second moments of the inputs of linears in plain forward passes of the whole model, in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in samples:
            model.eval()(**sample)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(parts).double() for name, parts in found.items()}
    return {name: x.T @ x / x.shape[0] for name, x in rows.items()}


# What each linear learns from


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_linear_learns_from_what_the_quantized_ones_before_it_give(
    architecture: str, true_sequential: bool, tiny: Callable[..., Path]
) -> None:
    dense = load(tiny(architecture))
    model, seen = copy.deepcopy(dense), Seen()
    samples, wanted = samples_for(dense), plan(dense)
    quantize_blocks(
        model, wanted, samples, device=model.device, observer=seen, true_sequential=true_sequential
    )
    assert sorted(seen.order) == sorted(wanted)
    blocks = find_blocks(dense, wanted)
    checked = blocks[-1]  # the one that all others stand before: the last decoder block of an encoder-decoder
    inside = [name for name in seen.order if name.startswith(checked.prefix)]
    mixed = copy.deepcopy(model)
    for name in inside:
        mixed.set_submodule(name, copy.deepcopy(dense.get_submodule(name)))
    for name in inside:  # quantized one after the other, or all at the end
        expected = moments(mixed, [name], samples)[name]
        torch.testing.assert_close(seen.hessians[name].double(), expected, rtol=1e-4, atol=1e-5, msg=name)
        if true_sequential and seen.hessians[name] is not None:
            mixed.set_submodule(name, model.get_submodule(name))
    if true_sequential:
        apart = moments(dense, inside, samples)
        assert any(not torch.allclose(seen.hessians[n].double(), apart[n], rtol=1e-3) for n in inside)


def test_every_token_counts_once(tiny_llama: Path) -> None:
    model, seen = load(tiny_llama), Seen()
    quantize_blocks(model, plan(model), samples_for(model, 5), device=model.device, observer=seen)
    assert set(seen.tokens.values()) == {5 * 20}


def test_a_backend_that_needs_no_data_stands_beside_one_that_does(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    given = [sample["input_ids"] for sample in samples_for(model)]
    modq.quantize_model(
        model, BACKEND, calibration=given, layers={"down_proj": {"backend": "nf4"}}, **OPTIONS
    )
    kinds = {name.rpartition(".")[2]: layer.backend for name, layer in quantized_layers(model)}
    assert kinds.pop("down_proj") == "nf4"
    assert set(kinds.values()) == {BACKEND}


# In memory, streamed, killed and resumed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_it_becomes_what_it_becomes_in_memory_and_trains(
    architecture: str, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    folder = tiny(architecture)
    result = run("quantize", folder, tmp_path / "out", *GIVEN, "--calibration", data)
    assert result.exit_code == 0, result.output
    streamed, model = load(tmp_path / "out"), load(folder)
    tokenizer = load_tokenizer(str(folder))
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    samples = as_samples(text_samples(texts, tokenizer, samples=4, length=16), model.config)
    modq.quantize_model(model, BACKEND, calibration=samples, **OPTIONS)
    expected, found = dict(quantized_layers(model)), dict(quantized_layers(streamed))
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        for tensor_name, tensor in layer.named_packed():
            assert torch.equal(getattr(found[name], tensor_name), tensor), f"{name}.{tensor_name}"
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    resolved = [each.config.quantization_config.resolved for each in (streamed, model)]
    assert resolved[0]["source"] == resolved[1]["source"]
    trainable = get_peft_model(
        streamed, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    trainable(
        **samples[0], labels=samples[0].get("decoder_input_ids", samples[0]["input_ids"])
    ).loss.backward()
    assert all(p.grad.any() for p in trainable.parameters() if p.requires_grad)


def test_the_report_has_the_error_in_both_norms(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_llama, tmp_path / "out", *GIVEN, "--calibration", data, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert report["calibration"]["samples"] == 4
    assert len(report["layers"]) == 14
    assert 0 < sum(layer["seconds"] for layer in report["layers"].values()) < report["seconds"]
    for name, layer in report["layers"].items():
        assert 0 < layer["hessian_error"] < layer["relative_error"] < 0.3, name  # OPTQ minimizes the first
    model, seen = load(tiny_llama), Seen()
    tokenizer = load_tokenizer(str(tiny_llama))
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    samples = text_samples(texts, tokenizer, samples=4, length=16)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in report["layers"]}
    quantize_blocks(model, plan(model), samples, device=model.device, observer=seen)
    name = "model.layers.1.mlp.down_proj"
    weight, hessian = dense[name].double(), seen.hessians[name].double()
    error = weight - model.get_submodule(name).dequantize(torch.float32).double()
    expected = torch.sqrt(torch.trace(error @ hessian @ error.T) / torch.trace(weight @ hessian @ weight.T))
    assert report["layers"][name]["hessian_error"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_text_ends_with_sep_where_the_tokenizer_is_an_encoders(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.sep_token, tokenizer.eos_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(tmp_path)
    (ids,) = text_samples(["red blue"], load_tokenizer(str(tmp_path)), samples=1, length=3)
    assert ids["input_ids"][0, -1] == tokenizer.sep_token_id
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no eos_token; set one in its tokenizer_config"):
        load_tokenizer(str(tmp_path))


SUPPORTED = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")}
"""This file imports from there, also as a program."""

POINTS = ["outputs", "shard", "journal", "drop", "index"]
"""Where the program below is killed, in the second block or, at the end, in what is written last."""


def killed_at(point: str) -> None:
    """Make this process kill itself at a point of the work."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_second_block(function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        calls: list[int] = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2 and not after:
                kill()
            result = function(*args, **kwargs)
            if len(calls) == 2:
                kill()
            return result

        return counted

    if point == "outputs":
        put, count = Outputs.put, []

        def counted_put(self: Outputs, number: int, output: Any) -> None:
            count.append(number)
            put(self, number, output)
            if len(count) == 4 + 2:
                kill()

        Outputs.put = counted_put
    elif point == "shard":
        stream.save_file = at_second_block(stream.save_file, after=True)
    elif point == "journal":
        stream.write_json = at_second_block(stream.write_json)
    elif point == "drop":
        stream.Source.drop = at_second_block(stream.Source.drop)
    elif point == "index":
        stream.Writer._write_index = kill


@pytest.fixture(scope="module")
def through(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("through") / "out"
    result = run("quantize", tiny_llama, out, *GIVEN, "--calibration", data)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bytes(
    point: str, tiny_llama: Path, data: Path, through: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", __file__, str(tiny_llama), str(out), str(data), point]
    killed = subprocess.run(command, env=SUPPORTED, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not out.exists()
    job = ("quantize", tiny_llama, out, *GIVEN, "--calibration", data)
    assert "add --resume" in error_line(*job)
    assert "began with bits=4, not 3" in error_line(*job, "--resume", "--bits", 3)
    result = run(*job, "--resume")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [out]
    for path in sorted(through.iterdir()):
        if path.name in ("quantize.json", "README.md"):  # it has the time that it took; the folder's name
            continue
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in through.iterdir()}


# What cannot be calibrated


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "learns from text, and none was given; add --calibration FILE"),
        (("--calibration", "missing.txt"), "'missing.txt' does not exist"),
        (("--calibration", "DATA", "--samples", 1000), "expected 1000 samples of 16 tokens"),
        (("--calibration", "DATA", "--length", 129), "longer than the context of"),
        (("--calibration", "DATA", "--resume"), "nothing to resume"),
        (("--calibration", "DATA", "--backend", "nf4"), "does not learn from data"),
        (("--calibration", "DATA", "--bits", 5), "bits"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    given: tuple[object, ...], said: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [data if entry == "DATA" else entry for entry in given]
    job = [*GIVEN, *arguments]
    if "nf4" in given:  # it has no bits to choose
        job = ["--backend", "nf4", "--calibration", data]
    assert said in error_line("quantize", tiny_llama, tmp_path / "out", *job)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_refused(through: Path, data: Path, tmp_path: Path) -> None:
    assert "quantized already" in error_line(
        "quantize", through, tmp_path / "o", *GIVEN, "--calibration", data
    )


def test_a_damaged_journal_is_one_line(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    out, job = tmp_path / "out", ("quantize", tiny_llama, tmp_path / "out", *GIVEN, "--calibration", data)
    point = [sys.executable, "-W", "ignore", __file__, str(tiny_llama), str(out), str(data), "index"]
    subprocess.run(point, env=SUPPORTED, capture_output=True, timeout=300, check=False)
    journal = tmp_path / "out.unfinished" / stream.JOURNAL
    journal.write_text(journal.read_text()[:100])
    assert "is damaged" in error_line(*job, "--resume")


@pytest.mark.parametrize("calibration", [[], ["a text"]])
def test_data_of_the_wrong_kind_is_said(calibration: list[Any], tiny_llama: Path) -> None:
    with pytest.raises(CalibrationError, match="calibration holds"):
        modq.quantize_model(load(tiny_llama), BACKEND, calibration=calibration, **OPTIONS)


def test_a_plain_module_has_no_blocks_to_calibrate() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(OptionError, match="for models of transformers, this is a Sequential"):
        modq.quantize_model(model, BACKEND, calibration=[torch.zeros(1, 4, dtype=torch.long)], **OPTIONS)


def test_a_block_that_the_model_never_calls_is_said(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))  # config.num_hidden_layers is still 2
    with pytest.raises(CalibrationError, match=r"does not come to model\.layers\.2"):
        quantize_blocks(model, plan(model), samples_for(model), device=model.device)


def test_outputs_come_back_from_files_as_they_were(tmp_path: Path) -> None:
    for number, output in enumerate([torch.ones(2), (torch.ones(2), None, torch.zeros(1, 3)), (None,)]):
        outputs = Outputs(tmp_path / str(number))
        outputs.put(0, output)
        found = outputs.get(0, torch.device("cpu"))
        assert type(found) is type(output)
        pairs = zip(found, output, strict=True) if isinstance(output, tuple) else [(found, output)]
        for left, right in pairs:
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)


def test_blocks_are_found_in_their_order(tiny: Callable[..., Path]) -> None:
    model = load(tiny("t5"))
    stacks = [(block.stack, block.index) for block in find_blocks(model, plan(model))]
    assert stacks == [("encoder.block", 0), ("encoder.block", 1), ("decoder.block", 0), ("decoder.block", 1)]
    assert Block("a.3", "a", 3).prefix == "a.3."


if __name__ == "__main__":
    killed_at(sys.argv[4])
    main(["quantize", sys.argv[1], sys.argv[2], *map(str, GIVEN), "--calibration", sys.argv[3]])
