"""`modq new-plugin`: what it writes installs without network, keeps what it promises, and trains."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import error_line, run, succeed
from environments import Environment, make_environment

import modq
from modq.cli.new_plugin import FILES
from modq.registry import KNOWN_PACKAGES
from modq.testing.checks import all_checks

QUICK = ("contract", "purity")
"""The groups of checks that take no minute together."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new package whose name has all that a name may have."""
    parent = tmp_path_factory.mktemp("new")
    assert "modq check my-grid2" in succeed("new-plugin", "my-grid2", "--dir", parent).stdout
    return parent / "modq-my-grid2"


@pytest.fixture(scope="module")
def environment(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Where the package is installed."""
    made = make_environment(tmp_path_factory.mktemp("environment") / "venv")
    made.install(package)
    return made


def test_every_file_is_written_and_no_placeholder_is_left(package: Path) -> None:
    written = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    written = {path for path in written if "egg-info" not in path}
    assert written == {path.replace("$module", "modq_my_grid2") for path in FILES}
    for path in written - {".github/workflows/test.yml"}:
        assert "$" not in (package / path).read_text(encoding="utf-8"), path
    assert "${{ matrix.python }}" in (package / ".github/workflows/test.yml").read_text(encoding="utf-8")


def test_the_project_declares_the_backend_and_this_modq(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "modq-my-grid2"
    assert project["entry-points"]["modq.quantizers"] == {"my-grid2": "modq_my_grid2:INFO"}
    assert project["optional-dependencies"]["test"] == ["modq[testing]"]
    major, minor = modq.__version__.split(".")[:2]
    assert project["dependencies"] == [f"modq>={major}.{minor},<{major}.{int(minor) + 1}"]


def test_its_code_is_clean_by_an_ordinary_linter(package: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--isolated", "--no-cache", "--line-length", "110", "--target-version", "py311"]
    for command in (["check", "--select", "E,F,W,I,B,UP,SIM,RET,PT"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, *rules, package], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_installs_without_network_and_is_listed(environment: Environment) -> None:
    listed = json.loads(environment.succeed("-m", "modq", "list-backends", "--check", "--json"))["backends"]
    mine = next(backend for backend in listed if backend["name"] == "my-grid2")
    assert (mine["status"], mine["package"]) == ("ok", "modq-my-grid2")


def test_it_passes_the_checks_that_are_quick(environment: Environment) -> None:
    only = [word for group in QUICK for word in ("--only", group)]
    report = json.loads(environment.succeed("-m", "modq", "check", "my-grid2", "--json", *only))
    assert report["ok"]
    assert {check["group"] for check in report["checks"]} <= set(QUICK)
    assert len(report["checks"]) > 10


@pytest.mark.slow  # more than a minute, and it trains in two processes
def test_it_passes_all_checks_and_its_own_tests(environment: Environment, package: Path) -> None:
    report = json.loads(environment.succeed("-m", "modq", "check", "my-grid2", "--json", timeout=900))
    assert report["ok"]
    assert {check["name"] for check in report["checks"]} == all_checks().keys()
    assert " passed" in environment.succeed("-m", "pytest", "-q", "-k", "declared or untouched", cwd=package)


def test_a_model_trains_on_it(environment: Environment, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    how = ["--backend", "my-grid2", "--bits", "3", "--group-size", "32", "--max-steps", "2"]
    command = ["-m", "modq", "finetune", tiny_llama, "--data", data, "--output", tmp_path / "adapter", *how]
    environment.succeed(*command)
    (used,) = json.loads(succeed("inspect", tmp_path / "adapter", "--json").stdout)["base"]["schemes"]
    assert (used["backend"], used["package"]) == ("my-grid2", "modq-my-grid2")
    assert used["options"] == {"bits": 3, "group_size": 32}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Grid", "expected lower case letters"),
        ("4bit", "a letter first"),
        ("my_grid", "digits and dashes"),
        ("grid-", "digits and dashes"),
        ("../grid", "digits and dashes"),
        ("modq-grid", "leave 'modq-' out"),
        ("dense", "is what --layers calls"),
        (next(iter(KNOWN_PACKAGES)), "is taken: it is the backend of"),
    ],
)
def test_a_name_that_will_not_do_is_refused(name: str, said: str, tmp_path: Path) -> None:
    assert said in error_line("new-plugin", name, "--dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_what_is_installed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "outlier_kit-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outlier-kit\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[modq.quantizers]\ntaken = no_such_module:INFO\n")
    (site / "modq_also_taken.py").write_text("raise RuntimeError('looked for, not imported')\n")
    monkeypatch.syspath_prepend(site)
    assert "outlier-kit 2.0 is installed" in error_line("new-plugin", "taken", "--dir", tmp_path)
    assert "a module 'modq_also_taken' is installed" in error_line(
        "new-plugin", "also-taken", "--dir", tmp_path
    )


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "modq-grid").mkdir()
    (tmp_path / "modq-grid" / "mine.txt").write_text("mine")
    assert "exists already" in error_line("new-plugin", "grid", "--dir", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["modq-grid", "mine.txt"]


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "last", "no-such-template.in")
    assert "no-such-template.in" in error_line("new-plugin", "grid", "--dir", tmp_path / "deep" / "er")
    assert list(tmp_path.iterdir()) == []


def test_it_costs_no_torch() -> None:
    code = (
        "import sys; from modq.cli import main; main(['new-plugin', '--help'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_missing_name_is_a_usage_error() -> None:
    assert run("new-plugin").exit_code == 2
