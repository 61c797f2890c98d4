"""Products of llama.cpp, by the ggml libraries that the package llama-cpp-python brings, called by ctypes.

A weight lies as llama.cpp holds it after loading on a CPU: repacked for its matrix kernels where it has these
for the type. Only the run of the graph is timed, on threads of its own that it keeps: x stands in place, in
float32, and is zero, on which no time depends.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

F32 = 0
TYPES = {"q4_0": 2, "q2_k": 10, "iq2_xxs": 16}
"""ggml's numbers of them."""

REPACKED = ("q4_0",)
"""The types that llama.cpp lays out anew on a CPU with AVX2; to ask for another ends in a crash."""

SAMPLE_ROWS = 64
"""Rows that are quantized; a weight repeats them, for its speed does not depend on what is in it."""

_CONTEXT_BYTES = 1 << 20  # descriptions only: the data lies in buffers


class _InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _ThreadpoolParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
        ("spare", c_uint8 * 64),
    ]


@dataclass(frozen=True, slots=True)
class _Libraries:
    """ggml's functions, which return pointers, and a backend with its threads."""

    base: Any
    cpu: Any
    backend: int

    def pointer(self, name: str, *arguments: Any, library: Any = None) -> int:
        """Call what returns a pointer, and refuse a null one."""
        call = getattr(library or self.base, name)
        call.restype = c_void_p
        found = call(*arguments)
        if not found:
            raise RuntimeError(f"{name} returned no pointer")
        return int(found)

    def context(self) -> c_void_p:
        """Make a place for descriptions of tensors and graphs."""
        return c_void_p(self.pointer("ggml_init", _InitParams(_CONTEXT_BYTES, None, True)))


@cache
def _libraries() -> _Libraries:
    """Open the libraries and start as many threads as torch has."""
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama-cpp-python is not installed here")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    cpu.ggml_backend_cpu_init.restype = c_void_p
    backend = cpu.ggml_backend_cpu_init()
    found = _Libraries(base, cpu, backend)
    params = _ThreadpoolParams()
    base.ggml_threadpool_params_init(ctypes.byref(params), c_int(torch.get_num_threads()))
    threads = found.pointer("ggml_threadpool_new", ctypes.byref(params), library=cpu)
    cpu.ggml_backend_cpu_set_n_threads(c_void_p(backend), c_int(torch.get_num_threads()))
    cpu.ggml_backend_cpu_set_threadpool(c_void_p(backend), c_void_p(threads))
    return found


@dataclass(slots=True)
class Matrix:
    """An (out, in) weight of a type in ggml's memory, with a graph for each number of rows."""

    shape: tuple[int, int]
    type: str
    data: bytes
    graphs: dict[int, tuple[c_void_p, c_void_p, c_void_p]] = field(default_factory=dict)
    tensor: c_void_p = field(init=False)

    def __post_init__(self) -> None:
        ggml, (rows, columns) = _libraries(), self.shape
        context = ggml.context()
        kind = c_int(TYPES[self.type])
        self.tensor = c_void_p(
            ggml.pointer("ggml_new_tensor_2d", context, kind, c_int64(columns), c_int64(rows))
        )
        if self.type in REPACKED:
            where = ggml.pointer("_Z35ggml_backend_cpu_repack_buffer_typev", library=ggml.cpu)
        else:
            where = ggml.pointer("ggml_backend_cpu_buffer_type")
        ggml.pointer("ggml_backend_alloc_ctx_tensors_from_buft", context, c_void_p(where))
        ggml.base.ggml_backend_tensor_set(self.tensor, self.data, c_size_t(0), c_size_t(len(self.data)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Matrix:
        copy = Matrix(self.shape, self.type, self.data)
        for rows in self.graphs:
            copy.graph(rows)
        return copy

    def graph(self, rows: int) -> tuple[c_void_p, c_void_p, c_void_p]:
        """Return the graph of a product with so many rows, its x and its y."""
        if rows not in self.graphs:
            ggml = _libraries()
            context = ggml.context()
            depth, count = c_int64(self.shape[1]), c_int64(rows)
            x = c_void_p(ggml.pointer("ggml_new_tensor_2d", context, c_int(F32), depth, count))
            y = c_void_p(ggml.pointer("ggml_mul_mat", context, self.tensor, x))
            graph = c_void_p(ggml.pointer("ggml_new_graph", context))
            ggml.base.ggml_build_forward_expand(graph, y)
            ggml.pointer("ggml_backend_alloc_ctx_tensors", context, c_void_p(ggml.backend))
            zeros = (c_char * (4 * rows * self.shape[1]))()
            ggml.base.ggml_backend_tensor_set(x, zeros, c_size_t(0), c_size_t(len(zeros)))
            self.graphs[rows] = (graph, x, y)
        return self.graphs[rows]

    def run(self, rows: int) -> None:
        """Multiply what stands in x."""
        ggml = _libraries()
        status = ggml.base.ggml_backend_graph_compute(c_void_p(ggml.backend), self.graph(rows)[0])
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned status {status}")

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ W.T for x (rows, in) float32: to see that the product is one."""
        ggml, given = _libraries(), x.float().contiguous()
        graph_x, graph_y = self.graph(len(x))[1:]
        ggml.base.ggml_backend_tensor_set(
            graph_x, c_void_p(given.data_ptr()), c_size_t(0), c_size_t(given.nbytes)
        )
        self.run(len(x))
        y = torch.empty(len(x), self.shape[0])
        ggml.base.ggml_backend_tensor_get(graph_y, c_void_p(y.data_ptr()), c_size_t(0), c_size_t(y.nbytes))
        return y


def quantized(weight: Tensor, kind: str) -> bytes:
    """Quantize (rows, in) float32 as ggml does, all columns being as important."""
    ggml, weight = _libraries(), weight.contiguous()
    ggml.base.ggml_row_size.restype = c_size_t
    size = len(weight) * ggml.base.ggml_row_size(c_int(TYPES[kind]), c_int64(weight.shape[1]))
    into = ctypes.create_string_buffer(size)
    importance = (c_float * weight.shape[1])(*[1.0] * weight.shape[1])
    ggml.base.ggml_quantize_chunk.restype = c_size_t
    ggml.base.ggml_quantize_chunk(
        c_int(TYPES[kind]),
        c_void_p(weight.data_ptr()),
        into,
        c_int64(0),
        c_int64(len(weight)),
        c_int64(weight.shape[1]),
        importance,
    )
    return into.raw


def matrix(shape: tuple[int, int], kind: str) -> Matrix:
    """Make a weight of random numbers, which repeats some rows."""
    sample = 0.02 * torch.randn(SAMPLE_ROWS, shape[1], generator=torch.Generator().manual_seed(0))
    return Matrix(shape, kind, quantized(sample, kind) * (shape[0] // SAMPLE_ROWS))
