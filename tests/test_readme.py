"""What the README tells a user to type works, in the README's order, in one folder."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in code_blocks("bash") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tiny_llama, texts, tmp_path_factory):
    """A user's folder: a model, training and held-out text."""
    made = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_llama, made / "my-model")
    (made / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (made / "held-out.txt").write_text(" ".join(texts[:12]))
    return made


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_of_a_kind_that_is_tested():
    assert COMMANDS
    assert {shlex.split(line)[0] for line in COMMANDS} == {"make", "pip", "modq"}


def test_the_modq_commands_run(folder):
    for line in (line for line in COMMANDS if line.startswith("modq ")):
        output = run(folder, str(Path(sys.executable).with_name("modq")), *shlex.split(line)[1:])
        assert output.strip(), line
    assert (folder / "my-model-nf4" / "model.safetensors").is_file()
    assert (folder / "adapter" / "adapter_config.json").is_file()


def test_the_python_blocks_run(folder):
    script = "\n".join(code_blocks("python"))
    output = run(folder, sys.executable, "-c", script)
    assert "4.12" in output
    assert (folder / "merged" / "model.safetensors").is_file()


def test_the_make_targets_exist_and_the_installed_folders_are_packages():
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            run(ROOT, "make", "--dry-run", *words[1:])
        elif words[0] == "pip":
            assert words[1] == "install"
            assert all((ROOT / word.split("[")[0] / "pyproject.toml").is_file() for word in words[2:])
