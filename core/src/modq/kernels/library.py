"""Open a library of compiled kernels, modq's own or a plugin's, and lend it torch's threads.

Such a library has a plain C interface and links to neither Python nor torch, so one build serves all versions
of both. Torch keeps its symbols to itself: the addresses of its thread pool are looked up here and lent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

from modq.errors import ModqError

logger = logging.getLogger(__name__)

ISA_SWITCH = "MODQ_ISA"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
CORE = Path(__file__).with_name(f"libmodq_cpu{SUFFIX}")

NOT_COMPILED = "this modq was installed without a C++ compiler; install one, then modq again"


def get_include() -> str:
    """Return the folder of modq's C++ headers and of `modq/modq.cmake`, for plugins with compiled code."""
    return str(Path(__file__).parents[1] / "include")


@cache
def library() -> ctypes.CDLL | None:
    """Return modq's own library, or None where there is none; `why_missing` then says why."""
    reason = why_missing(CORE)
    if reason is not None:
        logger.warning("modq multiplies by plain torch only: %s", reason)
        return None
    return load_library(CORE)


@cache
def why_missing(path: Path = CORE) -> str | None:
    """Say why there is no library at this path that opens here, or return None if there is one."""
    if not path.is_file():
        return f"{path.name} is not there: {NOT_COMPILED}"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not open: {' '.join(str(error).split())}; install modq anew"
    return None


def load_library(path: Path) -> ctypes.CDLL:
    """Open a library that includes `modq/isa.h`, lend it torch's threads and choose its instruction set.

    Raises:
        OSError: it is not there or does not open.
        ModqError: MODQ_ISA names an instruction set that the library or this machine does not have.
    """
    opened = ctypes.CDLL(str(path))
    opened.modq_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    opened.modq_init.restype = None
    opened.modq_init(*_thread_pool())
    use_isa(opened, os.environ.get(ISA_SWITCH))
    return opened


def use_isa(opened: ctypes.CDLL, name: str | None) -> None:
    """Let a library run the instruction set of this name; without one, the best that this machine has.

    Raises:
        ModqError: the library or this machine does not have it.
    """
    opened.modq_use_isa.argtypes = [ctypes.c_char_p]
    if opened.modq_use_isa(name.encode() if name else None):
        there = ", ".join(isas(opened))
        raise ModqError(
            f"{ISA_SWITCH} is {name!r}: this machine runs {there}; take one of these, or unset it"
        )


def isa(opened: ctypes.CDLL) -> str:
    """Return the name of the instruction set that a library runs."""
    opened.modq_isa.restype = ctypes.c_char_p
    name: bytes = opened.modq_isa()
    return name.decode()


def isas(opened: ctypes.CDLL) -> list[str]:
    """Return the instruction sets that a library has and this machine runs, "portable" first."""
    opened.modq_isa_name.restype = ctypes.c_char_p
    names: list[str] = []
    while (name := opened.modq_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


@cache
def _thread_pool() -> tuple[int | None, int | None]:
    """Return the addresses of torch's loop and of its number of threads; None before torch 2.10."""
    import torch  # late: get_include works without it

    name = "torch_cpu.dll" if sys.platform == "win32" else f"libtorch_cpu{SUFFIX}"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        loop, threads = torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads
    except (OSError, AttributeError) as error:
        logger.warning(
            "compiled kernels run on one thread: torch %s lends none: %s", torch.__version__, error
        )
        return None, None
    return ctypes.cast(loop, ctypes.c_void_p).value, ctypes.cast(threads, ctypes.c_void_p).value
