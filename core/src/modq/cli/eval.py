"""`modq eval`: the perplexity of a model, with or without an adapter, on a text."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from modq.cli.settings import dtype_option

SCHEMA = 1
"""The version of the --json document."""


@click.command("eval")
@click.argument("model")
@click.option("--adapter", type=click.Path(), help="The folder of an adapter trained on MODEL.")
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text."
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Score the first so many tokens only.")
@click.option(
    "--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in a window."
)
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    adapter: str | None,
    text: Path,
    max_tokens: int | None,
    window: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL on a text.

    The text is cut into non-overlapping windows, each scored alone on every token but its first; a shorter
    tail is dropped. The standard error is that of the windows' mean losses, carried over to the perplexity by
    the delta method: se(ppl) = ppl · std(losses) / sqrt(windows).
    """
    from modq.train.quiet import quiet  # imports torch, as do those below

    with quiet(), contextlib.redirect_stdout(sys.stderr):  # what a library prints would break the document
        from modq.train.models import add_adapter, load_model, load_tokenizer
        from modq.train.perplexity import score, text_windows

        windows = text_windows(load_tokenizer(model), text, window, max_tokens)
        loaded = load_model(model, dtype=dtype)
        scored = score(add_adapter(loaded, adapter) if adapter else loaded, windows)
    if as_json:
        document = {
            "schema": SCHEMA,
            "model": model,
            "adapter": adapter,
            "text": str(text),
            **scored.to_json(),
        }
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(
            f"perplexity {scored.perplexity}, nll {scored.nll} nats a token; "
            f"{len(scored.window_nll)} windows of {window}, {scored.scored_tokens} tokens scored"
        )
