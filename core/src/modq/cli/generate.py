"""`modq generate`: let a model, with or without an adapter, continue a prompt."""

from __future__ import annotations

import click

from modq.cli.settings import backend_options, collect_options, dtype_option


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--adapter", type=click.Path(), help="The folder of an adapter trained on MODEL.")
@click.option("--chat", is_flag=True, help="Pass the prompt as a user's message through the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@backend_options(required=False)
@dtype_option
def command(
    model: str,
    prompt: str,
    adapter: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    backend: str | None,
    bits: int | None,
    group_size: int | None,
    settings: tuple[str, ...],
    dtype: str,
) -> None:
    """Print what MODEL makes of a prompt; only the continuation goes to stdout."""
    options = collect_options(backend, bits, group_size, settings)
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet():
        from modq.train.generate import generate
        from modq.train.models import add_adapter, load_model, load_tokenizer

        tokenizer = load_tokenizer(model)
        loaded = load_model(model, backend=backend, options=options, dtype=dtype)
        text = generate(
            add_adapter(loaded, adapter) if adapter else loaded,
            tokenizer,
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    click.echo(text)
