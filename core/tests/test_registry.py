"""`modq.registry`: discovery, statuses, the contract; plugins are fake `*.dist-info` folders."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from modq import registry
from modq.errors import BackendError
from modq.registry import Backend, Status, find, list_backends, load, options_class
from modq.spec import QuantizedWeight

INFO = """
from modq import QuantizerInfo
{extra}
INFO = QuantizerInfo(
    name={name!r}, summary="A fake.", implementation={implementation!r}, options={options!r},
    bits=(8,), max_relative_error={{8: 0.01}}, api={api},
)
"""
OPTIONS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Options:
    group_size: int = 64
"""
DESCRIBE = """
    @hookimpl
    def describe(self, shape, options): return {"codes": TensorSpec(shape, torch.int8)}
"""
QUANTIZE = """
    @hookimpl
    def quantize(self, weight, options, calibration):
        codes = {"codes": weight.round().to(torch.int8)}
        return QuantizedWeight("good", 1, tuple(weight.shape), codes)
"""
DEQUANTIZE = """
    @hookimpl
    def dequantize(self, qweight, dtype, rows, columns):
        return qweight.tensors["codes"][rows, columns].to(dtype)
"""
HOOKS = DESCRIBE + QUANTIZE + DEQUANTIZE
QUANTIZER = """
import torch
from modq import QuantizedWeight, TensorSpec, hookimpl
class Plugin:
"""

Declare = Callable[..., str]
"""declare(backend, …) installs a fake distribution that declares this backend; it returns its module."""


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Declare]:
    monkeypatch.delenv("MODQ_BACKENDS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def declare(
        backend: str,
        *,
        package: str | None = None,
        info: str | None = None,  # the whole entry module
        extra: str = "",  # code before INFO
        name: str | None = None,
        api: str = "(1, 0)",
        implementation: str = "{module}.quantizer:Plugin",
        options: str = "{module}.options:Options",
        hooks: str = HOOKS,
        options_code: str = OPTIONS,
    ) -> str:
        package = package or f"fake-{backend}"
        module = package.replace("-", "_")
        paths = {
            "implementation": implementation.format(module=module),
            "options": options.format(module=module),
        }
        entry = info if info is not None else INFO.format(name=name or backend, extra=extra, api=api, **paths)
        code = {"__init__": entry, "quantizer": QUANTIZER + hooks, "options": options_code}
        (tmp_path / module).mkdir()
        for file, text in code.items():
            (tmp_path / module / f"{file}.py").write_text(text, encoding="utf-8")
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8"
        )
        entry_point = f"[modq.quantizers]\n{backend} = {module}:INFO\n"
        (metadata / "entry_points.txt").write_text(entry_point, encoding="utf-8")
        importlib.invalidate_caches()
        return module

    yield declare
    for cached in (find, load, options_class):
        cached.cache_clear()
    for module in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[module]


def listed(name: str, *, check: bool = False) -> Backend:
    (backend,) = [backend for backend in list_backends(check=check) if backend.name == name]
    return backend


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_works(name: str) -> None:
    """Quantize and multiply with this backend."""
    options = options_class(name)()
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    hooks = load(name)
    qweight = hooks.quantize(weight=weight, options=options, calibration=None)
    described = hooks.describe(shape=(64, 128), options=options)
    assert {key: tuple(tensor.shape) for key, tensor in qweight.tensors.items()} == {
        key: tuple(spec.shape) for key, spec in described.items()
    }
    y = hooks.matmul(x=torch.ones(3, 128), qweight=qweight, transpose=False)
    assert y.shape == (3, 64)


def test_a_sound_plugin_is_ok_and_works(declare: Declare) -> None:
    declare("good")
    backend = listed("good", check=True)
    assert (backend.status, backend.reason) == (Status.OK, "")
    assert (backend.package, backend.version, backend.entry_point) == ("fake-good", "1.0", "fake_good:INFO")
    assert backend.distribution == "fake-good 1.0"
    assert backend.info is not None
    assert backend.info.summary == "A fake."
    assert_works("good")


def test_five_kinds_of_broken_plugin_are_listed_while_nf4_keeps_working(declare: Declare) -> None:
    declare("raises", info="raise ImportError('no\\nsuch library')")
    declare("exits", info="import sys; sys.exit(3)")
    declare("wrong", info="INFO = {'name': 'wrong'}")
    declare("future", api="(2, 0)")
    declare("clash", package="fake-clash-one")
    declare("clash", package="fake-clash-two")
    expected = {
        "raises": (Status.BROKEN, "ImportError: no such library"),
        "exits": (Status.BROKEN, "SystemExit: 3"),
        "wrong": (Status.BROKEN, "fake_wrong:INFO is a dict, expected a modq.QuantizerInfo"),
        "future": (Status.INCOMPATIBLE, "needs plugin API 2.0, this modq has 1.1; update whichever is older"),
        "clash": (Status.CONFLICT, "declared by fake-clash-one, fake-clash-two; uninstall all but one"),
        "nf4": (Status.OK, ""),
    }
    for check in (False, True):
        found = {backend.name: (backend.status, backend.reason) for backend in list_backends(check=check)}
        assert {name: found[name] for name in expected} == expected
    for name in expected.keys() - {"nf4"}:
        with pytest.raises(BackendError, match=rf"^backend '{name}' of fake-.* is {expected[name][0]}: ."):
            load(name)
    assert_works("nf4")


def test_both_claimants_of_a_name_are_listed(declare: Declare) -> None:
    declare("clash", package="fake-clash-one")
    declare("clash", package="fake-clash-two")
    claimants = [backend.package for backend in list_backends() if backend.status is Status.CONFLICT]
    assert claimants == ["fake-clash-one", "fake-clash-two"]
    assert "fake_clash_one" not in sys.modules


def test_half_removed_metadata_breaks_nothing(declare: Declare, tmp_path: Path) -> None:
    declare("good")
    declare("clash", package="fake-clash-one")
    declare("clash", package="fake-clash-two")
    for metadata in tmp_path.glob("*clash*.dist-info/METADATA"):
        metadata.unlink()
    assert listed("good").status is Status.OK
    packages = {(backend.package, backend.version) for backend in list_backends() if backend.name == "clash"}
    assert packages == {("?", "?")}


def test_the_allow_list_is_applied_before_any_import(
    declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "imported"
    declare("good")
    declare("unwanted", extra=f"open({str(trace)!r}, 'w').close()")
    monkeypatch.setenv("MODQ_BACKENDS", "nf4, good")
    assert listed("good").status is Status.OK
    backend = listed("unwanted", check=True)
    assert (backend.status, backend.reason) == (Status.DISABLED, "not in MODQ_BACKENDS=nf4, good")
    with pytest.raises(
        BackendError, match=r"'unwanted' of fake-unwanted 1.0 is disabled: not in MODQ_BACKENDS"
    ):
        load("unwanted")
    assert not trace.exists()
    monkeypatch.setenv("MODQ_BACKENDS", "unwanted")
    assert listed("unwanted").status is Status.OK
    assert trace.exists()


def test_an_empty_allow_list_disables_all(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    declare("good")
    monkeypatch.setenv("MODQ_BACKENDS", "")
    assert {backend.status for backend in list_backends()} == {Status.DISABLED}


def test_info_must_carry_the_name_of_its_entry_point(declare: Declare) -> None:
    declare("good", name="better")
    backend = listed("good")
    assert backend.status is Status.BROKEN
    assert backend.reason == "fake_good:INFO has name='better', expected the entry point's name 'good'"


@pytest.mark.parametrize(
    ("plugin", "ours", "status"),
    [
        ((1, 0), (1, 0), Status.OK),
        ((1, 0), (1, 2), Status.OK),  # we have learned since
        ((1, 2), (1, 2), Status.OK),
        ((1, 3), (1, 2), Status.INCOMPATIBLE),  # it uses what we do not have
        ((1, 0), (2, 0), Status.INCOMPATIBLE),
        ((3, 0), (2, 5), Status.INCOMPATIBLE),
    ],
)
def test_an_api_is_usable_if_the_majors_match_and_its_minor_is_not_above_ours(
    declare: Declare,
    monkeypatch: pytest.MonkeyPatch,
    plugin: tuple[int, int],
    ours: tuple[int, int],
    status: Status,
) -> None:
    monkeypatch.setattr(registry, "API_VERSION", ours)
    declare("good", api=str(plugin))
    backend = listed("good")
    assert backend.status is status
    if status is Status.INCOMPATIBLE:
        assert "needs plugin API {}.{}, this modq has {}.{}".format(*plugin, *ours) in backend.reason


@pytest.mark.parametrize("api", ["'2'", "(1,)", "None", "(1, 'x')", "1.0"])
def test_an_api_that_is_no_pair_of_numbers_breaks_only_its_plugin(declare: Declare, api: str) -> None:
    declare("good", api=api)
    backend = listed("good")
    assert backend.status is Status.BROKEN
    assert backend.reason == f"fake_good:INFO has api={api}, expected (major, minor)"


def test_a_missing_backend_of_ours_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KNOWN_PACKAGES", {"absent": "modq-absent"})
    with pytest.raises(
        BackendError, match=r"'absent' is installed; .*it comes with `pip install modq-absent`$"
    ):
        load("absent")


def test_pip_is_suggested_for_no_other_name(declare: Declare) -> None:
    declare("good")
    declare("broken", info="1 / 0")
    with pytest.raises(
        BackendError, match=r"^no quantizer backend 'goof' is installed; usable: good(, [\w-]+)*$"
    ):
        load("goof")


def test_without_any_backend_the_error_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODQ_BACKENDS", "")
    with pytest.raises(BackendError, match=r"^no quantizer backend 'goof' is installed; usable: none$"):
        find("goof")


BREACHES = {
    "a hook that no spec has": (
        HOOKS + "    @hookimpl\n    def dequantise(self, qweight): ...",
        "there is no hook dequantise; the hooks are check_environment, dequantize, describe, ",
    ),
    "a required hook missing": (DESCRIBE + QUANTIZE, "lacks the required hook(s) dequantize"),
    "all required hooks missing": ("    pass", "lacks the required hook(s) describe, quantize, dequantize"),
    "a hook without the mark": (
        HOOKS + "    def matmul(self, x): ...",
        "matmul lacks the @modq.hookimpl mark",
    ),
    "an argument with a default": (
        HOOKS + "    @hookimpl\n    def matmul(self, x, qweight, transpose=False): ...",
        "matmul() takes transpose=False",
    ),
    "keyword arguments": (HOOKS + "    @hookimpl\n    def prepare(self, **kw): ...", "prepare() takes **kw"),
    "star arguments": (HOOKS + "    @hookimpl\n    def prepare(self, *args): ...", "prepare() takes *args"),
    "a keyword-only argument": (
        HOOKS + "    @hookimpl\n    def prepare(self, *, qweight): ...",
        "prepare() takes qweight",
    ),
    "an argument that the spec lacks": (
        HOOKS + "    @hookimpl\n    def matmul(self, y): ...",
        "Argument(s) {'y'} are declared",
    ),
    "a constructor that raises": (
        HOOKS + "    def __init__(self): raise OSError('x')",
        "Plugin() raises OSError: x",
    ),
    "a constructor that exits": (
        HOOKS + "    def __init__(self): raise SystemExit(3)",
        "Plugin() raises SystemExit: 3",
    ),
    "a constructor with arguments": (HOOKS + "    def __init__(self, a): ...", "Plugin() raises TypeError: "),
    "a check that raises": (
        HOOKS + "    @hookimpl\n    def check_environment(self): raise OSError('x')",
        "check_environment() raises OSError: x",
    ),
    "a module that raises": (
        "    raise OSError('x')",
        "fake_bad.quantizer:Plugin does not import: OSError: x",
    ),
    "a module that exits": ("    raise SystemExit(3)", "does not import: SystemExit: 3"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_contract_is_named_and_breaks_only_its_plugin(declare: Declare, breach: str) -> None:
    hooks, reason = BREACHES[breach]
    declare("good")
    declare("bad", hooks=hooks)
    assert listed("bad").status is Status.OK  # it cannot be seen from outside
    backend = listed("bad", check=True)
    assert backend.status is Status.BROKEN
    assert reason in backend.reason
    assert "\n" not in backend.reason
    with pytest.raises(BackendError, match=r"^backend 'bad' of fake-bad 1.0 is broken: ") as caught:
        load("bad")
    assert str(caught.value).endswith(backend.reason)
    assert listed("good", check=True).status is Status.OK


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"implementation": "{module}.nowhere:Plugin"}, "does not import: ModuleNotFoundError"),
        ({"implementation": "{module}.quantizer:Plugins"}, "does not import: AttributeError"),
        ({"implementation": "{module}.quantizer"}, "does not import: AttributeError"),
        ({"options": "{module}.options:Choices"}, "does not import: AttributeError"),
        ({"options_code": "class Options: ..."}, "fake_bad.options:Options is not a frozen dataclass"),
        ({"options_code": "Options = dict(a=1)"}, "fake_bad.options:Options is not a frozen dataclass"),
        ({"options_code": OPTIONS.replace("(frozen=True)", "")}, "is not a frozen dataclass"),
        (
            {"options_code": OPTIONS.replace("group_size", "layers")},
            "use names of modq itself: layers; rename them",
        ),
        ({"options_code": "raise SystemExit(3)"}, "does not import: SystemExit: 3"),
    ],
)
def test_what_info_points_to_must_be_there(declare: Declare, where: dict[str, str], reason: str) -> None:
    declare("bad", **where)
    backend = listed("bad", check=True)
    assert backend.status is Status.BROKEN
    assert reason in backend.reason
    with pytest.raises(BackendError, match=r"^backend 'bad' of fake-bad 1.0 is broken: "):
        options_class("bad") if "implementation" not in where else load("bad")


def test_a_backend_that_cannot_run_here_is_unavailable(declare: Declare) -> None:
    check = "    @hookimpl\n    def check_environment(self): return 'needs a quantum computer'"
    declare("good", hooks=HOOKS + check)
    assert listed("good").status is Status.OK
    backend = listed("good", check=True)
    assert (backend.status, backend.reason) == (Status.UNAVAILABLE, "needs a quantum computer")
    with pytest.raises(BackendError, match=r"is unavailable: needs a quantum computer$"):
        load("good")


def test_a_plugin_may_take_fewer_arguments_than_the_spec(declare: Declare) -> None:
    fewer = (
        DESCRIBE.replace("shape, options", "shape")
        + QUANTIZE.replace(", options, calibration", "")
        + DEQUANTIZE
    )
    declare("good", hooks=fewer)
    assert_works("good")


def test_a_plugin_that_declines_falls_back_to_the_core(declare: Declare) -> None:
    declare("good", hooks=HOOKS + "    @hookimpl\n    def matmul(self): return None")
    qweight = QuantizedWeight("good", 1, (2, 3), {"codes": torch.arange(6, dtype=torch.int8).reshape(2, 3)})
    y = load("good").matmul(x=torch.eye(3), qweight=qweight, transpose=False)
    assert torch.equal(y, torch.arange(6.0).reshape(2, 3).T)


def test_no_property_of_a_plugin_is_run(declare: Declare) -> None:
    declare("good", hooks=HOOKS + "    @property\n    def size(self): raise OSError('x')")
    assert listed("good", check=True).status is Status.OK


def test_a_backend_is_loaded_once(declare: Declare) -> None:
    declare("good")
    assert load("good") is load("good")
    assert options_class("good") is options_class("good")


def test_each_backend_has_hooks_of_its_own(declare: Declare) -> None:
    declare("good")
    declare("other", hooks=HOOKS.replace("int8", "int16"))
    specs = {name: load(name).describe(shape=(2, 2), options=None)["codes"] for name in ("good", "other")}
    assert [spec.dtype for spec in specs.values()] == [torch.int8, torch.int16]


def test_listing_imports_no_torch_and_neither_do_options() -> None:
    run("""
import sys
from modq.registry import Status, list_backends, options_class
backends = list_backends()
assert backends
for backend in backends:
    if backend.package.startswith("modq-"):
        assert backend.status is Status.OK, backend
        options_class(backend.name)
assert "torch" not in sys.modules
assert "numpy" not in sys.modules
""")


OP = """
@torch.library.custom_op("fake_modq::{op}", mutates_args=())
def _op(x: torch.Tensor) -> torch.Tensor:
    return x + {value}
"""


def test_a_custom_op_that_is_taken_is_refused_both_are_named_and_the_first_keeps_working(
    declare: Declare,
) -> None:
    declare("first", hooks=HOOKS + OP.format(op="shared", value=1))
    declare("second", hooks=HOOKS + OP.format(op="shared", value=2))
    declare("third", hooks=HOOKS + OP.format(op="its_own", value=3))
    load("first")
    with pytest.raises(BackendError, match=r"'second'.*'fake_modq::shared'.*taken by backend 'first'"):
        load("second")
    assert listed("second", check=True).status is Status.BROKEN
    assert float(torch.ops.fake_modq.shared(torch.zeros(()))) == 1
    assert_works("first")
    load("third")


def test_an_import_that_failed_after_its_custom_op_fails_for_its_own_reason_again(declare: Declare) -> None:
    declare("half", hooks=HOOKS + OP.format(op="half", value=1) + "raise RuntimeError('half-way')")
    for _ in range(2):
        with pytest.raises(BackendError, match="RuntimeError: half-way"):
            load("half")
