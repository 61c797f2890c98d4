"""`modq finetune`: what it trains, what it writes, and that a stopped run goes on as if it never had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import error_line, run, succeed
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from modq.train.checkpoints import last_whole

FAST = ("--max-length", 32, "--batch-size", 4, "--lr", 1e-2)
TALK = [{"role": "user", "content": "is the union strong"}, {"role": "assistant", "content": "the union is"}]


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    succeed("quantize", tiny_llama, folder, "--backend", "nf4", "--set", "double_quant=true")
    return folder


@pytest.fixture
def data(texts: list[str], tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "train.json").read_text())


def perplexity(model: Path, text: Path, *args: object) -> float:
    result = succeed("eval", model, "--text", text, "--window", 32, "--json", *args)
    return float(json.loads(result.stdout)["perplexity"])


# What it trains and writes


@pytest.mark.parametrize("base", ["tiny_llama", "quantized"])
def test_an_adapter_learns_and_is_used_by_eval(
    base: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, adapter, text = request.getfixturevalue(base), tmp_path / "adapter", tmp_path / "text.txt"
    text.write_text(" ".join(texts))
    succeed("finetune", model, "--data", text, "--output", adapter, "--epochs", 4, *FAST)
    assert perplexity(model, text, "--adapter", adapter) < 0.9 * perplexity(model, text)
    assert (adapter / "tokenizer.json").is_file()
    assert not list(adapter.glob("*.bin"))  # no pickle
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_the_record_is_of_the_whole_run(quantized: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    given = ("--eval-data", data, "--epochs", 3, "--eval-every", 5)
    shown = succeed("finetune", quantized, "--data", data, "--output", output, *given, *FAST)
    found = record(output)
    assert [entry["step"] for entry in found["history"]["steps"]] == list(range(1, 13))
    assert [entry["step"] for entry in found["history"]["evals"]] == [0, 5, 10, 12]
    losses = [entry["loss"] for entry in found["history"]["steps"]]
    assert found["result"]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert found["result"]["eval_loss_before"] == found["history"]["evals"][0]["loss"]
    assert found["result"]["eval_loss"] == found["history"]["evals"][-1]["loss"] < losses[0]
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(quantized)(texts)["input_ids"]]
    tokens = sum(lengths) + len(texts)  # with the end of each text
    assert found["result"]["tokens"] == 3 * tokens
    assert found["examples"] == len(texts)
    assert found["recipe"]["learning_rate"] == 1e-2
    assert f"{found['result']['eval_loss']:.4f} after" in shown.stdout
    assert "step 12/12  loss" in shown.stderr
    with Image.open(output / "loss.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # something is drawn


def test_a_seed_decides_everything(quantized: Path, data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        job = ("--data", data, "--output", tmp_path / name, "--seed", seed, "--max-steps", 2)
        succeed("finetune", quantized, *job, *FAST)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_in_the_dtype_asked_for_wherever_it_runs(
    dtype: str, quantized: Path, data: Path, tmp_path: Path
) -> None:
    job = ("--data", data, "--output", tmp_path / "adapter", "--dtype", dtype, "--max-steps", 2)
    succeed("finetune", quantized, *job, *FAST)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_recipe_reaches_the_trainer(quantized: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    succeed(
        *("finetune", quantized, "--data", data, "--output", output, "--max-steps", 2, *FAST),
        *("--target-modules", "q_proj,down_proj", "--gradient-accumulation", 2, "--optim", "adafactor"),
        "--no-gradient-checkpointing",
    )
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"q_proj", "down_proj"}
    recipe = record(output)["recipe"]
    assert (recipe["gradient_accumulation"], recipe["optim"]) == (2, "adafactor")
    assert recipe["gradient_checkpointing"] is False


def test_quantizes_on_the_way_with_a_backend(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    options = ("--backend", "nf4", "--group-size", 32, "--max-steps", 1)
    succeed("finetune", tiny_llama, "--data", data, "--output", output, *options, *FAST)
    assert (record(output)["backend"], record(output)["options"]) == ("nf4", {"group_size": 32})


# Data


@pytest.mark.parametrize(
    "row",
    [
        {"text": "the union is strong", "source": "dropped"},
        {"prompt": "the union is", "completion": " strong"},
        {"messages": TALK},
    ],
)
def test_reads_each_form_of_jsonl(row: dict[str, Any], quantized: Path, tmp_path: Path) -> None:
    chatty = shutil.copytree(quantized, tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} </s> {% endfor %}"
    tokenizer.save_pretrained(chatty)
    data = write_rows(tmp_path / "data.jsonl", [row] * 4)
    data.write_text(data.read_text() + "\n\n")
    given = ("--data", data, "--eval-data", data, "--output", tmp_path / "out", "--max-steps", 2)
    succeed("finetune", chatty, *given, *FAST)
    assert (
        record(tmp_path / "out")["result"]["eval_loss"]
        < record(tmp_path / "out")["result"]["eval_loss_before"]
    )


def test_reads_a_dataset_and_its_splits(quantized: Path, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    splits = {"train": texts, "test": texts[:3]}
    DatasetDict(
        {name: Dataset.from_dict({"text": rows, "n": range(len(rows))}) for name, rows in splits.items()}
    )
    for name, rows in splits.items():
        folder.mkdir(exist_ok=True)
        write_rows(folder / f"{name}.jsonl", [{"text": text, "n": i} for i, text in enumerate(rows)])
    given = ("--data", f"{folder}:train[:8]", "--eval-data", f"{folder}:test", "--output", tmp_path / "out")
    succeed("finetune", quantized, *given, "--max-steps", 1, *FAST)
    assert record(tmp_path / "out")["examples"] == 8


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": 1}', "d.jsonl:2: 'text' is a int"),
        ("d.jsonl", '{"text": "a"}\n{"prompt": "b"}', "d.jsonl:2: has no 'text'"),
        ("d.jsonl", '{"body": "a"}', "d.jsonl:1: has body; expected"),
        ("d.jsonl", "[1]", "d.jsonl:1: is a list"),
        ("d.jsonl", '{"text": "a"}\n{', "d.jsonl:2: is not JSON"),
        ("d.jsonl", "", "holds no example"),
        ("d.jsonl", "\n", "holds no example"),
        ("d.txt", "", "holds no example"),
        ("d.jsonl", '{"messages": []}', "must be a list of objects"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
        ("d.csv", "text\na", "expected .jsonl"),
        ("d/train.jsonl", '{"body": "a"}', "has the columns body; expected"),
        ("d/train.jsonl", '{"text": 1}', "'text' is a int"),
    ],
)
def test_unusable_data_is_one_line(
    tiny_llama: Path, tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    data = path if path.parent == tmp_path else path.parent
    assert said in error_line("finetune", tiny_llama, "--data", data, "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--data", "missing.jsonl"), "'missing.jsonl' does not exist"),
        (("--data", "no-such/dataset"), "cannot be loaded as a dataset"),
        (("--eval-data", "missing.txt"), "'missing.txt' does not exist"),
        (("--max-length", 129), "longer than the context of"),
        (("--optim", "adamw_turbo"), "near it: adamw"),
        (("--target-modules", "qq_proj"), "has no linear qq_proj; it has down_proj"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    given: tuple[object, ...], said: str, quantized: Path, data: Path, tmp_path: Path
) -> None:
    job = ("finetune", quantized, "--data", data, "--output", tmp_path / "out")
    assert said in error_line(*job, *given)
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_refused(quantized: Path, data: Path, tmp_path: Path) -> None:
    assert "exists already" in error_line("finetune", quantized, "--data", data, "--output", tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "broken")
    job = ("--data", data, "--output", tmp_path / "out", *FAST)
    assert "the loss at step 1 is nan" in error_line("finetune", tmp_path / "broken", *job)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "given", [[], ["model"], ["model", "--demo"], ["--demo", "--lr", "1"], ["model", "--bits", "4"]]
)
def test_too_few_or_too_many_arguments_are_a_usage_error(given: list[str]) -> None:
    assert run("finetune", *given).exit_code == 2


def test_options_without_a_backend_are_a_usage_error(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    assert run("finetune", tiny_llama, "--data", data, "--output", tmp_path / "o", "--bits", 4).exit_code == 2


# A config file


def test_a_config_file_gives_what_the_command_line_does_not(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {tiny_llama}\ndata: {data}\noutput: {tmp_path / 'adapter'}\nbackend: nf4\n"
        "set: {double_quant: true, quant_type: fp4}\ntarget_modules: [q_proj, v_proj]\n"
        "gradient-checkpointing: false\nlr: 2e-3\nmax-steps: 7\nmax_length: 32\n"
    )
    succeed("finetune", "--config", config, "--max-steps", 1)
    found = record(tmp_path / "adapter")
    assert found["options"] == {"double_quant": True, "quant_type": "fp4"}
    expected = {
        "target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": False,
        "learning_rate": 2e-3,
    }
    assert expected.items() <= found["recipe"].items()
    assert (found["recipe"]["max_length"], found["result"]["steps"]) == (32, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning-rat: 1", "unknown option 'learning-rat'"),
        ("alphaa: 1", "near it: alpha"),
        ("resume: true", "unknown option 'resume'"),
        ("- lr", "holds a list, expected `option: value` lines"),
        ("lr: [", "is not YAML"),
        ("set: 3", "expected `key: value` lines"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(content)
    assert said in error_line("finetune", "--config", tmp_path / "job.yaml")


def test_a_value_of_the_wrong_kind_in_a_config_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("r: many")
    assert run("finetune", "--config", tmp_path / "job.yaml").exit_code == 2


# Stopped and resumed


def torchrun() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]


def start(job: tuple[object, ...], output: Path, processes: int, *more: str) -> subprocess.Popen[str]:
    launcher = torchrun() if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "modq", "finetune", *map(str, job), "--output", str(output)]
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path, processes: int) -> None:
    """Wait until a run has a whole checkpoint."""
    folder = output.with_name(f"{output.name}.unfinished") / "checkpoints"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(processes))
            if last_whole(folder):
                return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


def workers(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output


def same(left: Path, right: Path) -> None:
    """Two runs ended alike: adapter, history and counts, to the bit."""
    file = "adapter_model.safetensors"
    assert (left / file).read_bytes() == (right / file).read_bytes()
    a, b = record(left), record(right)
    assert a["history"] == b["history"]
    assert a["history"]["steps"]
    assert a["result"]["tokens"] == b["result"]["tokens"]


# The dropout's random state must be restored too, and the steps be long enough to be interrupted
STEPS = 40
LONG = ("--backend", "nf4", "--epochs", 50, "--dropout", 0.1, "--save-every", 4, "--eval-every", 6)


@pytest.fixture(scope="module")
def job(tiny_llama: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    data = write_rows(tmp_path_factory.mktemp("job") / "data.jsonl", [{"text": text} for text in texts])
    return (tiny_llama, "--data", data, "--eval-data", data, *LONG, "--max-steps", STEPS, *FAST)


@pytest.fixture(scope="module")
def through(job: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("through") / "adapter"
    succeed("finetune", *job, "--output", output)
    return output


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGKILL],
        pytest.param([signal.SIGINT], marks=pytest.mark.slow),  # the next one ends with it
        [signal.SIGTERM, signal.SIGINT],
    ],
)
def test_a_stopped_run_resumes_to_every_bit(
    signals: list[int], job: tuple[object, ...], through: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    process = start(job, output, 1)
    wait_for_checkpoint(process, output, 1)
    for number in signals:
        process.send_signal(number)
    said = finish(process)
    assert not output.exists()
    if signals == [signal.SIGKILL]:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1
        assert said.strip().splitlines()[-1].startswith(("error: stopped at step", "error: interrupted"))
    assert "add --resume" in error_line("finetune", *job, "--output", output)
    assert "began with learning_rate=0.01, not 0.5" in error_line(
        "finetune", *job, "--output", output, "--resume", "--lr", 0.5
    )
    succeed("finetune", *job, "--output", output, "--resume")
    same(output, through)
    first, second = record(output)["sessions"]
    assert first["from"] == 0 < second["from"] < STEPS
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow  # two minutes; tests/test_processes.py has it in short, by the Trainer
def test_a_run_whose_worker_is_killed_resumes_to_every_bit(job: tuple[object, ...], tmp_path: Path) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    process = start(job, through, 2)
    finish(process)
    assert process.returncode == 0
    process = start(job, killed, 2)
    wait_for_checkpoint(process, killed, 2)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    assert "SIGKILL" in finish(process)
    assert process.returncode != 0
    assert not killed.exists()
    said = finish(process := start(job, killed, 2, "--resume"))
    assert process.returncode == 0, said
    same(killed, through)
    assert record(killed)["processes"] == 2
    assert record(killed)["sessions"][1]["from"] > 0


def test_ctrl_c_while_loading_leaves_nothing(
    quantized: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modq.train.finetune.load_model", interrupted)
    job = ("finetune", quantized, "--data", data, "--output", tmp_path / "out")
    assert "interrupted; " in error_line(*job)
    assert not list(tmp_path.glob("out*"))
