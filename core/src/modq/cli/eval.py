"""`modq eval`: the perplexity of a model on a text, its scores on tasks; with or without an adapter."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modq.cli.settings import dtype_option, table

if TYPE_CHECKING:
    from modq.train.perplexity import Perplexity
    from modq.train.tasks import TaskScore

WINDOW = 512
"""Tokens in a window where the user does not say."""

SCHEMA = 1
"""The version of the --json document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a model."""

    text: Path | None
    max_tokens: int | None
    window: int | None
    tasks: tuple[str, ...]
    include_path: Path | None
    limit: int | None
    batch_size: int
    num_fewshot: int | None


@click.command("eval")
@click.argument("model")
@click.option("--adapter", type=click.Path(), help="The folder of an adapter trained on MODEL.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Of the text, score the first so many only.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens in a window; by default 512, or the model's context.",
)
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-eval, with commas between.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with task files of your own.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Of each task, the first so many examples only.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Solved examples in a prompt; else as a task has it."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of a task's examples in a forward pass.",
)
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str, adapter: str | None, dtype: str, as_json: bool, tasks: str | None, **given: Any
) -> None:
    """Measure the perplexity of MODEL on a text, or its scores on tasks of lm-eval, or both.

    The text is cut into non-overlapping windows, each scored alone on every token but its first; a shorter
    tail is dropped. The standard error is that of the windows' mean losses, carried over to the perplexity by
    the delta method: se(ppl) = ppl · std(losses) / sqrt(windows).
    """
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    question = Question(tasks=names, **given)
    if question.text is None and not names:
        raise click.UsageError("nothing to measure; give --text, --tasks or both")
    from modq.train.quiet import quiet  # imports torch

    with quiet(), contextlib.redirect_stdout(sys.stderr):  # what a library prints would break the document
        perplexity, scores = _measure(model, adapter, dtype, question)
    if as_json:
        document = {
            "schema": SCHEMA,
            "model": model,
            "adapter": adapter,
            "text": question.text and str(question.text),
            **(perplexity.to_json() if perplexity else {}),
            "tasks": [asdict(score) for score in scores],
        }
        click.echo(json.dumps(document, indent=2))
        return
    shown = [_sentence(perplexity)] if perplexity else []
    click.echo("\n\n".join([*shown, table(_rows(scores))] if scores else shown))


def _measure(
    model: str, adapter: str | None, dtype: str, question: Question
) -> tuple[Perplexity | None, tuple[TaskScore, ...]]:
    """Read all that is asked before the model: what is wrong with it shall show at once."""
    # These import torch
    from modq.train.models import add_adapter, load_model, load_tokenizer, read_config, within_context
    from modq.train.perplexity import score, text_windows
    from modq.train.tasks import load_tasks, score_tasks

    tokenizer = load_tokenizer(model)
    windows = None
    if question.text is not None:
        window = within_context(model, read_config(model), question.window, WINDOW, "--window")
        windows = text_windows(tokenizer, question.text, window, question.max_tokens)
    tasks = load_tasks(question.tasks, question.include_path) if question.tasks else None
    loaded = load_model(model, dtype=dtype)
    if adapter:
        loaded = add_adapter(loaded, adapter)
    perplexity = None if windows is None else score(loaded, windows)
    if tasks is None:
        return perplexity, ()
    scores = score_tasks(
        loaded,
        tokenizer,
        tasks,
        limit=question.limit,
        batch_size=question.batch_size,
        num_fewshot=question.num_fewshot,
    )
    return perplexity, scores


def _sentence(scored: Perplexity) -> str:
    return (
        f"perplexity {scored.perplexity}, nll {scored.nll} nats a token; "
        f"{len(scored.window_nll)} windows of {scored.window}, {scored.scored_tokens} tokens scored"
    )


def _rows(scores: tuple[TaskScore, ...]) -> list[tuple[str, ...]]:
    return [
        ("TASK", "METRIC", "VALUE", "STDERR", "EXAMPLES", "FEWSHOT"),
        *(
            (
                score.task,
                score.metric,
                *("-" if number is None else f"{number:.4f}" for number in (score.value, score.stderr)),
                *("-" if count is None else str(count) for count in (score.examples, score.fewshot)),
            )
            for score in scores
        ),
    ]
