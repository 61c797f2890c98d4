"""What `modq doctor` finds: versions, devices, kernels, backends, switches, and what to do about them.

Everything here is looked up, nothing is guessed: a kernel is named only where there is one, and whether an
outside package is there is asked of the import system, which does not import it for that.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from packaging.requirements import Requirement  # transformers depends on it

import modq
from modq.registry import ALLOW_LIST, KNOWN_PACKAGES, Backend, Status, list_backends, load
from modq.spec import API_VERSION, Provider

SCHEMA = 1
"""The version of the JSON document."""

SWITCHES = {
    ALLOW_LIST: "the only backends that may be used, with commas between",
    "MODQ_TAKEOVER": "formats of other packages, or `all`, to load through modq though that package is there",
    "MODQ_ADAPTER_CHECK": "what to do about an adapter of another base: error (the default), warn or off",
    "MODQ_AUTOLOAD": "0: importing torch does not make modq known to transformers and peft",
    "MODQ_ISA": "the instruction set of the compiled kernels, by default the best that runs here",
    "MODQ_KERNELS": "reference: no compiled kernel is used, only plain torch",
    "MODQ_FUSED_ROWS": "up to how many rows of x a kernel's own product is used; by default measured once",
    "MODQ_FUSED_LORA": "0: LoRA over quantized layers runs as PEFT has it, not as one autograd node",
    "MODQ_CACHE": "where `modq finetune --demo` keeps its model",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "torch's own; 0: as MODQ_AUTOLOAD=0, for all packages",
}
"""The environment variables that change what modq does."""

REFERENCE = "reference (plain torch, by blocks)"
NO_OTHER = "modq has no other kernel for it"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that modq or a backend needs, always or for an extra: `modq[train]`."""

    name: str
    version: str | None
    wanted: str
    by: tuple[str, ...]
    fits: bool


@dataclass(frozen=True, slots=True)
class Device:
    """Something that torch computes on."""

    device: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """What multiplies by weights of a layout on a device, and why nothing faster does."""

    layout: str
    device: str
    kernel: str
    faster: str


@dataclass(frozen=True, slots=True)
class ProviderState:
    """An outside kernel that a backend declares, whether its package is there, and whether it is used."""

    backend: str
    name: str
    module: str
    layout: str
    found: bool
    used: bool
    why: str


@dataclass(frozen=True, slots=True)
class BackendState:
    """A declared backend: which layouts of the core its modules have imported, and who does its products."""

    name: str
    status: str
    reason: str | None
    package: str
    version: str
    layouts: tuple[str, ...]
    products: str | None


@dataclass(frozen=True, slots=True)
class Switch:
    """An environment variable, and its value if it is set."""

    name: str
    value: str | None
    meaning: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found; `todo` says what to do, one thing a line."""

    modq: str
    api: str
    python: str
    platform: str
    packages: list[Package] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    crossings: dict[str, int] = field(default_factory=dict)
    backends: list[BackendState] = field(default_factory=list)
    providers: list[ProviderState] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at everything. It imports torch and the backends, but works where these do not import."""
    torch_fails = _why_torch_fails()
    backends = list_backends(check=torch_fails is None)
    packages = _packages(backends)
    found = Diagnosis(
        modq.__version__, ".".join(map(str, API_VERSION)), platform.python_version(), platform.platform()
    )
    found.packages.extend(packages)
    found.switches.extend(Switch(name, os.environ.get(name), meaning) for name, meaning in SWITCHES.items())
    if torch_fails is None:
        found.devices.extend(_devices())
        found.kernels.extend(_kernels(found.devices))
        found.crossings.update(_crossings())
    found.backends.extend(_state(backend, loadable=torch_fails is None) for backend in backends)
    found.providers.extend(_providers(backends))
    if torch_fails is not None:
        found.todo.append(f"torch does not import: {torch_fails}; install it anew")
    found.todo.extend([*_about_packages(packages), *_about_backends(backends), *_about_switches(backends)])
    return found


def _why_torch_fails() -> str | None:
    try:
        import_module("torch")
    except Exception as error:  # a broken build raises anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


# Packages


def _packages(backends: list[Backend]) -> list[Package]:
    """Return what modq and the backends' packages need, and which of them need it."""
    wanted = defaultdict(list)
    for package in dict.fromkeys(["modq", *(backend.package for backend in backends)]):
        for requirement, extra in _requirements(package):
            by = f"{package}[{extra}]" if extra else package
            wanted[requirement.name, requirement.specifier].append(by)
    found = []
    for (name, specifier), users in wanted.items():
        version = _version(name)
        if version is None:
            fits = all("[" in each for each in users)  # for extras only
        else:
            fits = specifier.contains(version, prereleases=True)
        found.append(Package(name, version, str(specifier), tuple(users), fits))
    return found


def _requirements(package: str) -> Iterator[tuple[Requirement, str]]:
    """Yield what a package needs on this machine, each with the first extra that asks for it, or none."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:  # on the path, but not installed
        return
    extras = ["", *(found.get_all("Provides-Extra") or [])]
    for text in found.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        extra = next((e for e in extras if marker is None or marker.evaluate({"extra": e})), None)
        if extra is not None:
            yield requirement, extra


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Devices and kernels


def _devices() -> Iterator[Device]:
    import torch  # late: this module is of use where torch does not import

    threads = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield Device("cpu", platform.processor() or platform.machine(), threads)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"built for {built}, finds no device" if built else "built for the CPU only"
        yield Device("none", "no accelerator", f"torch {torch.__version__} is {why}")
        return
    for index in range(torch.accelerator.device_count()):
        yield _accelerator(accelerator.type, index)


def _accelerator(kind: str, index: int) -> Device:
    import torch  # late, as above

    module = torch.get_device_module(kind)
    name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
    detail = ""
    if kind == "cuda":
        its = module.get_device_properties(index)
        detail = f"compute capability {its.major}.{its.minor}, {its.total_memory / 1e9:.1f} GB"
    return Device(f"{kind}:{index}", name, detail)


def _kernels(devices: list[Device]) -> Iterator[Kernel]:
    """Yield the kernels of each layout of the core on each kind of device, best first."""
    from modq.kernels.dispatch import named_kernels  # late, as above

    kinds = dict.fromkeys(device.device.partition(":")[0] for device in devices if device.device != "none")
    for name, layout in _layouts().items():
        for kind in kinds:
            kernels = named_kernels(layout, kind)
            missing = next((reason for kernel in kernels if (reason := kernel.why_missing())), None)
            able = [kernel.provider for kernel in kernels if kernel.why_missing() is None]
            yield Kernel(name, kind, [*able, REFERENCE][0], missing or (NO_OTHER if not able else ""))


def _crossings() -> dict[str, int]:
    """Return up to how many rows fused products are used, where that was measured on this machine."""
    from modq.kernels.crossing import measured  # late, as above

    return measured()


def _layouts() -> dict[str, object]:
    """Return the core's layouts by name."""
    module = import_module("modq.layouts")  # imports torch
    named = {name: getattr(module, name) for name in module.__all__}
    return {name: layout for name, layout in named.items() if hasattr(layout, "matmul")}


# Backends


def _state(backend: Backend, *, loadable: bool) -> BackendState:
    usable = loadable and backend.status is Status.OK
    return BackendState(
        name=backend.name,
        status=str(backend.status),
        reason=backend.reason or None,
        package=backend.package,
        version=backend.version,
        layouts=_layouts_of(backend) if usable else (),
        products=_products(backend.name) if usable else None,
    )


def _products(name: str) -> str:
    """Say who multiplies: the plugin's own hook, its layout, or the core in its place."""
    hooks = load(name)
    if any(not hook.trylast for hook in hooks.matmul.get_hookimpls()):
        return "its matmul hook"
    return "its layout" if hooks.layout.get_hookimpls() else "the core, from its dequantize hook by blocks"


def _layouts_of(backend: Backend) -> tuple[str, ...]:
    """Name the core's layouts that the backend's modules have imported."""
    load(backend.name)
    package = backend.info.implementation.partition(":")[0].partition(".")[0] if backend.info else ""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == package]
    imported = {id(value) for module in modules for value in getattr(module, "__dict__", {}).values()}
    return tuple(name for name, layout in _layouts().items() if id(layout) in imported)


def _providers(backends: list[Backend]) -> Iterator[ProviderState]:
    for backend in backends:
        for provider in backend.info.providers if backend.info else ():
            found = _is_installed(provider)
            why = "this modq calls no outside kernel yet" if found else "its package is not installed"
            yield ProviderState(
                backend.name, provider.name, provider.module, provider.layout, found, used=False, why=why
            )


def _is_installed(provider: Provider) -> bool:
    """Whether the package is there. Only its top level is looked for: to look deeper would import it."""
    package = provider.module.partition(".")[0]
    try:
        return package in sys.modules or (bool(package) and find_spec(package) is not None)
    except ValueError:  # a module without a spec
        return False


# What to do


def _about_packages(packages: list[Package]) -> Iterator[str]:
    for package in packages:
        if not package.fits:
            there = f"{package.version} is installed" if package.version else "is not installed"
            yield f"{package.name} {there}, {package.by[0]} needs {package.wanted or 'it'}; install that"


def _about_backends(backends: list[Backend]) -> Iterator[str]:
    for backend in backends:
        if backend.status not in (Status.OK, Status.DISABLED):
            yield f"backend {backend.name!r} of {backend.distribution} is {backend.status}: {backend.reason}"
    usable = [backend for backend in backends if backend.status is Status.OK]
    if not usable:
        yield f"no backend is usable; ours are {', '.join(sorted(KNOWN_PACKAGES.values()))}"
    claims = defaultdict(list)
    for backend in usable:
        for known in backend.info.formats if backend.info else ():
            when = repr(sorted(known.when.items()))
            claims[known.config_key, when].append(f"{known.name} of {backend.name}")
    for rivals in claims.values():
        if len(rivals) > 1:
            yield f"one checkpoint would fit {' and '.join(rivals)}; leave all but one out of {ALLOW_LIST}"


def _about_switches(backends: list[Backend]) -> Iterator[str]:
    given: Mapping[str, str] = os.environ
    formats = {known.name for backend in backends if backend.info for known in backend.info.formats}
    yield from _unknown(given, ALLOW_LIST, {backend.name for backend in backends} | {"none"}, "backend")
    yield from _unknown(given, "MODQ_TAKEOVER", formats | {"all"}, "format")
    yield from _unknown(given, "MODQ_ADAPTER_CHECK", {"error", "warn", "off"}, "setting")
    for name in sorted(given):
        if name.startswith("MODQ_") and name not in SWITCHES:
            near = get_close_matches(name, SWITCHES, n=1) or [n for n in SWITCHES if n.startswith("MODQ_")]
            yield f"{name} is set, and modq does not know it; did you mean {' or '.join(near)}?"
    off = [n for n in ("MODQ_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD") if given.get(n) == "0"]
    if off:
        yield f"{off[0]}=0: scripts must import modq.hf and modq.hf.peft themselves, or unset it"
    elif not any(point.name == "modq" for point in metadata.entry_points(group="torch.backends")):
        yield "modq is not installed as a package: transformers knows it only after `import modq.hf`"


def _unknown(given: Mapping[str, str], switch: str, known: set[str], noun: str) -> Iterator[str]:
    """Say what of a switch's values, with commas between, is not known."""
    for value in filter(None, given.get(switch, "").replace(" ", "").split(",")):
        if value not in known:
            yield f"{switch} has {value!r}: no such {noun}; there is {', '.join(sorted(known))}"
