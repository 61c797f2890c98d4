"""A Hypothesis machine: it does to quantized layers what users and libraries do, in any order.

There are two layers, for what is kept of one must not serve the other. Beside each stands what it must hold
whatever is done to it: the bits of its quantized weight, and Ŵ in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from hypothesis import HealthCheck, Phase, Verbosity, configuration, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from safetensors.torch import load, save
from torch import Tensor, nn

from modq.api import matmul, quantize_weight
from modq.linear import QuantLinear
from modq.spec import QuantizedWeight
from modq.testing.compare import as_close, same_bits, same_weight
from modq.testing.subject import Subject, Variant, copied, gaussian

SETTINGS = settings(
    max_examples=20,
    stateful_step_count=12,
    deadline=None,  # a slow quantizer is no wrong one
    derandomize=True,  # the same calls each time
    database=None,  # no files
    phases=(Phase.generate, Phase.shrink),
    verbosity=Verbosity.quiet,  # the breach itself says what was done
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

SHAPES = ((17, 40), (40, 88))
SEEDS = 2

Kind = tuple[int, int, int]
"""The numbers of a variant, of a shape, and of a weight of that shape."""

slots = st.integers(0, 1)
kinds = st.tuples(st.integers(0, 63), st.integers(0, len(SHAPES) - 1), st.integers(0, SEEDS - 1))
moved_to = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
computed_in = st.sampled_from([torch.float32, torch.bfloat16])

COPIES: dict[str, Callable[[QuantLinear], QuantLinear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer must hold."""

    qweight: QuantizedWeight
    dense: Tensor  # in float64


class Machine(RuleBasedStateMachine):
    """Two layers of a backend, and what is done to them."""

    def __init__(self, subject: Subject, known: dict[Kind, Kept]) -> None:
        super().__init__()
        self.subject = subject
        self.known = known
        self.layers: list[QuantLinear] = []
        self.kept: list[Kept] = []
        self.done: list[str] = []

    @initialize(first=kinds, second=kinds)
    def start(self, first: Kind, second: Kind) -> None:
        """Quantize two weights."""
        for kind in (first, second):
            layer, kept = self._quantized(kind)
            self.layers.append(layer)
            self.kept.append(kept)

    @rule(slot=slots, kind=kinds)
    def quantize(self, slot: int, kind: Kind) -> None:
        """Quantize a weight, for the first time or once more."""
        self.layers[slot], self.kept[slot] = self._quantized(kind)

    @rule(slot=slots, dtype=moved_to)
    def move(self, slot: int, dtype: torch.dtype) -> None:
        """Move a layer to a dtype."""
        self.done.append(f"layer {slot} to {dtype}")
        self.layers[slot].to(dtype)

    @rule(slot=slots, how=st.sampled_from(sorted(COPIES)))
    def duplicate(self, slot: int, how: str) -> None:
        """Put a copy of a layer in its place."""
        self.done.append(f"{how} of layer {slot}")
        self.layers[slot] = COPIES[how](self.layers[slot])

    @rule(slot=slots)
    def save_and_load(self, slot: int) -> None:
        """Put a layer out of a file's bytes in its place."""
        self.done.append(f"layer {slot} saved and loaded")
        old = self.layers[slot]
        qweight, state = old.quantized_weight, load(save(old.state_dict()))
        new = _empty(old)
        new.allocate(qweight.format_version, qweight.meta)
        new.load_state_dict(state, assign=True)
        self.layers[slot] = new

    @rule(slot=slots)
    def overwrite(self, slot: int) -> None:
        """Load the state of the other layer into a layer in place, where they are of one kind."""
        layer, other = self.layers[slot], self.layers[1 - slot]
        if layer.handle == other.handle and layer.options == other.options:
            self.done.append(f"the tensors of layer {1 - slot} copied into those of layer {slot}")
            layer.load_state_dict(other.state_dict())
            self.kept[slot] = self.kept[1 - slot]

    @rule(slot=slots)
    def prepare_and_restore(self, slot: int) -> None:
        """Repack a weight for a kernel, and put what leads back from there in its place."""
        self.done.append(f"layer {slot} prepared and restored")
        hooks, device = self.subject.hooks, torch.device("cpu")
        prepared = hooks.prepare(qweight=copied(self.layers[slot].quantized_weight), device=device)
        if prepared is not None:
            self.layers[slot].adopt(hooks.restore(qweight=prepared, device=device))

    @rule(slot=slots, rows=st.sampled_from([1, 3, 16]), transpose=st.booleans(), dtype=computed_in)
    def multiply(self, slot: int, rows: int, transpose: bool, dtype: torch.dtype) -> None:
        """Multiply by a weight, in either direction."""
        self.done.append(f"{rows} rows multiplied by layer {slot}")
        w = self.kept[slot].dense if transpose else self.kept[slot].dense.T
        x = gaussian(rows, w.shape[0], seed=1, dtype=dtype)
        y = matmul(x, self.layers[slot].quantized_weight, transpose)
        name = f"{'x @ Ŵ' if transpose else 'y = x @ Ŵ.T'} of layer {slot} in {dtype}"
        as_close(name, y, x @ w.to(dtype), x.double() @ w, self._story())

    @invariant()
    def no_bit_has_changed(self) -> None:
        """Both layers hold what they must."""
        for slot, (layer, kept) in enumerate(zip(self.layers, self.kept, strict=True)):
            same_weight(f"layer {slot}", layer.quantized_weight, kept.qweight, self._story())
            dense = layer.dequantize(torch.float64)
            same_bits(f"Ŵ of layer {slot}", dense, kept.dense, self._story())

    def _quantized(self, kind: Kind) -> tuple[QuantLinear, Kept]:
        variant, shape, seed = self._variant(kind), self.subject.shape(*SHAPES[kind[1]]), kind[2]
        self.done.append(f"a {shape} weight quantized with {variant}")
        qweight = _quantized(self.subject, gaussian(*shape, seed=seed), variant)
        kept = self.known.setdefault(kind, Kept(copied(qweight), self.subject.dense(qweight, torch.float64)))
        same_weight("quantize(), called again,", qweight, kept.qweight, self._story())
        layer = QuantLinear.like(_linear(shape), self.subject.backend, variant.options)
        layer.adopt(copied(qweight))
        return layer, kept

    def _variant(self, kind: Kind) -> Variant:
        return self.subject.variants[kind[0] % len(self.subject.variants)]

    def _story(self) -> str:
        return "after: " + ", then ".join(self.done)


def run_machine(subject: Subject) -> None:
    """Run the machine on a backend; raise the breach of the shortest sequence of calls that was found."""
    known: dict[Kind, Kept] = {}
    with _storage_elsewhere():
        run_state_machine_as_test(
            lambda: Machine(subject, known),  # type: ignore[arg-type]  # what makes one will do
            settings=SETTINGS,
        )


@contextmanager
def _storage_elsewhere() -> Iterator[None]:
    """Have Hypothesis write what it remembers of sources into a folder that goes, not where users are."""
    before = getattr(configuration, "__hypothesis_home_directory", None)
    with TemporaryDirectory() as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)


def _quantized(subject: Subject, weight: Tensor, variant: Variant) -> QuantizedWeight:
    """Quantize with data only where the backend must have some: it takes longer."""
    if subject.info.calibration in ("none", "optional"):
        return quantize_weight(weight, subject.backend, variant.options)
    return subject.quantize(weight, variant)


def _linear(shape: tuple[int, int]) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.float32)


def _empty(layer: QuantLinear) -> QuantLinear:
    shape = layer.out_features, layer.in_features
    return QuantLinear.like(_linear(shape), layer.backend, layer.options, dtype=layer.compute_dtype)
