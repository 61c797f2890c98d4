"""`modq doctor` and `modq list-backends --check`: what is here, what serves what, what to do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run, succeed

import modq
from modq import doctor, layouts
from modq.doctor import SWITCHES, Package, diagnose
from modq.kernels.library import isa, library
from modq.registry import Backend, Status
from modq.spec import Format, Provider, QuantizerInfo

CORE = Path(modq.__file__).parent


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """`install(package, entry, code)` puts a package of one module on the path, as installing it would."""

    def put(package: str, entry: str, code: str) -> None:
        module = package.replace("-", "_")
        info = tmp_path / package / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[modq.quantizers]\n{entry}\n")
        (tmp_path / package / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / package)

    return put


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


def backend(name: str, **more: Any) -> Backend:
    info = QuantizerInfo(
        name=name,
        summary="for tests",
        implementation=f"{name}:X",
        options=f"{name}:Options",
        bits=(4,),
        max_relative_error={4: 1.0},
        **more,
    )
    return Backend(name, f"modq-{name}", "1.0", f"{name}:INFO", Status.OK, info=info)


def test_json_is_one_document_that_says_what_is_here() -> None:
    document = json.loads(succeed("doctor", "--json").stdout)
    assert (document["schema"], document["modq"], document["api"]) == (1, modq.__version__, "1.1")
    packages = {package["name"]: package for package in document["packages"]}
    assert packages["torch"]["version"] == torch.__version__
    assert packages["torch"]["fits"]
    assert packages["pytest"]["by"] == ["modq[testing]"]
    assert document["devices"][0]["device"] == "cpu"
    assert torch.backends.cpu.get_cpu_capability() in document["devices"][0]["detail"]
    assert {each["name"] for each in document["switches"]} == set(SWITCHES)


def test_every_layout_has_the_kernel_that_serves_it_on_each_device() -> None:
    found = diagnose()
    opened = library()
    kernel = doctor.REFERENCE if opened is None else f"cpu-{isa(opened)}"
    assert {(its.layout, its.kernel) for its in found.kernels if its.device == "cpu"} == {
        (name, kernel) for name in layouts.__all__ if hasattr(getattr(layouts, name), "matmul")
    }
    states = {state.name: state for state in found.backends}
    assert states["nf4"].layouts == ("Codebook",)
    assert states["hqq"].layouts == ("Affine",)
    assert states["hqq"].products == "its layout"


def test_the_page_shows_all_of_it() -> None:
    found, page = diagnose(), succeed("doctor").stdout
    shown = [each.name for each in (*found.packages, *found.backends, *found.switches)]
    shown += [each.device for each in found.devices] + [each.layout for each in found.kernels]
    assert [name for name in shown if name not in page] == []
    assert page.splitlines()[-1] == "Nothing is wrong."


def test_the_switches_are_those_that_modq_reads() -> None:
    sources = [path for path in CORE.rglob("*.py") if path.name != "doctor.py"]
    read = {name for path in sources for name in re.findall(r'"(MODQ_[A-Z_]+)"', path.read_text("utf-8"))}
    assert {name for name in SWITCHES if name.startswith("MODQ_")} == read


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MODQ_BACKENDS", "hqq,nf5", "MODQ_BACKENDS has 'nf5': no such backend; there is hqq, "),
        ("MODQ_TAKEOVER", "all,tensors", "MODQ_TAKEOVER has 'tensors': no such format; there is all, "),
        (
            "MODQ_ADAPTER_CHECK",
            "maybe",
            "MODQ_ADAPTER_CHECK has 'maybe': no such setting; there is error, off",
        ),
        (
            "MODQ_BACKEND",
            "hqq",
            "MODQ_BACKEND is set, and modq does not know it; did you mean MODQ_BACKENDS?",
        ),
        ("MODQ_AUTOLOAD", "0", "MODQ_AUTOLOAD=0: scripts must import modq.hf"),
        (
            "TORCH_DEVICE_BACKEND_AUTOLOAD",
            "0",
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0: scripts must import modq.hf",
        ),
    ],
)
def test_a_switch_that_does_no_good_is_pointed_out(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    (todo,) = diagnose().todo
    assert todo.startswith(said)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MODQ_BACKENDS", "hqq, nf4"), ("MODQ_TAKEOVER", "all"), ("MODQ_ADAPTER_CHECK", "warn")],
)
def test_a_switch_that_is_well_set_is_shown_and_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    found = diagnose()
    assert found.todo == []
    assert {its.name: its.value for its in found.switches}[name] == value


def test_backends_that_cannot_be_used_are_named_with_the_reason(
    install: Callable[[str, str, str], None],
) -> None:
    install("modq-one", "same = modq_one:INFO", "")
    install("modq-two", "same = modq_two:INFO", "")
    install("modq-odd", "odd = modq_odd:INFO", "print('hello')\nraise RuntimeError('no such luck')")
    todo = json.loads(succeed("doctor", "--json").stdout)["todo"]
    assert "backend 'odd' of modq-odd 1.0 is broken: RuntimeError: no such luck" in todo
    conflicts = [line for line in todo if "is conflict: declared by modq-one, modq-two" in line]
    assert len(conflicts) == 2


def test_two_readers_of_one_format_are_named() -> None:
    same = Format(name="shared", when={"quant_method": "x"}, tensors=("codes",), marker="codes", native=())
    both = [backend("one", formats=(same,)), backend("two", formats=(same,))]
    (line,) = doctor._about_backends(both)
    assert "shared of one and shared of two" in line
    assert list(doctor._about_backends(both[:1])) == []


def test_a_provider_is_looked_for_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fast_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    declared = [
        Provider(
            name=name,
            module=module,
            layout="Affine",
            bits=(4,),
            dtypes=("float16",),
            directions=("forward",),
            devices=("cuda",),
        )
        for name, module in (("fast", "fast_kernels.gemm"), ("lost", "no_such_package.gemm"))
    ]
    fast, lost = doctor._providers([backend("x", providers=tuple(declared))])
    assert (fast.found, fast.used, fast.why) == (True, False, "this modq calls no outside kernel yet")
    assert (lost.found, lost.used, lost.why) == (False, False, "its package is not installed")
    assert "fast_kernels" not in sys.modules


def test_a_package_that_does_not_fit_is_named_with_who_needs_it() -> None:
    old = Package("torch", "2.5.0", ">=2.7", ("modq", "modq-x"), fits=False)
    missing = Package("peft", None, ">=0.18", ("modq",), fits=False)
    optional = Package("trl", None, ">=1.0", ("modq[train]",), fits=True)
    assert list(doctor._about_packages([old, missing, optional])) == [
        "torch 2.5.0 is installed, modq needs >=2.7; install that",
        "peft is not installed, modq needs >=0.18; install that",
    ]


@pytest.mark.parametrize(
    ("version", "fits"), [("0.17.1", False), ("0.18.0", True), ("0.19.0.dev0", True), (None, False)]
)
def test_versions_are_compared_with_what_modq_asks_for(
    version: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    packages = {package.name: package for package in doctor._packages([])}
    assert packages["peft"].fits is fits
    assert packages["trl"].fits is (version is None)  # for an extra: it may be missing, but not too old


def test_it_works_where_torch_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_why_torch_fails", lambda: "OSError: libtorch.so is damaged")
    found = diagnose()
    assert found.todo == ["torch does not import: OSError: libtorch.so is damaged; install it anew"]
    assert (found.devices, found.kernels) == ([], [])
    assert {state.name for state in found.backends} >= {"nf4", "hqq"}
    assert found.todo[0] in succeed("doctor").stdout


def test_accelerators_are_listed_with_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        get_device_name=lambda index: "Fast 100",
        get_device_properties=lambda index: SimpleNamespace(major=9, minor=0, total_memory=80e9),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    found = list(doctor._devices())
    assert [its.device for its in found] == ["cpu", "cuda:0", "cuda:1"]
    assert (found[1].name, found[1].detail) == ("Fast 100", "compute capability 9.0, 80.0 GB")
    assert {(its.layout, its.device) for its in doctor._kernels(found)} >= {("Affine", "cuda")}


def test_check_loads_each_backend_and_only_strict_fails(install: Callable[[str, str, str], None]) -> None:
    code = """
from dataclasses import dataclass
from modq import QuantizerInfo
INFO = QuantizerInfo(
    name="hollow", summary="s", implementation="no_such_module:X", options="modq_hollow:Options",
    bits=(4,), max_relative_error={4: 1.0},
)
@dataclass(frozen=True)
class Options: pass
"""
    install("modq-hollow", "hollow = modq_hollow:INFO", code)

    def status(*flags: str) -> tuple[str, int]:
        result = run("list-backends", "--json", *flags)
        listed = {each["name"]: each["status"] for each in json.loads(result.stdout)["backends"]}
        return listed["hollow"], result.exit_code

    assert status() == ("ok", 0)
    assert status("--check") == ("broken", 0)
    assert status("--strict") == ("broken", 1)
