"""Writes docs/cli.md out of the commands themselves: `python docs/cli_reference.py`. It imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from modq.cli import main

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
<!-- Written by docs/cli_reference.py out of the commands: edit those, then run it again. -->

# Command line

MODEL is the folder of a transformers model, or its name on the hub.

Exit codes: 0, it is done; 1, it failed, and one line on stderr says why; 2, the command was not understood.
"""


def reference() -> str:
    """Return the page."""
    root = click.Context(main, info_name="modq", terminal_width=100, **main.context_settings)
    return "\n".join([HEAD, *_sections(main, root)])


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a section for a command, and for each below it."""
    usage = command.get_usage(context).removeprefix("Usage: ")
    text = "\n\n".join(map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n")))
    options = (option for option in command.get_params(context) if isinstance(option, click.Option))
    records = (option.get_help_record(context) for option in options)
    rows = [f"| `{_cell(names)}` | {_cell(help)} |" for names, help in filter(None, records)]
    table = ["| option | |", "|---|---|", *rows]
    yield "\n".join([f"## {context.command_path}", "", "```text", usage, "```", "", text, "", *table, ""])
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        found = command.get_command(context, name)
        if found is not None and not found.hidden:
            yield from _sections(found, click.Context(found, info_name=name, parent=context))


def _paragraph(text: str) -> str:
    """Keep the lines of a paragraph that click would not wrap, and dollars from being formulas."""
    lines = text.removeprefix("\b\n")
    return text.replace("$", "\\$") if lines == text else f"```text\n{lines}\n```"


def _cell(text: str) -> str:
    """Keep a text in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("$", "\\$")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
