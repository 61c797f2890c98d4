"""The `modq` command.

Each subcommand is a module of its own, imported when it is asked for; none imports torch at its top, so that
`modq list-backends` answers at once.
"""

from __future__ import annotations

from importlib import import_module

import click

import modq
from modq.errors import ModqError

COMMANDS = {
    "list-backends": "modq.cli.list_backends",
    "quantize": "modq.cli.quantize",
    "finetune": "modq.cli.finetune",
    "eval": "modq.cli.eval",
    "generate": "modq.cli.generate",
    "estimate": "modq.cli.estimate",
    "inspect": "modq.cli.inspect",
    "check": "modq.cli.check",
    "new-plugin": "modq.cli.new_plugin",
    "doctor": "modq.cli.doctor",
    "completion": "modq.cli.completion",
}


class LazyGroup(click.Group):
    """Imports a command when it is needed, and ends every expected error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command's module and return its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; what a user, a file or a plugin caused is one line on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `modq … | head`: click knows what to do
            raise
        except KeyboardInterrupt:
            reason = "interrupted"
        except (ModqError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        click.echo(f"error: {reason}", err=True)
        return ctx.exit(1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(modq.__version__, prog_name="modq", message="%(prog)s %(version)s")
def main() -> None:
    """Fine-tune LoRA adapters on top of any weight quantizer."""
