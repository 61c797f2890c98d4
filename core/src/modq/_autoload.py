"""Makes transformers and peft know modq once they are imported, without `import modq` in the user's script.

`import torch` calls `install` through the entry-point group "torch.backends". Without it transformers would
take a checkpoint with quant_method "modq" for an unknown one: it warns and initialises all linears at random.
As every `import torch` on the machine passes through here, this imports nothing heavy and never raises;
MODQ_AUTOLOAD=0 turns it off. modq's own modules are imported only after, and because, what they extend was.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FOLLOW_UPS = {
    "transformers.quantizers.auto": "modq.hf",
    "transformers.trainer": "modq.hf.trainer",
    "peft": "modq.hf.peft",
}
"""The modules to wait for, and what is imported after each. The first is imported in the midst of all that
transformers imports: what follows it may not import modeling code."""


def install() -> None:
    """Arrange for the follow-up of each module: at once if it is imported, otherwise when it will be."""
    if os.environ.get("MODQ_AUTOLOAD") == "0":
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, follow_up in FOLLOW_UPS.items():
        if sys.modules.get(name) is None:
            continue
        spec = getattr(sys.modules[name], "__spec__", None)
        if isinstance(spec, ModuleSpec) and getattr(spec, "_initializing", False):
            spec.__class__ = _WatchedSpec
        else:
            _import_follow_up(follow_up)


class _Finder:
    """Finds the awaited modules where the other finders do, and puts a `_Loader` around their loaders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in FOLLOW_UPS:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                return _wrapped(spec)
        return None


def _wrapped(spec: ModuleSpec) -> ModuleSpec:
    loader: Any = spec.loader
    if hasattr(loader, "exec_module") and not isinstance(loader, _Loader):
        loader = _Loader(loader, FOLLOW_UPS[spec.name])
    spec.loader = loader
    return spec


class _Loader:
    """Stands in for a loader until its module runs, then steps aside; all else that one answers."""

    def __init__(self, inner: Any, follow_up: str) -> None:
        self._inner = inner
        self._follow_up = follow_up

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        _import_follow_up(self._follow_up)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loader, (self._inner, self._follow_up)


class _WatchedSpec(ModuleSpec):
    """The spec of a module whose own import imported torch and so called `install`, as that of peft does.

    Its loader is at work already and cannot be wrapped. The import machinery ends an import by setting
    `_initializing` to False: a private detail, but nothing public tells.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]  # back to what it was
            if self.name in sys.modules:  # the import succeeded
                _import_follow_up(FOLLOW_UPS[self.name])


def _import_follow_up(name: str) -> None:
    try:
        import_module(name)
    except Exception as error:
        _warn_once(f"{type(error).__name__}: {' '.join(str(error).split())}")


@cache  # the follow-ups usually fail for one reason
def _warn_once(reason: str) -> None:
    message = f"transformers and peft will not know modq: {reason}; MODQ_AUTOLOAD=0 turns the attempt off"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # under `-W error`: even then an import of torch or transformers must not fail
        print(f"modq: {message}", file=sys.stderr)
