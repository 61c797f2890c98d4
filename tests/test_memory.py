"""Loading a model takes little more memory than it occupies afterwards (S6)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import llama, write_dense

MB = 1 << 20
SLACK = 200 * MB

CONFIG = llama(2048, 5632, layers=16, vocabulary=8192, dtype="bfloat16")

# Anonymous memory: the pages of a mapped checkpoint are the kernel's to drop at will.
MEASURE = """
import json, sys, threading, time
import modq, torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

modq.load("nf4")
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def sample():
    global peak
    while not done.wait(0.003):
        peak = max(peak, anonymous())

baseline = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=sample)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
done.set()
thread.join()
print(json.dumps({
    "peak": max(peak, anonymous()) - baseline,
    "result": model.get_memory_footprint(),
    "quantized": sum(isinstance(module, modq.QuantLinear) for module in model.modules()),
    "sampled": peak > baseline,
}))
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3], max_shard_size="150MB")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """A dense 0.7B checkpoint in shards, where to put the quantized one, and what loading the first took."""
    dense, packed = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("packed")
    write_dense(dense, CONFIG)
    yield dense, packed, measure(dense, "{'quantization_config': modq.ModqConfig('nf4')}", packed)
    for folder in (dense, packed):  # gigabytes: pytest would keep them for three sessions
        for file in folder.iterdir():
            file.unlink()


def measure(checkpoint: Path, arguments: str, save_to: Path | None = None) -> dict[str, int]:
    saving = [] if save_to is None else [str(save_to)]
    command = [sys.executable, "-c", MEASURE, str(checkpoint), arguments, *saving]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    taken = json.loads(done.stdout.splitlines()[-1])
    print({name: round(size / MB) for name, size in taken.items() if size > MB})  # shown by `pytest -s`
    assert taken["sampled"]
    assert taken["quantized"] == 7 * CONFIG.num_hidden_layers
    return taken


@pytest.mark.slow
def test_quantize_on_load_peaks_at_the_result_and_two_dense_tensors(checkpoints) -> None:
    dense, _, taken = checkpoints
    sizes = [file.stat().st_size for file in dense.glob("*.safetensors")]
    assert len(sizes) >= 3
    assert sum(sizes) >= 2 * 0.7e9  # of two bytes each
    largest = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert taken["result"] < sum(sizes) / 3
    assert taken["peak"] <= taken["result"] + 2 * largest + SLACK


@pytest.mark.slow
def test_reloading_peaks_at_the_result(checkpoints) -> None:
    _, packed, _ = checkpoints
    assert len(list(packed.glob("*.safetensors"))) >= 3
    taken = measure(packed, "{}")
    assert taken["peak"] <= taken["result"] + SLACK


@pytest.mark.slow
def test_the_measure_sees_a_dense_copy(checkpoints) -> None:
    dense, _, quantized = checkpoints
    command = MEASURE.replace("modq.QuantLinear", "torch.nn.Linear")
    done = subprocess.run(
        [sys.executable, "-c", command, str(dense), "{'dtype': torch.float32}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["peak"] > 3 * quantized["peak"]


FRAGMENTS = """
import sys
import torch
from modq.train.memory import give_back_large_pieces

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

if sys.argv[1] == "give back":
    give_back_large_pieces()
torch.zeros(1 << 22)  # freed, it has glibc keep pieces of up to its size
before, kept = anonymous(), []
for _ in range(40):
    large = torch.zeros(1 << 20)
    kept.append((large, torch.zeros(1 << 12)))
kept = [small for _, small in kept]
del large
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_pieces_between_kept_ones_go_back_to_the_system() -> None:
    left = {}
    for way in ("give back", "keep"):
        environment = {k: v for k, v in os.environ.items() if k != "MALLOC_MMAP_THRESHOLD_"}
        command = [sys.executable, "-c", FRAGMENTS, way]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        left[way] = int(done.stdout)
    assert left["give back"] < 20 * MB
    assert left["keep"] > 100 * MB  # of 160: else this shows nothing
