"""`modq new-plugin`: a package with a quantizer that works, to be changed into another."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click

import modq
from modq.errors import OptionError
from modq.folders import new_folder
from modq.registry import KNOWN_PACKAGES, list_backends

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

NOT_A_NAME = {"dense": "it is what --layers calls a linear that is left alone"}

FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    ".gitignore": "gitignore.in",
    ".github/workflows/test.yml": "ci.yml.in",
    "src/$module/__init__.py": "init.py.in",
    "src/$module/options.py": "options.py.in",
    "src/$module/quantizer.py": "quantizer.py.in",
    "tests/test_conformance.py": "test_conformance.py.in",
}
"""What is written, and the template of each."""


@click.command("new-plugin")
@click.argument("name")
@click.option(
    "--dir",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to put the folder; by default here.",
)
def command(name: str, parent: Path) -> None:
    """Write a package with a new quantizer, NAME, to the new folder modq-NAME.

    It works at once: rounding to the nearest in groups, with the entry point by which modq finds it, a
    conformance test and a CI file. Install it, check it, then change it into your own.

    NAME is what users will give as --backend: lower case letters, digits and dashes.
    """
    _check_name(name)
    folder = parent / f"modq-{name}"
    names = _names(name)
    with new_folder(folder) as draft:
        for path, template in FILES.items():
            target = draft / Template(path).substitute(names)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_template(template).substitute(names), encoding="utf-8")
    click.echo("\n".join(_next_steps(name, folder)))


def _check_name(name: str) -> None:
    if name.startswith("modq-"):
        raise OptionError(f"name {name!r}: leave 'modq-' out; the package gets it in front by itself")
    if not NAME.fullmatch(name):
        raise OptionError(f"name {name!r}, expected lower case letters, digits and dashes, a letter first")
    if name in NOT_A_NAME:
        raise OptionError(f"name {name!r} is taken: {NOT_A_NAME[name]}; choose another")
    if name in KNOWN_PACKAGES:
        raise OptionError(
            f"name {name!r} is taken: it is the backend of {KNOWN_PACKAGES[name]}; choose another"
        )
    with contextlib.redirect_stdout(sys.stderr):  # a plugin may print when it is imported
        installed = {backend.name: backend.distribution for backend in list_backends()}
    if name in installed:
        raise OptionError(f"name {name!r} is taken: {installed[name]} is installed; choose another")
    if find_spec(module := _module(name)) is not None:
        raise OptionError(f"name {name!r} is taken: a module {module!r} is installed; choose another")


def _names(name: str) -> dict[str, str]:
    major, minor = modq.__version__.split(".")[:2]
    return {
        "name": name,
        "package": f"modq-{name}",
        "module": _module(name),
        "modq_at_least": f"{major}.{minor}",
        "modq_below": f"{major}.{int(minor) + 1}",
    }


def _module(name: str) -> str:
    return f"modq_{name.replace('-', '_')}"


def _template(name: str) -> Template:
    return Template((files("modq") / "templates" / "plugin" / name).read_text(encoding="utf-8"))


def _next_steps(name: str, folder: Path) -> list[str]:
    shown = str(folder) if folder.is_absolute() else f"./{folder.as_posix()}"
    return [
        f"wrote {shown}, a quantizer that works. Next:",
        "",
        f"  pip install -e {shlex.quote(f'{shown}[test]')}",
        f"  modq check {name}",
        f"  pytest {shlex.quote(shown)}",
        "",
        f"Then make it your own: {shown}/README.md says where. Its licence is yours to choose.",
    ]
