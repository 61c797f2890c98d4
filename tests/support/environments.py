"""Environments to install packages into: one that sees all of this one's, and may be written to."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(
        self, *arguments: object, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python with these arguments."""
        command = [self.python, "-W", "ignore", *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )

    def succeed(self, *arguments: object, cwd: Path | None = None, timeout: float = 300) -> str:
        """Run what must not fail, and return what it printed."""
        done = self.run(*arguments, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, package: Path) -> None:
        """Do `pip install -e` as one would without network."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
        done = subprocess.run(
            [*pip, "install", *options, "-e", str(package)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def make_environment(folder: Path) -> Environment:
    """Make an environment that has the packages of this one, the editable ones too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    parent = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    return Environment(folder)
