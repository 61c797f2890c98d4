"""The plugin in examples/ is as small as is said, keeps what it promises, and trains."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import succeed
from environments import Environment, make_environment

from modq.testing.checks import all_checks

EXAMPLES = Path(__file__).parents[1] / "examples"
PLUGIN = EXAMPLES / "outlier-int8"
QUICK = ("contract", "purity")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Where a copy of the plugin is installed: building would leave files beside the original."""
    folder = tmp_path_factory.mktemp("examples")
    copy = shutil.copytree(PLUGIN, folder / PLUGIN.name)
    made = make_environment(folder / "venv")
    made.install(copy)
    return made


def test_its_modules_have_at_most_120_lines() -> None:
    modules = list(PLUGIN.glob("src/**/*.py"))
    assert len(modules) == 2
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules) <= 120


def test_it_passes_the_checks_that_are_quick(environment: Environment) -> None:
    only = [word for group in QUICK for word in ("--only", group)]
    report = json.loads(environment.succeed("-m", "modq", "check", "outlier-int8", "--json", *only))
    assert report["ok"]
    assert len(report["checks"]) > 10


@pytest.mark.slow  # more than a minute, and it trains in two processes
def test_it_passes_all_checks(environment: Environment) -> None:
    command = ["-m", "modq", "check", "outlier-int8", "--json", "--set", "kept=0.1"]
    report = json.loads(environment.succeed(*command, timeout=900))
    assert report["ok"]
    assert {check["name"] for check in report["checks"]} == all_checks().keys()


def test_the_script_trains_a_model_on_it(environment: Environment, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    said = environment.succeed(EXAMPLES / "finetune.py", tiny_llama, "--output", adapter, "--steps", "8")
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (adapter / "adapter_model.safetensors").is_file()
    (used,) = json.loads(succeed("inspect", adapter, "--json").stdout)["base"]["schemes"]
    assert (used["backend"], used["options"]) == ("outlier-int8", {"kept": 0.02})
