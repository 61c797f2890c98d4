"""Finds quantizer plugins through entry points and loads each alone: a broken one breaks only itself."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from modq.errors import BackendError, CheckpointError
from modq.spec import API_VERSION, PROJECT, REQUIRED_HOOKS, Quantizer, QuantizerInfo

GROUP = "modq.quantizers"
ALLOW_LIST = "MODQ_BACKENDS"

KNOWN_PACKAGES = {name: f"modq-{name}" for name in ("nf4", "optq", "quipsharp", "hqq")}
"""The backends that we publish. No other name is ever suggested for `pip install`: a guess would send users
to whoever registers it."""

RESERVED_OPTIONS = frozenset(
    {
        "backend",
        "calibration",
        "layers",
        "modules_to_not_convert",
        "quant_method",
        "resolved",
        "source",
        "takeover",
    }
)
"""What ModqConfig and the library functions call their own arguments: no plugin option may be named so."""


class Status(StrEnum):
    """Whether a declared backend can be used."""

    OK = "ok"
    DISABLED = "disabled"  # left out by MODQ_BACKENDS
    CONFLICT = "conflict"  # two distributions claim the name
    BROKEN = "broken"  # does not import, or breaks the contract
    INCOMPATIBLE = "incompatible"  # made for another plugin API
    UNAVAILABLE = "unavailable"  # sound, but not runnable on this machine


@dataclass(frozen=True, slots=True)
class Backend:
    """One declared backend: who declares it, whether it is usable and, if not, why."""

    name: str
    package: str
    version: str
    entry_point: str
    status: Status
    reason: str = ""
    info: QuantizerInfo | None = None

    @property
    def distribution(self) -> str:
        """The package and its version, as `modq-x 0.1.0`."""
        return f"{self.package} {self.version}"


def list_backends(*, check: bool = False) -> list[Backend]:
    """List every declared backend with its status.

    Without `check` only the plugins' entry modules are imported, never torch. With it each usable backend is
    loaded too, which finds what cannot be seen from outside: an implementation that does not import, a breach
    of the contract, a machine that it cannot run on.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, _package(point)))
    claims = Counter(point.name for point in points)
    backends = [_examine(point, claims, points) for point in points]
    return [_checked(backend) for backend in backends] if check else backends


@cache  # a listing reads the metadata of every installed package, and quantizing a model asks for each layer
def find(name: str) -> Backend:
    """Return the usable backend of this name, or raise a BackendError that says why there is none."""
    found = {backend.name: backend for backend in list_backends()}
    if name not in found:
        usable = ", ".join(sorted(n for n, b in found.items() if b.status is Status.OK)) or "none"
        hint = f"; it comes with `pip install {KNOWN_PACKAGES[name]}`" if name in KNOWN_PACKAGES else ""
        raise BackendError(f"no quantizer backend {name!r} is installed; usable: {usable}{hint}")
    backend = found[name]
    if backend.status is not Status.OK:
        raise _unusable(backend, backend.status, backend.reason)
    return backend


def describe_backend(name: str) -> QuantizerInfo:
    """Return what the usable backend of this name declares of itself."""
    info = find(name).info
    assert info is not None  # mypy only: Status.OK is given to no backend without one
    return info


def check_format_version(name: str, version: int) -> None:
    """Refuse a quantized weight that the backend of this name does not know how to read.

    Raises:
        CheckpointError: if so; it names the package that can.
    """
    known = describe_backend(name).format_versions
    if version not in known:
        expected = " or ".join(map(str, known))
        raise CheckpointError(
            f"weights of backend {name!r} are of format {version}, expected {expected}; "
            f"use the {find(name).package} that wrote them"
        )


@cache
def load(name: str) -> pluggy.HookRelay:
    """Load one backend and return its hooks, to be called by keyword.

    >>> load("nf4").quantize(weight=weight, options=options, calibration=None)  # doctest: +SKIP

    Raises:
        BackendError: if no usable backend has this name, or if it breaks the contract.
    """
    backend = find(name)
    with _naming(backend):
        manager, environment = _load_plugin(name, describe_backend(name))
    if environment:
        raise _unusable(backend, Status.UNAVAILABLE, environment)
    return manager.hook


@cache
def options_class(name: str) -> type[Any]:
    """Return the options dataclass of the usable backend of this name. Imports no torch."""
    with _naming(find(name)):
        return _load_options(describe_backend(name))


class _Breach(Exception):  # noqa: N818  # it never leaves this module
    """What is wrong with a plugin, in a few words; the outermost call adds whose it is."""


@contextmanager
def _naming(backend: Backend) -> Iterator[None]:
    try:
        yield
    except _Breach as breach:
        raise _unusable(backend, Status.BROKEN, str(breach)) from breach.__cause__


def _unusable(backend: Backend, status: Status, reason: str) -> BackendError:
    return BackendError(f"backend {backend.name!r} of {backend.distribution} is {status}: {reason}")


def _package(point: EntryPoint) -> str:
    return (point.dist and point.dist.name) or "?"  # half-removed packages have no name


def _examine(point: EntryPoint, claims: Counter[str], points: list[EntryPoint]) -> Backend:
    """Give one entry point its status; the allow-list is applied before anything of it is imported."""
    version = (point.dist and point.dist.version) or "?"
    seen = Backend(point.name, _package(point), version, point.value, Status.OK)
    allowed = os.environ.get(ALLOW_LIST)
    if allowed is not None and point.name not in allowed.replace(" ", "").split(","):
        return replace(seen, status=Status.DISABLED, reason=f"not in {ALLOW_LIST}={allowed}")
    if claims[point.name] > 1:
        rivals = ", ".join(_package(other) for other in points if other.name == point.name)
        return replace(seen, status=Status.CONFLICT, reason=f"declared by {rivals}; uninstall all but one")
    try:
        info = point.load()
    except (Exception, SystemExit) as error:
        return replace(seen, status=Status.BROKEN, reason=_one_line(error))
    return _judge(seen, info)


def _judge(seen: Backend, info: object) -> Backend:
    """Compare what an entry point gave with what it must be."""
    where = seen.entry_point
    if not isinstance(info, QuantizerInfo):
        reason = f"{where} is a {type(info).__name__}, expected a modq.QuantizerInfo"
        return replace(seen, status=Status.BROKEN, reason=reason)
    if info.name != seen.name:
        reason = f"{where} has name={info.name!r}, expected the entry point's name {seen.name!r}"
        return replace(seen, status=Status.BROKEN, reason=reason)
    if not (isinstance(info.api, tuple) and [type(part) for part in info.api] == [int, int]):
        reason = f"{where} has api={info.api!r}, expected (major, minor)"
        return replace(seen, status=Status.BROKEN, reason=reason)
    if info.api[0] != API_VERSION[0] or info.api[1] > API_VERSION[1]:
        needed, ours = (".".join(map(str, version)) for version in (info.api, API_VERSION))
        reason = f"needs plugin API {needed}, this modq has {ours}; update whichever is older"
        return replace(seen, status=Status.INCOMPATIBLE, reason=reason, info=info)
    return replace(seen, info=info)


def _checked(backend: Backend) -> Backend:
    if backend.status is not Status.OK or backend.info is None:
        return backend
    try:
        _load_options(backend.info)
        _, environment = _load_plugin(backend.name, backend.info)
    except _Breach as breach:
        return replace(backend, status=Status.BROKEN, reason=str(breach))
    return replace(backend, status=Status.UNAVAILABLE, reason=environment) if environment else backend


def _load_options(info: QuantizerInfo) -> type[Any]:
    cls = _import_object(info.options)
    if not (isinstance(cls, type) and is_dataclass(cls) and vars(cls)["__dataclass_params__"].frozen):
        raise _Breach(f"{info.options} is not a frozen dataclass")
    if taken := sorted({field.name for field in fields(cls)} & RESERVED_OPTIONS):
        raise _Breach(f"its options use names of modq itself: {', '.join(taken)}; rename them")
    return cls


def _load_plugin(name: str, info: QuantizerInfo) -> tuple[pluggy.PluginManager, str | None]:
    """Register the implementation with a manager of its own; return it and why it cannot run here, if so."""
    from modq.materialize import Fallback  # imports torch, as the implementation does

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Quantizer)
    with _no_custom_op_is_replaced(name):
        cls = _import_object(info.implementation)
    with _blaming(f"{info.implementation}() raises"):
        plugin = cls()
    with _blaming("it cannot be registered:"):
        manager.register(plugin, name=name)
    _check_hooks(plugin)
    with _blaming("check_environment() raises"):
        environment: str | None = manager.hook.check_environment()
    manager.register(Fallback(manager.hook), name="modq-fallback")
    return manager, environment


_owners: dict[str, str] = {}  # of custom ops: which backend's import registered them


@contextmanager
def _no_custom_op_is_replaced(backend: str) -> Iterator[None]:
    """Refuse a custom op whose name is taken: torch would replace the other one without a word."""
    import torch  # the implementation is about to

    register = torch.library.custom_op

    def guarded(name: str, *arguments: Any, **options: Any) -> Any:
        namespace, _, op = name.partition("::")
        taken = hasattr(getattr(torch.ops, namespace), op)
        if taken and _owners.get(name) != backend:  # its own is left of an import that failed
            owner = f"backend {_owners[name]!r}" if name in _owners else "another package"
            raise BackendError(f"custom op {name!r} of backend {backend!r} is taken by {owner}; rename one")
        _owners[name] = backend
        return register(name, *arguments, **options)

    torch.library.custom_op = guarded
    try:
        yield
    finally:
        torch.library.custom_op = register


def _import_object(path: str) -> Any:
    with _blaming(f"{path} does not import:"):
        module, _, attribute = path.partition(":")
        return getattr(import_module(module), attribute)


@contextmanager
def _blaming(deed: str) -> Iterator[None]:
    """Turn whatever a plugin's code raises into a breach."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _Breach(f"{deed} {_one_line(error)}") from error


def _check_hooks(plugin: object) -> None:
    """Refuse what pluggy lets through: unknown, missing, unmarked hooks; parameters that it never fills."""
    routines = inspect.getmembers_static(plugin, inspect.isroutine)  # static: it runs no property
    members = {name: getattr(plugin, name) for name, _ in routines}
    hooks = {name: method for name, method in members.items() if hasattr(method, f"{PROJECT}_impl")}
    specified = {name for name in vars(Quantizer) if not name.startswith("_")}
    if unknown := sorted(hooks.keys() - specified):
        raise _Breach(f"there is no hook {', '.join(unknown)}; the hooks are {', '.join(sorted(specified))}")
    if unmarked := sorted((members.keys() & specified) - hooks.keys()):
        raise _Breach(f"{', '.join(unmarked)} lacks the @modq.hookimpl mark")
    if missing := [name for name in REQUIRED_HOOKS if name not in hooks]:
        raise _Breach(f"it lacks the required hook(s) {', '.join(missing)}")
    for name, method in hooks.items():
        for parameter in inspect.signature(method).parameters.values():
            plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if not plain or parameter.default is not parameter.empty:
                raise _Breach(f"{name}() takes {parameter}; hooks take plain names, no defaults or stars")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
