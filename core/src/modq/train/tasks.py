"""Scores a model on the tasks of lm-eval, EleutherAI's evaluation harness, where that is installed.

The harness makes the prompts, batches the requests and computes the metrics; it is given the model as modq
has loaded it, adapter and all, so that every backend is scored alike.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modq.errors import ModqError


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: the name in the harness.
        metric: such as `acc`; with the name of a filter of the answers, where there is one, as `acc,strict`.
        value: what was measured, None where the harness has no number.
        stderr: its standard error, None where the harness estimates none.
        examples: how many were scored; None for a group.
        fewshot: solved examples in each prompt; None for a group.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    examples: int | None
    fewshot: int | None


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks and groups of tasks with their data, as the harness holds them."""

    manager: Any
    loaded: tuple[Any, ...]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Load tasks with their data: from the hub, from its cache, or from files that the task names.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with further task files.

    Raises:
        ModqError: if lm-eval is not installed, has no such task, or cannot get its data.
    """
    if find_spec("lm_eval") is None:
        raise ModqError(
            "--tasks needs lm-eval, which is not installed; it comes with `pip install 'modq[eval]'`"
        )
    from lm_eval.tasks import TaskManager

    _silence()
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5))
            hint = f"did you mean {near}?" if near else "`lm-eval ls tasks` lists what there is"
            raise ModqError(f"lm-eval has no task {name!r}; {hint}")
    return Tasks(manager, tuple(task for name in dict.fromkeys(names) for task in _load(manager, name)))


def _load(manager: Any, name: str) -> list[Any]:
    try:
        found = manager.load([name])
    except Exception as error:  # a task file may hold anything, and its data come from anywhere
        raise ModqError(f"task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    group = found["groups"].get(name)
    return list(found["tasks"].values()) if group is None else [group]


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
) -> tuple[TaskScore, ...]:
    """Score a causal language model, which may carry an adapter.

    Args:
        model: the model, on the device where it shall run.
        tokenizer: its tokenizer.
        tasks: what `load_tasks` returned.
        limit: take the first so many examples of each task only.
        batch_size: examples in a forward pass.
        num_fewshot: solved examples in each prompt; None leaves it to each task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    _silence()
    results = simple_evaluate(
        HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks.loaded),
        task_manager=tasks.manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    return tuple(_read(results))


def _read(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Pair the values with their standard errors: keys are `acc,none` and `acc_stderr,none`."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            yield TaskScore(
                task=task,
                metric=metric if kind == "none" else key,
                value=_number(value),
                stderr=_number(found.get(f"{metric}_stderr,{kind}")),
                examples=results.get("n-samples", {}).get(task, {}).get("effective"),
                fewshot=results.get("n-shot", {}).get(task),
            )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None


def _silence() -> None:
    """Leave the harness's errors only: it sets up a handler of its own."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
