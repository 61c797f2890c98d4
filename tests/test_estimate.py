"""`modq estimate`: what it predicts is what is measured, part by part and in whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import error_line, succeed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import modq
from modq.errors import CheckpointError
from modq.estimate import Training, estimate
from modq.estimate.parts import FAULT_AROUND
from modq.model import quantized_layers
from modq.train.models import measure

STEP = """
import json, sys, torch, modq.hf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from modq.train.memory import peak_rss

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.config.use_cache = False
if sys.argv[2] == "True":
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for seed in range(2):
    ids = torch.randint(8000, (2, 128), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps(peak_rss()))
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Llama that takes as much to train as the libraries take to import."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("quantized")
    with torch.random.fork_rng():
        modq.quantize_model(AutoModelForCausalLM.from_config(config), "nf4").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_total_is_within_a_tenth_of_the_measured_peak(quantized: Path, checkpointing: bool) -> None:
    training = Training(batch=2, length=128, gradient_checkpointing=checkpointing, trainer=False)
    predicted = estimate(str(quantized), training)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP, str(quantized), str(checkpointing)],
        capture_output=True, text=True, check=False,
        # glibc keeps what is freed for the next allocation of its size, up to a sixth of this process
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.splitlines()[-1])
    print({name: size >> 20 for name, size in predicted.parts.items()}, peak >> 20)  # shown by `pytest -s`
    assert predicted.total == pytest.approx(peak, rel=0.1)
    assert predicted.total - predicted.process == pytest.approx(peak - predicted.process, rel=0.25)


@pytest.fixture(autouse=True)
def _known_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process takes seconds: only those tests do that compare with a measured one."""
    if "measured" not in request.node.name:
        monkeypatch.setattr("modq.estimate.parts.process_bytes", lambda trainer: 1000 + trainer)


@pytest.mark.parametrize(("backend", "options"), [("nf4", {}), ("hqq", {"bits": 2, "group_size": 32})])
def test_what_is_held_is_what_the_loaded_model_holds(
    tiny_llama: Path, tmp_path: Path, backend: str, options: dict[str, int]
) -> None:
    config = modq.ModqConfig(backend, **options)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    model.save_pretrained(tmp_path)
    training = Training(batch=1, length=8, trainer=False)
    planned = estimate(str(tiny_llama), training, backend=backend, options=options)
    assert planned == estimate(str(tmp_path), training)
    packed = [tensor.nbytes for _, layer in quantized_layers(model) for _, tensor in layer.named_packed()]
    assert planned.codes + planned.scales == sum(packed) > planned.codes > planned.scales > 0
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert planned.codes + planned.scales + planned.dense == measure(model).held + buffers
    assert planned.process == 1000


def test_the_adapter_and_its_states_are_those_of_peft_and_of_the_optimizer(tiny_llama: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora)
    nbytes = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    training = Training(batch=1, length=8, r=4, target_modules=("q_proj", "down_proj"), trainer=False)
    adam = estimate(str(tiny_llama), training)
    assert adam.adapter == nbytes
    assert 2 * nbytes <= adam.optimizer <= 2.2 * nbytes  # and a counter for each tensor
    assert estimate(str(tiny_llama), replace(training, optim="sgd")).optimizer < nbytes
    half = estimate(str(tiny_llama), replace(training, adapter_dtype="bfloat16"))
    assert half.adapter == nbytes / 2


def test_checkpointing_and_smaller_batches_shrink_the_activations_alone(tiny_llama: Path) -> None:
    kept = estimate(
        str(tiny_llama), Training(batch=4, length=64, trainer=False, gradient_checkpointing=False)
    )
    again = estimate(str(tiny_llama), Training(batch=4, length=64, trainer=False))
    small = estimate(str(tiny_llama), Training(batch=1, length=64, trainer=False))
    step = ("activations", "logits", "gradients")
    assert kept.activations > 1.5 * again.activations > 1.5 * small.activations > 0
    same = [name for name in kept.parts if name not in step]
    assert [kept.parts[name] for name in same] == [again.parts[name] for name in same]
    assert [small.parts[name] for name in same] == [again.parts[name] for name in same]


def test_of_a_mapped_embedding_table_only_the_rows_of_a_batch_count(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=50000, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    sizes = {}
    for tied in (False, True):
        config.tie_word_embeddings = tied
        config.save_pretrained(tmp_path / str(tied))
        sizes[tied] = estimate(str(tmp_path / str(tied)), Training(batch=1, length=4, trainer=False)).dense
    table = 4 * 50000 * 64
    assert table < sizes[True] < sizes[False] < 1.2 * table  # tied, all of it is read: it is the head
    assert sizes[False] - sizes[True] == 4 * FAULT_AROUND
    other = estimate(str(tmp_path / "False"), Training(batch=1, length=4, trainer=False), dtype="bfloat16")
    assert other.casting > 0
    assert other.dense > table  # two tables of half the size: cast, it is no mapped file's any more


def test_the_command_prints_parts_that_sum_to_the_total(tiny_llama: Path) -> None:
    words = [
        "estimate",
        str(tiny_llama),
        "--backend",
        "nf4",
        "--batch",
        "1",
        "--length",
        "16",
        "--plain-loop",
    ]
    found = json.loads(succeed(*words, "--json").stdout)
    assert found["total"] == sum(found["parts"].values())
    assert found["parts"]["process"] == 1000  # as the fixture says: not with the trainer
    lines = succeed(*words).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*found["parts"], "total"]
    assert all(re.search(r"\d+\.\d{3} GB", line) for line in lines)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--target-modules", "nose"], "the model has no linear nose; it has down_proj, "),
        (["--optim", "adamwho"], "optim='adamwho' cannot be made here"),
    ],
)
def test_what_it_does_not_know_is_one_line(tiny_llama: Path, words: list[str], reason: str) -> None:
    assert reason in error_line("estimate", str(tiny_llama), "--batch", "1", "--length", "8", *words)


def test_a_checkpoint_of_another_package_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is quantized by 'bitsandbytes', expected a dense model"):
        estimate(str(tmp_path))
    with pytest.raises(CheckpointError, match="leave --backend out"):
        estimate(str(tmp_path), backend="nf4")
