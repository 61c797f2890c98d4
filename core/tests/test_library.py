"""The compiled library: it runs on torch's threads, by the instruction set asked for, or says why not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import modq
from modq.errors import ModqError
from modq.kernels import library as its

COUNT = 1_000_003
GRAIN = 1000

opened = its.library()
compiled = pytest.mark.skipif(opened is None, reason="modq is installed without its library")


@pytest.fixture
def lib() -> Iterator[ctypes.CDLL]:
    assert opened is not None
    opened.modq_probe_isa.restype = ctypes.c_char_p
    for name in ("modq_probe_threads", "modq_probe_sum"):
        getattr(opened, name).restype = ctypes.c_int64
    before = torch.get_num_threads(), its.isa(opened)
    yield opened
    torch.set_num_threads(before[0])
    its.use_isa(opened, before[1])


def probe(lib: ctypes.CDLL, values: torch.Tensor) -> tuple[int, int]:
    """Return the sum of the values, or -1 for a negative one, and how many threads it took."""
    used = ctypes.c_int64(0)
    where, count = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel())
    total = lib.modq_probe_sum(where, count, ctypes.c_int64(GRAIN), ctypes.byref(used))
    return total, used.value


def run(code: str, **switches: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | switches
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_loop_takes_as_many_threads_as_torch_is_told(lib: ctypes.CDLL, threads: int) -> None:
    torch.set_num_threads(threads)
    values = torch.arange(COUNT, dtype=torch.int32)
    assert lib.modq_probe_threads() == threads
    assert probe(lib, values) == (COUNT * (COUNT - 1) // 2, threads)


@compiled
def test_a_loop_shorter_than_its_grain_and_an_empty_one_start_no_thread(lib: ctypes.CDLL) -> None:
    torch.set_num_threads(2)
    assert probe(lib, torch.ones(GRAIN, dtype=torch.int32)) == (GRAIN, 1)
    assert probe(lib, torch.ones(0, dtype=torch.int32)) == (0, 0)


@compiled
def test_an_exception_in_a_loop_reaches_its_caller_and_leaves_the_pool_alive(lib: ctypes.CDLL) -> None:
    torch.set_num_threads(2)
    values = torch.ones(COUNT, dtype=torch.int32)
    values[-1] = -1
    assert probe(lib, values)[0] == -1
    assert probe(lib, values.abs())[0] == COUNT


@compiled
def test_several_python_threads_may_call_it_at_once(lib: ctypes.CDLL) -> None:
    torch.set_num_threads(2)
    values = torch.ones(COUNT, dtype=torch.int32)
    sums: list[int] = []
    callers = [threading.Thread(target=lambda: sums.append(probe(lib, values)[0])) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == [COUNT] * 4


@compiled
def test_each_instruction_set_of_this_machine_runs_its_own_code(lib: ctypes.CDLL) -> None:
    names = its.isas(lib)
    assert names[0] == "portable"
    for name in names:
        its.use_isa(lib, name)
        assert (its.isa(lib), lib.modq_probe_isa()) == (name, name.encode())
        assert probe(lib, torch.ones(COUNT, dtype=torch.int32))[0] == COUNT
    its.use_isa(lib, None)
    assert its.isa(lib) == names[-1]


@compiled
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from modq.kernels.library import isa, library; print(isa(library()))"
    assert run(code, MODQ_ISA="portable").stdout.split() == ["portable"]
    refused = run(code, MODQ_ISA="sse9")
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert "ModqError: MODQ_ISA is 'sse9': this machine runs portable" in last


@compiled
def test_an_instruction_set_that_is_not_there_changes_nothing(lib: ctypes.CDLL) -> None:
    its.use_isa(lib, "portable")
    with pytest.raises(
        ModqError, match=r"'none': this machine runs portable.*; take one of these, or unset it$"
    ):
        its.use_isa(lib, "none")
    assert its.isa(lib) == "portable"


@compiled
def test_a_torch_without_a_pool_to_lend_leaves_one_thread() -> None:
    code = """
import ctypes, modq.kernels.library as its
its._thread_pool = lambda: (None, None)
print(its.load_library(its.CORE).modq_probe_threads())
"""
    assert run(code).stdout.split() == ["1"]


def test_a_library_that_is_not_there_or_no_library_is_said_in_a_line(tmp_path: Path) -> None:
    absent, broken = tmp_path / "libnone.so", tmp_path / "libbroken.so"
    broken.write_text("no library")
    assert its.why_missing(absent) == f"libnone.so is not there: {its.NOT_COMPILED}"
    said = its.why_missing(broken)
    assert said is not None
    assert said.startswith("libbroken.so does not open: ")
    assert "\n" not in said


def test_without_it_modq_works_and_says_so_once() -> None:
    code = """
import logging; logging.basicConfig(format="%(message)s")
import modq.kernels.library as its
its.CORE = its.CORE.with_name("libnone.so")
print(its.library(), its.library())
"""
    done = run(code)
    assert done.stdout.split() == ["None", "None"]
    assert done.stderr.splitlines() == [
        f"modq multiplies by plain torch only: libnone.so is not there: {its.NOT_COMPILED}"
    ]


def test_the_headers_are_found_without_torch() -> None:
    code = "import sys, modq; print(modq.get_include(), 'torch' in sys.modules)"
    folder, torch_is_loaded = run(code).stdout.split()
    assert (folder, torch_is_loaded) == (modq.get_include(), "False")
    assert {"isa.h", "modq.cmake", "parallel.h"} <= {path.name for path in Path(folder, "modq").iterdir()}
