"""The command line of the benchmarks.

    python -m benchmarks training --out benchmarks/results/training.json
    python -m benchmarks nli --out benchmarks/results/nli.json
    python -m benchmarks quality --out benchmarks/results/quality.json
    python -m benchmarks table benchmarks/results/training.json

A suite writes its figures as JSON and its table, in Markdown, beside them; `table` renders a file again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.machine import describe
from benchmarks.runner import Runs, results

SUITES: dict[str, tuple[ModuleType, ModuleType]] = {
    name: (import_module(f"benchmarks.{name}"), import_module(f"benchmarks.{name}_report"))
    for name in ("training", "nli", "quality", "layers", "low_bits", "kit", "memory", "kernels", "generate")
}
"""Each suite's cells, and its report."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    given = parse(arguments)
    if given.suite == "table":
        print(render(json.loads(given.results.read_text(encoding="utf-8"))))
        return
    suite, _ = SUITES[given.suite]
    with tempfile.TemporaryDirectory(prefix="modq-benchmarks-") as folder:
        work = given.work.resolve() if given.work else Path(folder)
        runs = suite.run(given, _model(given.model), work, lambda line: print(line, flush=True))
    found = to_json(given, runs)
    write(given.out, found)
    print(f"\n{render(found)}")
    if failed := [
        each.cell.name for each in runs if each.not_run and not each.not_run.startswith("no environment")
    ]:
        sys.exit(f"failed: {', '.join(failed)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `command` is how to say it again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="suite", required=True)
    for name, (suite, _) in SUITES.items():
        command = commands.add_parser(name, help=(suite.__doc__ or "").splitlines()[0])
        _add_common(command)
        suite.add_arguments(command)
    commands.add_parser("table", help="render results again").add_argument("results", type=Path)
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    given.command = " ".join(["python -m benchmarks", *words])
    return given


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, required=True, help="the JSON file; the table goes beside it, as .md"
    )
    command.add_argument("--rounds", type=int, default=3, help="how often every cell runs (default: 3)")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    command.add_argument("--timeout", type=float, default=1800, help="seconds that a cell may take")
    command.add_argument("--systems", type=_list, help="only these, separated by commas")
    command.add_argument("--dtypes", type=_list, help="only these, separated by commas")
    command.add_argument("--work", type=Path, help="keeps the checkpoints here, and uses what is here")
    command.add_argument("--model", type=Path, help="a folder with a model instead of the demo's")


def _list(words: str) -> list[str]:
    return words.split(",")


def _model(chosen: Path | None) -> Path:
    if chosen is not None:
        return chosen.resolve()
    from modq.demo.weights import demo_model  # converts it the first time: not on the way to --help

    return demo_model()


def to_json(given: argparse.Namespace, runs: list[Runs]) -> dict[str, Any]:
    """Return everything that is known of a run of a suite."""
    _, report = SUITES[given.suite]
    return {
        "suite": given.suite,
        "command": given.command,
        "machine": {**describe("transformers", "peft"), "threads": given.threads},
        "model": "SmolLM2-135M-Instruct, channels rescaled" if given.model is None else given.model.name,
        **report.summary(runs),
        "cells": results(runs),
    }


def write(file: Path, found: dict[str, Any]) -> None:
    """Write the figures, and their table beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dumps(found) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(found) + "\n", encoding="utf-8")


def dumps(found: dict[str, Any]) -> str:
    """Spell results as JSON, with a list of numbers or words on one line."""
    flat = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    return flat.sub(lambda its: f"[{' '.join(its[1].split())}]", json.dumps(found, indent=1))


def render(found: dict[str, Any]) -> str:
    """Render a suite's results in Markdown, with what they depend on."""
    machine = found["machine"]
    flags = ", ".join(machine["flags"]) or "none of the flags that matter"
    head = [
        f"# {found['suite']}",
        f"Generated by `{found['command']}`; do not edit.",
        f"{found['model']}; {machine['cpu']} ({flags}), {machine['threads']} of {machine['cores']} cores. "
        "Figures are medians over rounds, with the smallest and the largest.",
        f"Versions: {_versions(found)}.",
    ]
    _, report = SUITES[found["suite"]]
    return "\n\n".join([*head, report.render(found)])


def _versions(found: dict[str, Any]) -> str:
    versions: dict[str, str] = {}
    for cell in found["cells"]:
        for figures in cell["rounds"]:
            versions |= (figures or {}).get("versions", {})
    return ", ".join(f"{package} {version}" for package, version in versions.items())


if __name__ == "__main__":
    main()
