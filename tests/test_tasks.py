"""`modq eval --tasks`: lm-eval scores what modq has loaded, here on tasks of our own."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import error_line, run, succeed
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modq.train.quiet import quiet

harness = pytest.importorskip("lm_eval", reason="it comes with modq[eval], and is what is tested here")

EXAMPLES = 24
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1}}
"""
GROUP = """\
group: unions
task: [union, union-again]
aggregate_metric_list:
  - metric: acc
"""


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's own tasks, and its description of the machine: each takes seconds."""
    with quiet():
        from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[dict[str, Any]]:
    words = [text.split() for text in texts]
    return [
        {
            "question": " ".join(words[i % 15][: 3 + i % 5]),
            "choices": [words[i % 15][9], " ".join(words[(i + 4) % 15][3:5]), words[(i + 7) % 15][2]],
            "gold": i % 3,
        }
        for i in range(EXAMPLES)
    ]


@pytest.fixture(scope="module")
def tasks(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks of the same questions, and a group of the two."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("union", "union-again"):
        content = TASK.format(name=name, data=folder / "data.jsonl", cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(content)
    (folder / "unions.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    succeed("quantize", tiny_llama, folder, "--backend", "nf4")
    return folder


@pytest.fixture(scope="module")
def adapter(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter, large enough to change the answers."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(quantized), config)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def right_answers(model: Any, folder: Path, rows: list[dict[str, Any]], *, by_length: bool) -> list[bool]:
    """Answer each question by the likeliest choice, as it is or by character, one forward pass a choice."""
    tokenizer, right = AutoTokenizer.from_pretrained(folder), []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            answer = tokenizer(choice)["input_ids"]
            logits = model(torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            scores.append(picked / len(choice) if by_length else picked)
        right.append(scores.index(max(scores)) == row["gold"])
    return right


def scores_of(*args: object) -> dict[tuple[str, str], dict[str, Any]]:
    document = json.loads(succeed("eval", *args, "--json").stdout)
    return {(score["task"], score["metric"]): score for score in document["tasks"]}


def test_accuracy_is_what_the_likelihoods_say(
    quantized: Path, adapter: Path, tasks: Path, rows: list[dict[str, Any]]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(quantized)
    without = right_answers(base, quantized, rows, by_length=False)
    adapted = PeftModel.from_pretrained(base, adapter)
    expected = {
        "acc": right_answers(adapted, quantized, rows, by_length=False),
        "acc_norm": right_answers(adapted, quantized, rows, by_length=True),
    }
    assert sum(expected["acc"]) not in (sum(without), sum(expected["acc_norm"]), 0, EXAMPLES)
    common = ("--tasks", "union", "--include-path", tasks, "--batch-size", 5)
    found = scores_of(quantized, *common, "--adapter", adapter)
    for metric, right in expected.items():
        mean = sum(right) / EXAMPLES
        score = found["union", metric]
        assert score["value"] == pytest.approx(mean)
        assert score["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (EXAMPLES - 1)))
        assert (score["examples"], score["fewshot"]) == (EXAMPLES, 0)
    assert scores_of(quantized, *common)["union", "acc"]["value"] == pytest.approx(sum(without) / EXAMPLES)


def test_limit_and_fewshot_reach_the_harness_and_groups_are_scored(quantized: Path, tasks: Path) -> None:
    asked = ("--tasks", "unions", "--include-path", tasks, "--limit", 6, "--num-fewshot", 2)
    found = scores_of(quantized, *asked)
    members = [found[name, "acc"] for name in ("union", "union-again")]
    assert [(score["examples"], score["fewshot"]) for score in members] == [(6, 2), (6, 2)]
    assert found["unions", "acc"]["value"] == pytest.approx(sum(score["value"] for score in members) / 2)


def test_text_and_tasks_go_together(quantized: Path, tasks: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(texts))
    text = ("--text", tmp_path / "text.txt", "--window", 32)
    alone = json.loads(succeed("eval", quantized, *text, "--json").stdout)
    both = succeed("eval", quantized, *text, "--tasks", "union,union-again", "--include-path", tasks).stdout
    sentence, _, table = both.partition("\n\n")
    assert sentence.startswith(f"perplexity {alone['perplexity']:.4g} ")
    header, *lines = table.splitlines()
    assert header.split() == ["TASK", "METRIC", "VALUE", "STDERR", "EXAMPLES", "FEWSHOT"]
    assert [line.split()[:2] for line in lines] == [
        ["union", "acc"], ["union", "acc_norm"], ["union-again", "acc"], ["union-again", "acc_norm"]
    ]  # fmt: skip


def test_nothing_to_measure_is_a_usage_error(quantized: Path) -> None:
    assert run("eval", quantized).exit_code == 2
    assert run("eval", quantized, "--tasks", " , ").exit_code == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unoin", "no task 'unoin'; did you mean union"),
        ("zzzzzz", "no task 'zzzzzz'; `lm-eval ls tasks` lists what there is"),
    ],
)
def test_an_unknown_task_is_one_line(quantized: Path, tasks: Path, name: str, said: str) -> None:
    assert said in error_line("eval", quantized, "--tasks", name, "--include-path", tasks)


def test_a_task_without_its_data_is_one_line(quantized: Path, tasks: Path, tmp_path: Path) -> None:
    content = TASK.format(name="lost", data=tmp_path / "nowhere.jsonl", cache=tmp_path)
    (tmp_path / "lost.yaml").write_text(content)
    said = error_line("eval", quantized, "--tasks", "lost", "--include-path", tmp_path)
    assert "task 'lost' cannot be loaded: " in said
    assert "nowhere.jsonl" in said


def test_without_the_harness_it_says_what_to_install(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import would find
    assert "pip install 'modq[eval]'" in error_line("eval", quantized, "--tasks", "union")
