"""What the README and docs/ tell a user to type works, in each page's order, in a fresh folder a page.

A `python` or `bash` block is run. Words after the language say more of a block:

    title="a/b.py"      it is the file a/b.py, which is written
    title="output"      (text) it is what the block before it printed; … stands for anything
    fails="…"           it fails: with this exit code (bash), or with an error of this class (python)
    notest="reason"     it is not run, for this reason

This file is also the program that runs a page: `python test_docs.py README.md`, in the page's folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORD = re.compile(r'\s+(\w+)="([^"]*)"')
LANGUAGES = {"python", "bash", "text", "toml", "json", "yaml"}
WORDS = {"title", "fails", "notest"}
MOST_UNTESTED = 4

SITE = "installed"
"""Where a page's `pip install ./folder` goes."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    line: int
    language: str
    words: dict[str, str]
    code: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not {"title", "notest"} & self.words.keys()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text[: found.start()].count("\n") + 1, found[1], dict(WORD.findall(found[2])), found[3])
        for found in FENCE.finditer(text)
    ]


# In the process that runs a page: libraries are imported once, and `modq …` calls the command in this process


def run_page(page: Path) -> None:
    output, namespace = "", {"__name__": "__main__"}
    for block in blocks(page):
        try:
            if block.words.get("title") == "output":
                check_output(block, output)
            elif "title" in block.words:
                write(Path(block.words["title"]), block.code)
            elif block.runs:
                output = run(block, namespace)
        except BaseException as error:
            error.add_note(f"in {page.name}, line {block.line}:\n{block.code}")
            raise


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def run(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block and return what it printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run_python(block, namespace) if block.language == "python" else run_bash(block)
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise
    return printed.getvalue()


def check_output(block: Block, output: str) -> None:
    lines = output.splitlines()
    for wanted in block.code.splitlines():
        pattern = re.compile(".*".join(map(re.escape, wanted.rstrip().split("…"))))
        found = next((i for i, line in enumerate(lines) if pattern.fullmatch(line.rstrip())), None)
        assert found is not None, f"line {block.line}: not printed, or not in this order: {wanted}\n{output}"
        lines = lines[found + 1 :]


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    expected = block.words.get("fails")
    try:
        exec(compile(block.code, f"<line {block.line}>", "exec"), namespace)
    except Exception as error:
        if type(error).__name__ != expected:
            raise
        print(f"{expected}: {error}")
    else:
        assert expected is None, f"no {expected} was raised"


def run_bash(block: Block) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        if line:
            code = run_line(line)
            assert code == int(block.words.get("fails", 0)), f"exit code {code} of: {line}"


def run_line(line: str) -> int:
    words = shlex.split(line, comments=True)
    if words[0] == "modq":
        return call_modq(words[1:])
    if words[0] == "make":
        words = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
    elif words[:2] == ["pip", "install"]:
        return sum(install(word.partition("[")[0]) for word in words[2:] if word != "-e")
    else:
        words = ["bash", "-c", line]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    print(done.stdout, done.stderr, sep="")
    return done.returncode


def call_modq(arguments: list[str]) -> int:
    from modq.cli import main

    try:
        main(arguments, prog_name="modq")
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("click always exits")


def install(word: str) -> int:
    """Install a package that the page has written; of the repository's own see that they are there."""
    if (ROOT / word / "pyproject.toml").is_file():
        return 0
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run([*pip, "--target", SITE, word], capture_output=True, text=True, check=False)
    print(done.stderr)
    importlib.invalidate_caches()  # this process has looked there before
    return done.returncode


# In pytest


@pytest.fixture
def folder(tiny_llama: Path, texts: list[str], tmp_path: Path) -> Path:
    """A user's folder: a model, training and held-out text."""
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "held-out.txt").write_text(" ".join(texts[:12]))
    return tmp_path


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if any(b.runs for b in blocks(path))])
def test_a_page_runs_from_top_to_bottom(page: str, folder: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(folder / SITE),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, page],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    found = blocks(PAGES[page])
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES
    assert {word for block in found for word in block.words} <= WORDS


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    reasons = [b.words["notest"] for path in PAGES.values() for b in blocks(path) if "notest" in b.words]
    assert len(reasons) <= MOST_UNTESTED
    assert all(len(reason.split()) > 1 for reason in reasons)


def test_the_cli_reference_is_what_the_commands_say() -> None:
    script = DOCS / "cli_reference.py"
    check = "import runpy, sys; print(runpy.run_path(sys.argv[1])['reference'](), end='')"
    check += "; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", check, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert written == done.stdout, "run `python docs/cli_reference.py`"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs-material is not installed")
def test_the_site_builds_without_a_warning_or_a_script_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) >= len(PAGES) - 1  # all but the README
    foreign = re.compile(
        r"""(?:<script[^>]*src|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href)=["']?https?:"""
    )
    assert [path.name for path, content in pages.items() if foreign.search(content)] == []
    assert [path.name for path, content in pages.items() if 'class="arithmatex"' in content] == []


def test_every_row_of_the_support_matrix_points_at_a_test_that_exists() -> None:
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    matrix = readme.partition("## What works")[2].partition("\n## ")[0]
    rows = [row for row in matrix.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        what, _, shown, by = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`([\w/]+\.py)`", by)
        assert bool(named) != (shown == "not run"), what
        assert [name for name in named if not (ROOT / name).is_file()] == [], what


def test_the_links_of_the_readme_lead_somewhere() -> None:  # mkdocs checks the others
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_environment_variable_is_explained() -> None:
    sources = [*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    used = {name for path in sources for name in re.findall(r'"(MODQ_[A-Z_]+)"', path.read_text("utf-8"))}
    page = PAGES["docs/guide/troubleshooting.md"].read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(MODQ_[A-Z_]+)` \|", page, re.MULTILINE))
    assert explained == used


def test_every_hook_is_listed_with_its_signature_and_whether_it_is_called() -> None:
    from modq.spec import REQUIRED_HOOKS, Quantizer

    sources = {*ROOT.glob("core/src/modq/**/*.py")} - {*ROOT.glob("core/src/modq/testing/**/*.py")}
    core = "".join(path.read_text("utf-8") for path in sources)
    page = PAGES["docs/plugins.md"].read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+\([\w, ]*\))` \| (required|optional|not called yet) \|", page, re.M))
    expected = {}
    for name, hook in vars(Quantizer).items():
        if not name.startswith("_"):
            called = re.search(rf"\.{name}\(", core)
            kind = "required" if name in REQUIRED_HOOKS else "optional" if called else "not called yet"
            expected[f"{name}({', '.join([*inspect.signature(hook).parameters][1:])})"] = kind
    assert listed == expected


if __name__ == "__main__":
    run_page(ROOT / sys.argv[1])
