"""Runs modq's commands in this process, and says what is expected of them."""

from __future__ import annotations

from click.testing import CliRunner, Result

from modq.cli import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result


def error_line(*args: object) -> str:
    """Run what must fail with exit code 1 and exactly one line, on stderr, and return that."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return only_error(result.stderr)


def only_error(stderr: str) -> str:
    """Return the one line on stderr, but for those on progress that a slow machine gets."""
    (line,) = (line for line in stderr.splitlines() if not line.startswith("linear "))
    assert line.startswith("error: ")
    return line
