"""What must hold for the repository as a whole: versions, who names and imports whom, what hooks say."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modq
from modq.registry import KNOWN_PACKAGES
from modq.spec import REQUIRED_HOOKS, Quantizer

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "src" / "modq"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
HOOKS = [name for name in vars(Quantizer) if not name.startswith("_")]

QUANTIZERS = re.compile("nf4|hqq|optq|quip", re.IGNORECASE)
MAY_NAME_QUANTIZERS = {
    "registry.py": "the table of packages that we publish, for install hints",
    "cli/list_backends.py": "the first package to install, where none is",
    "demo/run.py": "the demo runs one backend",
    "demo/report.py": "and prints the commands to go on with it",
}
"""Files under core/src/modq whose code names a quantizer, and why. Prose may: docstrings cite sources."""

# Spelled so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:wor[k]|ro[o]t|hom[e]|op[t])/|\.\./share[d]")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def project(folder: Path) -> dict[str, Any]:
    loaded = tomllib.loads(text(folder / "pyproject.toml"))["project"]
    assert isinstance(loaded, dict)
    return loaded


def repository_files() -> list[Path]:
    """Every file that is, or is about to be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def words_of_code(tree: ast.Module) -> Iterator[str]:
    """Yield the identifiers and strings of a module, but not its comments and docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


def imported(code: str) -> set[str]:
    """Return the top-level packages that code imports, late imports and `import_module("…")` included."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            names.add(ast.unparse(node.args[0]).strip("'\""))
    return {name.partition(".")[0] for name in names}


def test_versions_are_in_lockstep() -> None:
    versions = {folder.name: project(folder)["version"] for folder in (ROOT / "core", *PLUGINS)}
    assert set(versions.values()) == {modq.__version__}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_declares_itself_as_we_publish_it(plugin: Path) -> None:
    declared = project(plugin)
    name = plugin.name
    assert declared["name"] == f"modq-{name}" == KNOWN_PACKAGES[name]
    assert declared["entry-points"]["modq.quantizers"] == {name: f"modq_{name}:INFO"}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_takes_the_core_of_its_own_minor_version_only(plugin: Path) -> None:
    major, minor = modq.__version__.split(".")[:2]
    needed = f"modq>={major}.{minor},<{major}.{int(minor) + 1}"
    ours = [entry for entry in project(plugin)["dependencies"] if re.match(r"modq\b", entry)]
    assert ours == [needed]


def test_everything_first_party_is_installed_for_development() -> None:
    lines = text(ROOT / "requirements-dev.txt").splitlines()
    editable = {line.removeprefix("-e ").partition("[")[0] for line in lines if line.startswith("-e ")}
    assert editable == {"./core", *(f"./plugins/{plugin.name}" for plugin in PLUGINS)}


def test_every_pin_is_exact() -> None:
    lines = text(ROOT / "constraints.txt").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert pins == sorted(pins, key=str.lower)


def test_core_names_no_quantizer() -> None:
    naming = set()
    for path in CORE.rglob("*.py"):
        words = words_of_code(ast.parse(text(path)))
        if any(QUANTIZERS.search(word) for word in words):
            naming.add(path.relative_to(CORE).as_posix())
    assert naming == set(MAY_NAME_QUANTIZERS)


def test_the_search_for_names_sees_code_and_spares_prose() -> None:
    code = '"""nf4"""\n# nf4\ndef f():\n    "nf4"\n'
    assert "nf4" not in set(words_of_code(ast.parse(code)))
    for named in (
        "x = 'nf4'",
        "import modq_nf4",
        "from modq_nf4 import x",
        "x.nf4",
        "def nf4(): 0",
        "f(nf4=1)",
    ):
        assert any("nf4" in word for word in words_of_code(ast.parse(named))), named


def test_core_imports_no_plugin() -> None:
    packages = {package for path in CORE.rglob("*.py") for package in imported(text(path))}
    assert {package for package in packages if package.startswith("modq_")} == set()


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_no_other_plugin(plugin: Path) -> None:
    packages = {package for path in plugin.glob("src/**/*.py") for package in imported(text(path))}
    assert {package for package in packages if package.startswith("modq_")} <= {f"modq_{plugin.name}"}


def test_the_search_for_imports_sees_late_ones() -> None:
    late = "def f():\n    from modq_x.y import z\n    import_module('modq_v.w')\n    import modq_u as u\n"
    assert {"modq_x", "modq_v", "modq_u"} <= imported(late)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_whether_it_is_required(hook: str) -> None:
    documentation = inspect.getdoc(getattr(Quantizer, hook)) or ""
    assert documentation.startswith("REQUIRED. " if hook in REQUIRED_HOOKS else ("Optional. ", "Optional, "))


def test_required_hooks_exist() -> None:
    assert set(REQUIRED_HOOKS) < set(HOOKS)


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    contents = {path: path.read_text(encoding="utf-8", errors="ignore") for path in repository_files()}
    knowing = [path for path, content in contents.items() if MACHINE_PATHS.search(content)]
    assert knowing == []


def test_the_search_for_paths_sees_them_and_spares_urls() -> None:
    for path in ("/wor" + "k/x", "see `/hom" + "e/me/x`", "../share" + "d/x"):
        assert MACHINE_PATHS.search(path)
    for harmless in ("https://example.org/wor" + "k/x", "./op" + "t/", "workers/", "a.b/wor" + "k/"):
        assert not MACHINE_PATHS.search(harmless)
