"""`--config FILE.yaml`: the options of a command from a file; those of the command line count more."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import click

from modq.errors import OptionError


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the file's content the defaults of the command's parameters."""
    if path is None:
        return
    import yaml  # late, like all that a command needs only at times

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{str(path)!r} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise OptionError(f"{str(path)!r} holds a {type(content).__name__}, expected `option: value` lines")
    ctx.default_map = dict(_parameter(ctx.command, key, value, path) for key, value in content.items())


def _parameter(command: click.Command, key: Any, value: Any, path: Path) -> tuple[str, Any]:
    """Return the parameter that a key of the file is for, and its value as click takes it."""
    names = {_key(each): each for each in command.params if _key(each) not in ("config", "demo", "resume")}
    written = str(key).replace("_", "-")
    if written not in names:
        near = difflib.get_close_matches(written, names, n=3) or sorted(names)
        raise OptionError(f"{str(path)!r} has the unknown option {key!r}; near it: {', '.join(near)}")
    if written == "set":
        if not isinstance(value, dict):
            raise OptionError(f"{str(path)!r}: set is {value!r}, expected `key: value` lines below it")
        value = [
            f"{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in value.items()
        ]
    elif isinstance(value, list):
        value = ",".join(map(str, value))
    return str(names[written].name), value


def _key(parameter: click.Parameter) -> str:
    """The name that the file has for a parameter: that of the option, without its dashes."""
    return parameter.opts[0].lstrip("-")


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="A YAML file with these options, as `lr: 0.0002`; those given here count more.",
)
