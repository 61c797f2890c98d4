"""Makes the virtual environments of the libraries that modq is compared with.

    python -m benchmarks.peers [PEER ...]

A peer's environment holds only what the project's own lacks: a .pth file puts the project's packages behind
its own, and the installed torch, transformers and peft are pinned, so nothing big is downloaded twice and
every system runs on the same ones. bitsandbytes is in the project's environment already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"
SHARED = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
"""Packages that every system must run at the project's version: a peer must not bring its own."""

BUILD = ("setuptools>=77,<83", "wheel")
"""What builds the peers that come as source: gptqmodel refuses a newer setuptools."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A library with an environment of its own."""

    name: str
    requirements: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)  # for the installation


PEERS = {
    peer.name: peer
    for peer in (
        Peer("hqq", ("hqq==0.2.8.post1",)),
        # 7.7.0 wants torch 2.14. transformers loads its checkpoints through optimum.
        Peer("gptqmodel", ("gptqmodel==7.6.0", "optimum==2.3.0"), {"MAX_JOBS": "2"}),
        # Its wheels are not on PyPI: this compiles for some minutes.
        Peer("llamacpp", ("llama-cpp-python==0.3.36",), {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
    )
}


def python_of(peer: str | None) -> Path:
    """Return the interpreter that runs a peer; None is the project's own. It may not exist."""
    return Path(sys.executable) if peer is None else FOLDER / peer / "bin" / "python"


def make(peer: Peer) -> None:
    """Create the environment, or complete one that exists."""
    folder = FOLDER / peer.name
    venv.create(folder, symlinks=True)  # its pip is the project's
    _put_project_behind(folder)
    pins = folder / "pins.txt"
    pins.write_text("".join(f"{package}=={_release(package)}\n" for package in SHARED), encoding="utf-8")
    for requirements in (BUILD, peer.requirements):
        subprocess.run(_install(peer, pins, requirements), check=True, env=_environment(peer))


def _put_project_behind(folder: Path) -> None:
    """Let the environment see the project's packages, and the packages that those name by .pth files."""
    (own,) = folder.glob("lib/python3*/site-packages")
    project = sysconfig.get_path("purelib")
    (own / "project.pth").write_text(f"import site; site.addsitedir({project!r})\n", encoding="utf-8")


def _release(package: str) -> str:
    """Return the installed version without its local part: 2.13.0+cpu satisfies 2.13.0."""
    return version(package).partition("+")[0]


def _install(peer: Peer, pins: Path, requirements: tuple[str, ...]) -> list[str]:
    python = str(python_of(peer.name))
    # Without isolation a build uses the torch that is there, instead of downloading one to build against.
    return [python, "-m", "pip", "install", "--no-build-isolation", "-c", str(pins), *requirements]


def _environment(peer: Peer) -> dict[str, str]:
    # hqq's setup.py calls "python", whichever the path finds
    path = f"{python_of(peer.name).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **peer.environment}


def main() -> None:
    """Make the environments that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all by default")
    given = parser.parse_args()
    if unknown := sorted(set(given.peers) - set(PEERS)):
        parser.error(f"unknown: {', '.join(unknown)}; expected {', '.join(PEERS)}")
    for name in given.peers or PEERS:
        make(PEERS[name])


if __name__ == "__main__":
    main()
