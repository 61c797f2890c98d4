"""Runs the kit on every mutant and writes README.md, the table of what catches what: `python table.py`.

The checks that train in two processes are left out: they look at the core more than at a backend, and cost
more than all others together.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import modq_mutants_declared  # noqa: F401  # it fills the register, as the next two do
import modq_mutants_kept  # noqa: F401
import modq_mutants_numbers  # noqa: F401
import torch
from modq_mutant_register import MUTANTS, Mutant, install

from modq.testing import Subject, run_check
from modq.testing.checks import all_checks

LEFT_OUT = ("two_processes_train_by_ddp_as_one_does", "two_processes_train_by_fsdp2_as_one_does")

HEAD = """# Mutants

`modq_sound.py` is a right backend, written without any of the core's layouts. Each mutant is that backend
with one mistake, and is caught by the check whose message points at the mistake; others may fail, too.
`tests/test_mutants.py` runs the check that is named on each mutant, and all checks on the right one.

Written by `python tests/mutants/table.py`, which runs all checks on all mutants but for those that train in
two processes.

| mutant | mistake | caught by | what else fails |
| --- | --- | --- | --- |"""


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    install(Path(folder))
    sys.path.insert(0, folder)
    rows = [_row(name, mutant) for name, mutant in MUTANTS.items()]
    Path(__file__).with_name("README.md").write_text("\n".join([HEAD, *rows]) + "\n", encoding="utf-8")


def _row(name: str, mutant: Mutant) -> str:
    os.environ["MODQ_BACKENDS"] = name  # all of them know the same foreign format
    subject = Subject(name)
    wanted = [check for check in all_checks().values() if check.name not in LEFT_OUT]
    failed = [check.name for check in wanted if not run_check(check, subject).ok]
    if mutant.caught_by not in failed:
        raise SystemExit(f"{name} is not caught by {mutant.caught_by}; what fails is {', '.join(failed)}")
    print(name, len(failed), flush=True)
    others = ", ".join(f"`{check}`" for check in failed if check != mutant.caught_by)
    return f"| `{name}` | {mutant.mistake} | `{mutant.caught_by}` | {others or 'nothing'} |"


if __name__ == "__main__":
    main()
