"""The packages with C++ in them: what their wheels hold, with a compiler and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import modq

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
COMPILER = os.environ.get("CXX", "c++")


def build(folder: Path, tmp_path: Path, *options: str, **switches: str) -> Path:
    """Build the wheel of a copy that is out of the repository and has nothing built yet."""
    copy = tmp_path / folder.name
    shutil.copytree(
        folder, copy, ignore=shutil.ignore_patterns("libmodq*", "CMakeCache.txt", "CMakeFiles", "build")
    )
    wheels = tmp_path / "wheels"
    command = [*PIP, "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), *options, str(copy)]
    environment = os.environ | switches
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources(folder: Path) -> set[str]:
    """The files of a package's source that are no build's result."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("libmodq"))
    return {path.relative_to(folder).as_posix() for path in paths if "__pycache__" not in path.parts}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the name of the library is that of Linux")
def test_one_wheel_with_a_library_serves_every_python(tmp_path: Path) -> None:
    option = f"cmake.define.MODQ_INCLUDE={modq.get_include()}"
    package = ROOT / "plugins" / "quipsharp"
    wheel = build(package, tmp_path, "--config-settings", option)
    assert wheel.name.startswith(f"modq_quipsharp-{modq.__version__}-py3-none-linux_")
    assert files(wheel) == sources(package / "src") | {"modq_quipsharp/libmodq_quipsharp_cpu.so"}


@pytest.mark.parametrize("package", ["core", "plugins/quipsharp"])
def test_without_a_compiler_the_wheel_is_plain_python(tmp_path: Path, package: str) -> None:
    wheel = build(ROOT / package, tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert files(wheel) == sources(ROOT / package / "src")


def test_modq_without_its_library_imports_and_says_why(tmp_path: Path) -> None:
    wheel = build(ROOT / "core", tmp_path, CXX=str(tmp_path / "no-compiler"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "site")!r}, {sysconfig.get_path("purelib")!r}]
import torch, modq, modq.layouts, modq.linear
from modq.kernels.library import library, why_missing
print(modq.__file__, library(), why_missing())
layout = modq.layouts.Affine((4, 8), 4, 8, "symmetric", torch.float32)
tensors = layout.pack(torch.full((4, 8), 9, dtype=torch.uint8), torch.full((4, 1), 0.5))
print(layout.matmul(torch.ones(2, 8), tensors, transpose=False).unique().tolist())
"""
    # -S: the editable install would come first
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'site'}")
    assert "None libmodq_cpu.so is not there: this modq was installed without a C++ compiler" in done.stdout
    assert done.stdout.splitlines()[-1] == "[4.0]"  # 8 weights of (9 - 8) / 2
