"""Calibration streams (S6): a model of three times the allowed memory, and processes killed at any moment."""

from __future__ import annotations

import gc
import json
import random
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from commands import succeed
from synthetic import llama, write_dense
from transformers import PreTrainedTokenizerFast

from modq.calibrate import stream

DENSE_BYTES_A_LIMIT = 3

LARGE = llama(1024, 2816, layers=56, vocabulary=4096, dtype="float32")

LOAD_WHOLE = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
copies = [parameter.clone() for parameter in model.parameters()]
"""

OPTQ = ("--backend", "optq", "--bits", 4, "--group-size", 64, "--samples", 4, "--length", 64)


SHORT = ("--samples", 8, "--length", 16, "--group-size", 16)


def quantize(model: Path, out: Path, data: Path, *more: object) -> list[str]:
    """Return the command line of a process of its own."""
    given = [model, out, *OPTQ, "--calibration", data, *more]
    return [sys.executable, "-W", "ignore", "-m", "modq", "quantize", *map(str, given)]


def test_dense_weights_go_when_their_block_is_done_and_wait_for_no_collector(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: dict[str, weakref.ref[Any]] = {}
    alive: list[str] = []
    quantized, save = stream.Writer.quantized, stream.Writer.save

    def seen(self: Any, name: str, *given: Any) -> None:
        dense[name] = weakref.ref(self.source.model.get_submodule(name))
        quantized(self, name, *given)

    def saved(self: Any, block: Any) -> None:
        save(self, block)
        alive.extend(name for name, linear in dense.items() if linear() is not None)

    monkeypatch.setattr(stream.Writer, "quantized", seen)
    monkeypatch.setattr(stream.Writer, "save", saved)
    gc.collect()
    gc.disable()
    try:
        succeed("quantize", tiny_llama, tmp_path / "out", *OPTQ, *SHORT, "--calibration", data)
    finally:
        gc.enable()
    assert len(dense) == 14
    assert alive == []


@pytest.mark.slow
def test_a_model_of_three_times_the_allowed_memory_quantizes(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    dense.mkdir()
    write_dense(dense, LARGE)
    PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(dense)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    limit = size // DENSE_BYTES_A_LIMIT

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)

    whole = run(sys.executable, "-W", "ignore", "-c", LOAD_WHOLE, str(dense))
    assert whole.returncode != 0, "the limit lets a dense copy of the model through: it limits nothing"
    done = run(*quantize(dense, out, data))
    assert done.returncode == 0, done.stderr[-2000:]
    layers = json.loads((out / "quantize.json").read_text())["layers"]
    assert len(layers) == 7 * LARGE.num_hidden_layers
    assert all(layer["hessian_error"] < 0.2 for layer in layers.values())
    for file in (*dense.iterdir(), *out.iterdir()):  # gigabytes: pytest would keep them for three sessions
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment_it_resumes_to_the_same_bytes(
    seed: int, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    through, out = tmp_path / "through", tmp_path / "out"
    started = time.perf_counter()
    subprocess.run(quantize(tiny_llama, through, data, *SHORT), check=True, capture_output=True)
    takes = time.perf_counter() - started
    kills = random.Random(seed)
    for resume in ((), ("--resume",)):  # killed twice, the second time while it resumes
        if resume and not (tmp_path / "out.unfinished").exists():
            resume = ()  # nothing was worth keeping
        process = subprocess.Popen(
            quantize(tiny_llama, out, data, *SHORT, *resume),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(kills.uniform(0.4, 1.0) * takes)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
    if not out.exists():
        resume = ("--resume",) if (tmp_path / "out.unfinished").exists() else ()
        succeed("quantize", tiny_llama, out, *OPTQ, "--calibration", data, *SHORT, *resume)
    assert {path.name for path in tmp_path.iterdir()} == {"through", "out"}
    for path in sorted(through.iterdir()):  # two files have the time that it took, or the folder's name
        if path.name not in (
            "quantize.json",
            "README.md",
        ):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
