"""`modq check`: the kit as a command, its report and its JSON document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import error_line, run, succeed

from modq.registry import describe_backend, find
from modq.testing import Check, Outcome, Verdict
from modq.testing.report import Result, lines_of, summary_of

LOUD = """
import os
from dataclasses import dataclass
from modq import QuantizerInfo

print("hello from an import")
os.write(1, b"hello from below Python\\n")

@dataclass(frozen=True)
class Options:
    pass

def info(name, *bits):
    return QuantizerInfo(
        name=name, summary="halves", implementation="modq_chatty_hooks:Loud", options="modq_chatty:Options",
        bits=bits, max_relative_error={width: 0.6 for width in bits},
    )

INFO, NARROW = info("loud", 32), info("narrow", 2, 32)
"""

HOOKS = """
import torch
from modq import QuantizedWeight, TensorSpec, hookimpl

class Loud:
    @hookimpl
    def describe(self, shape):
        return {"values": TensorSpec(shape, torch.float32)}

    @hookimpl
    def quantize(self, weight):
        print("hello from a hook")
        shape = (weight.shape[0], weight.shape[1])
        return QuantizedWeight("loud", 1, shape, {"values": weight.div_(2).float().clone()})

    @hookimpl
    def dequantize(self, qweight, dtype, rows, columns):
        return qweight.tensors["values"][rows, columns].to(dtype, copy=True)
"""


@pytest.fixture
def loud(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has a backend which prints, and edits the weight that it is given."""
    info = tmp_path / "modq_chatty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modq-chatty\nVersion: 1.0\n")
    points = "loud = modq_chatty:INFO\nnarrow = modq_chatty:NARROW\n"
    (info / "entry_points.txt").write_text(f"[modq.quantizers]\n{points}")
    (tmp_path / "modq_chatty.py").write_text(LOUD)
    (tmp_path / "modq_chatty_hooks.py").write_text(HOOKS)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def modq_in(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "modq", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def results(*verdicts: Verdict) -> list[Result]:
    checks = [Check(f"check_{i}", "group", f"Promise {i}.", (1, 0), print) for i in range(len(verdicts))]
    return [
        Result(Outcome(each, verdict, "" if verdict is Verdict.PASSED else "what was seen"), 0.25)
        for each, verdict in zip(checks, verdicts, strict=True)
    ]


def test_the_report_has_a_line_a_check_under_its_group() -> None:
    lines = succeed("check", "nf4", "--only", "purity").stdout.splitlines()
    assert lines[0] == "purity"
    passed = [line.split() for line in lines if line.startswith("  passed")]
    assert "inputs_stay_untouched" in {words[3] for words in passed}
    assert all(float(words[1]) >= 0 and words[2] == "s" for words in passed)
    assert lines[-1].startswith(
        f"{len(passed)} checks of nf4 ({find('nf4').distribution}): {len(passed)} passed"
    )


def test_json_is_one_document_and_further_options_are_a_variant() -> None:
    asked = ["--only", "inputs_stay_untouched", "--set", "bits=2", "--set", "group_size=32"]
    document = json.loads(succeed("check", "hqq", "--json", *asked).stdout)
    assert (document["schema"], document["backend"], document["package"]) == (1, "hqq", "modq-hqq")
    assert document["ok"]
    assert len(document["variants"]) == len(describe_backend("hqq").bits) + 1
    (check,) = document["checks"]
    assert (check["name"], check["group"], check["verdict"]) == ("inputs_stay_untouched", "purity", "passed")
    assert document["counts"] == {"passed": 1}


def test_a_failure_is_exit_code_1_and_stdout_is_the_document_alone(loud: dict[str, str]) -> None:
    done = modq_in(loud, "check", "loud", "--json", "--only", "inputs_stay_untouched")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert not document["ok"]
    (check,) = document["checks"]
    assert check["verdict"] == "failed"
    assert check["detail"].startswith("the weight given to quantize(): ")
    for said in ("from an import", "from below Python", "from a hook"):
        assert f"hello {said}" in done.stderr


def test_a_backend_that_cannot_be_asked_for_its_widths_is_one_line(
    loud: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(loud["PYTHONPATH"])
    result = run("check", "narrow")
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: backend 'narrow' cannot be checked: INFO.bits has 2")


def test_what_is_wrong_with_the_command_shows_before_anything_runs() -> None:
    assert "no quantizer backend 'nf5'" in error_line("check", "nf5")
    assert "has no option 'colour'" in error_line("check", "nf4", "--set", "colour=red")
    assert "expected key=value" in error_line("check", "nf4", "--set", "colour")
    unknown = run("check", "nf4", "--only", "input_stays_untouched")
    assert unknown.exit_code == 2
    assert "there is no check 'input_stays_untouched'; there is inputs_stay_untouched" in unknown.stderr
    assert "purity" in run("check", "nf4", "--only", "zzz").stderr


def test_a_wrong_name_costs_no_torch() -> None:
    code = (
        "import sys; from modq.cli import main\n"
        "try: main(['check', 'nf5'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("verdict", "lines"),
    [
        (Verdict.PASSED, ["  passed           0.25 s  check_0"]),
        (
            Verdict.FAILED,
            [
                "  FAILED           0.25 s  check_0",
                "      promised: Promise 0.",
                "      found:    what was seen",
            ],
        ),
        (Verdict.NOT_APPLICABLE, ["  not applicable   0.25 s  check_0", "      what was seen"]),
        (Verdict.NEWER, ["  newer            0.25 s  check_0", "      what was seen"]),
    ],
)
def test_a_result_says_what_was_promised_and_what_was_found(verdict: Verdict, lines: list[str]) -> None:
    assert lines_of(results(verdict)[0]) == lines


def test_the_summary_counts_and_says_what_to_run_again() -> None:
    backend = find("nf4")
    seen = results(Verdict.PASSED, Verdict.FAILED, Verdict.NOT_APPLICABLE, Verdict.FAILED, Verdict.PASSED)
    counted, then = summary_of(backend, seen)
    assert counted.endswith(": 2 passed, 2 failed, 1 not applicable; 1.2 s")
    assert then.endswith("modq check nf4 --only check_1 --only check_3")
    assert "INFO.api" in summary_of(backend, results(Verdict.PASSED, Verdict.NEWER))[1]
    assert len(summary_of(backend, results(Verdict.PASSED))) == 1
