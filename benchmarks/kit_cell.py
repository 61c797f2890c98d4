"""Times one run of the conformance kit: `python -m benchmarks.kit_cell SETTINGS`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import cell
from benchmarks.kit import MUTANTS

ROOT = Path(__file__).parents[1]


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds from start to end, and how many checks passed."""
    backend = settings["backend"]
    if settings["way"] == "pytest":
        file = (
            "tests/test_mutants.py" if backend == MUTANTS else f"plugins/{backend}/tests/test_conformance.py"
        )
        seconds, output = _timed("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
        (passed,) = re.findall(r"^(\d+) passed", output, flags=re.MULTILINE)
        return {"seconds": seconds, "passed": int(passed), "versions": cell.versions_of(())}
    seconds, output = _timed("-m", "modq", "check", backend, "--json")
    verdicts = [each["verdict"] for each in json.loads(output)["checks"]]
    return {"seconds": seconds, "passed": verdicts.count("passed"), "versions": cell.versions_of(())}


def _timed(*command: str) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ends with {done.returncode}: {done.stdout[-300:]}")
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    cell.run(main)
