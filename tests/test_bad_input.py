"""What a user, a file or a disk can get wrong: one line, exit code 1, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import error_line, only_error
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modq import ModqConfig
from modq.cli import main

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The folder in which the results shall be written; a command that fails leaves it empty."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def quantize(model: Path, parent: Path) -> Callable[..., str]:
    """Run `modq quantize` on the damaged model, see it fail cleanly, and return what it said."""

    def refused(*options: object) -> str:
        given = options if "--backend" in options else ("--backend", "nf4", *options)
        said = error_line("quantize", model, parent / "out", *given)
        assert list(parent.iterdir()) == []
        return said

    return refused


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def raising(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(model: Path, quantize: Callable[..., str], value: float) -> None:
    edit_tensors(model, lambda tensors: tensors[f"{LAYER}.weight"][3].fill_(value))
    said = quantize()
    assert f"error: {LAYER}: weight of shape (96, 64) has 64 NaN or infinite values" in said


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "header is no JSON": lambda content: content[:8] + b"x" * 32 + content[40:],
    "header too long": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_file_is_named(model: Path, quantize: Callable[..., str], damage: str) -> None:
    (model / WEIGHTS).write_bytes(HEADERS[damage]((model / WEIGHTS).read_bytes()))
    said = quantize()
    assert f"{str(model / WEIGHTS)!r} cannot be read" in said
    assert said.endswith("is it copied or downloaded whole?")


def test_a_missing_shard_is_named(model: Path, quantize: Callable[..., str]) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    places = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "gone.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "gone.safetensors" in quantize()


@pytest.mark.parametrize("name", ["model.norm.weight", f"{LAYER}.weight"])
def test_a_missing_tensor_is_named(model: Path, quantize: Callable[..., str], name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(name))
    assert f"no tensor {name}" in quantize()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "vocab_size",
            "lm_head.weight is (64, 64), its config expects (72, 64): config and tensors disagree",
        ),
        ("intermediate_size", "the checkpoint's weight is (64, 96), the model's config expects (64, 72)"),
    ],
)
def test_a_config_that_disagrees(model: Path, quantize: Callable[..., str], key: str, said: str) -> None:
    edit_json(model / "config.json", lambda config: config.update({key: 72}))
    assert said in quantize()


def test_a_config_that_is_no_json(model: Path, quantize: Callable[..., str]) -> None:
    (model / "config.json").write_text("{")
    assert "is not a valid JSON file" in quantize()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(model: Path, quantize: Callable[..., str], file: str) -> None:
    (model / file).write_text("{")
    assert "the tokenizer of" in quantize()


# Backends


def test_an_unknown_backend(quantize: Callable[..., str]) -> None:
    said = quantize("--backend", "guess")
    assert "no quantizer backend 'guess' is installed; usable: " in said
    assert "pip install" not in said


def test_an_unknown_option(quantize: Callable[..., str]) -> None:
    assert "backend 'nf4' has no option 'colour'; it has block_size, " in quantize("--set", "colour=red")


def test_a_shape_that_the_backend_does_not_take(
    quantize: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "modq_wide-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modq-wide\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modq.quantizers]\nwide = modq_wide:INFO\n")
    (info.parent / "modq_wide.py").write_text(
        "from dataclasses import replace\nfrom modq_nf4 import INFO as NF4\n"
        "INFO = replace(NF4, name='wide', multiple_of=(1, 60))\n"
    )
    monkeypatch.syspath_prepend(info.parent)
    said = quantize("--backend", "wide")
    assert "error: model.layers.0.mlp.down_proj: weight has shape (64, 96); backend 'wide' needs" in said
    assert "leave the layer out" in said


def test_a_checkpoint_whose_backend_is_not_installed(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    CliRunner().invoke(main, ["quantize", str(tiny_llama), str(folder), "--backend", "nf4"])

    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"]["backend"] = "gone"
        (scheme,) = config["quantization_config"]["resolved"]["schemes"]
        scheme.update(backend="gone", package="modq-gone", version="2.0")

    edit_json(folder / "config.json", rename)
    for command in (("inspect", folder), ("generate", folder, "--prompt", "the union")):
        said = error_line(*command)
        assert "needs backend 'gone' of modq-gone 2.0, which is not usable here" in said
        assert "pip install" not in said  # of a name that a file gave


# Where the result goes


def test_an_output_that_exists(model: Path, parent: Path) -> None:
    (parent / "kept").write_text("mine")
    said = error_line("quantize", model, parent, "--backend", "nf4")
    assert "exists already" in said
    assert [path.name for path in parent.iterdir()] == ["kept"]


def test_an_output_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = error_line("quantize", model, tmp_path / "file" / "out", "--backend", "nf4")
    assert "Not a directory" in said or "File exists" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_place(quantize: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", raising(errno.EROFS))  # root may write anywhere, whatever the mode
    assert "Read-only file system" in quantize()


@pytest.mark.parametrize(
    "write",
    [
        "transformers.modeling_utils.safe_save_file",
        "transformers.PreTrainedTokenizerFast.save_pretrained",
        "modq.train.quantize.write_json",
    ],
)
def test_a_disk_that_is_full_at_any_file(
    quantize: Callable[..., str], monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    monkeypatch.setattr(write, raising(errno.ENOSPC))
    assert "No space left on device" in quantize()


def test_a_file_that_may_not_grow_to_its_size(model: Path, parent: Path) -> None:
    """The real thing: the limit makes the write itself fail, in the library that writes the weights."""
    command = [sys.executable, "-c", "from modq.cli import main; main(prog_name='modq')"]
    done = subprocess.run(
        [*command, "quantize", str(model), str(parent / "out"), "--backend", "nf4"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert (done.returncode, done.stdout) == (1, "")
    line = only_error(done.stderr)
    assert line.startswith("error: the weights cannot be written: ")
    assert "File too large" in line
    assert list(parent.iterdir()) == []


# Adapters


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def truncate(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


DAMAGED_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "SafetensorError"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "JSONDecodeError"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "another rank": (
        lambda folder: edit_json(folder / "adapter_config.json", lambda config: config.update(r=8)),
        "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    ),
    "other targets": (
        lambda folder: edit_json(
            folder / "adapter_config.json", lambda config: config.update(target_modules=["nothing"])
        ),
        "Target modules {'nothing'} not found",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS)
def test_an_adapter_that_is_damaged_or_of_another_model(tiny_llama: Path, adapter: Path, damage: str) -> None:
    change, said = DAMAGED_ADAPTERS[damage]
    change(adapter)
    assert said in error_line("generate", tiny_llama, "--prompt", "the union", "--adapter", adapter)


def test_inspecting_a_damaged_adapter(adapter: Path) -> None:
    (adapter / "modq.json").write_text("{}")
    assert "modq.json is damaged" in error_line("inspect", adapter)
    truncate(adapter)
    assert "adapter_model.safetensors' cannot be read" in error_line("inspect", adapter)
    (adapter / "adapter_config.json").write_text("[]")
    assert "holds a list, expected an object" in error_line("inspect", adapter)


def test_an_adapter_of_another_base(model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=ModqConfig("nf4"))
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    edit_tensors(model, lambda tensors: tensors[f"{LAYER}.weight"].mul_(-1))
    given = ("--backend", "nf4", "--prompt", "the union", "--adapter", tmp_path / "adapter")
    said = error_line("generate", model, *given)
    assert "was trained on another base" in said
    assert "MODQ_ADAPTER_CHECK=warn" in said


# Packed checkpoints

DAMAGED_TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "shape": (lambda codes: codes[:-1].clone(), "expected"),
    "dtype": (lambda codes: codes.to(torch.int16), "expected torch.uint8"),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_a_packed_tensor_that_disagrees_with_the_config(
    tiny_llama: Path, tmp_path: Path, damage: str
) -> None:
    change, said = DAMAGED_TENSORS[damage]
    packed = tmp_path / "packed"
    assert (
        CliRunner().invoke(main, ["quantize", str(tiny_llama), str(packed), "--backend", "nf4"]).exit_code
        == 0
    )
    edit_tensors(
        packed, lambda tensors: tensors.update({f"{LAYER}.codes": change(tensors[f"{LAYER}.codes"])})
    )
    line = error_line("generate", packed, "--prompt", "the union")
    assert f"{LAYER}.codes" in line
    assert said in line


# Too long, and stopped


def test_more_tokens_than_the_context(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the union is strong " * 100)
    text = ("--text", tmp_path / "text.txt")
    assert "longer than the context" in error_line("eval", tiny_llama, *text, "--window", 129)
    said = error_line("generate", tiny_llama, "--prompt", "the union", "--max-new-tokens", 127)
    assert "more than the model's context, 128 tokens" in said


def test_ctrl_c_in_the_middle_of_quantize(model: Path, parent: Path) -> None:
    """The real thing: a signal while a layer is quantized."""
    code = (
        "import os, signal, modq.hf.quantizer as q\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "real, calls = q.quantize_weight, []\n"
        "def slow(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args)\n"
        "q.quantize_weight = slow\n"
        "from modq.cli import main; main(prog_name='modq')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "quantize", str(model), str(parent / "out")]
    done = subprocess.run([*command, "--backend", "nf4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "interrupted; " in only_error(done.stderr)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("function", ["write_json", "plot_losses", "train_adapter"])
def test_finetune_on_a_disk_that_is_full(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    (tmp_path / "data.txt").write_text("the union is strong " * 100)
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(f"modq.train.finetune.{function}", raising(errno.ENOSPC))
    given = ("finetune", tiny_llama, "--data", tmp_path / "data.txt", "--output", results / "out")
    job = [str(arg) for arg in (*given, "--max-steps", 1)]
    failed = CliRunner().invoke(main, job)
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "No space left" in failed.stderr
    monkeypatch.undo()
    if function == "train_adapter":
        assert list(results.iterdir()) == []
        return
    assert [path.name for path in results.iterdir()] == ["out.unfinished"]  # what was trained is not lost
    assert CliRunner().invoke(main, [*job, "--resume"]).exit_code == 0
    assert [path.name for path in results.iterdir()] == ["out"]
