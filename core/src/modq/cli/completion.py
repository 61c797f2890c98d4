"""`modq completion`: the script that makes a shell complete modq's commands, options and backends."""

from __future__ import annotations

import os
from pathlib import PurePath

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", required=False, type=click.Choice(SHELLS))
def command(shell: str | None) -> None:
    """Print the completion script of a shell, by default of the one that $SHELL names.

    \b
    bash   echo 'eval "$(modq completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(modq completion zsh)"' >> ~/.zshrc
    fish   modq completion fish > ~/.config/fish/completions/modq.fish

    It takes effect in new shells.
    """
    shell = shell or PurePath(os.environ.get("SHELL", "")).name
    script = get_completion_class(shell) if shell in SHELLS else None
    if script is None:
        raise click.UsageError(f"$SHELL names none of {', '.join(SHELLS)}; name one")
    root = click.get_current_context().find_root()
    click.echo(script(root.command, {}, "modq", "_MODQ_COMPLETE").source())
