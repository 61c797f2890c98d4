"""Hooks are functions: they change nothing that they are given, keep nothing, and know no chance."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch
from torch import Tensor

from modq.spec import QuantizedWeight
from modq.testing.check import Breach, check
from modq.testing.compare import same_bits, same_weight
from modq.testing.subject import Subject, Variant, copied, gaussian

THREADS = 4
ROUNDS = 8


@check()
def inputs_stay_untouched(subject: Subject) -> None:
    """No hook changes the weight, the activations or the quantized weight that it is given."""
    for variant, shape in subject.cases():
        weight = gaussian(*shape)
        before = weight.clone()
        qweight = copied(subject.quantize(weight, variant))
        same_bits("the weight given to quantize()", weight, before, f"{variant}, {shape}")
        kept = copied(qweight)
        for transpose in (False, True):
            x = gaussian(3, shape[0 if transpose else 1], seed=1)
            given = x.clone()
            y = _product(subject, x, qweight, transpose)
            same_bits("x given to matmul()", x, given, f"transpose={transpose}, {variant}, {shape}")
            y.zero_()
            same_bits("x after the result of matmul() was written to", x, given, f"transpose={transpose}")
        subject.dense(qweight).zero_()
        same_weight(
            "the quantized weight after products and dequantize(), results overwritten",
            qweight,
            kept,
            f"{variant}, {shape}",
        )


@check()
def chance_stays_untouched(subject: Subject) -> None:
    """No hook reads or moves the global random generator."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        made = []
        for seed in (1, 2):
            with _seeded(seed):
                state = torch.get_rng_state()
                qweight = subject.quantize(gaussian(*shape), variant)
                _product(subject, gaussian(3, shape[1]), qweight, False)
                subject.dense(qweight)
                if not torch.equal(torch.get_rng_state(), state):
                    raise Breach(f"the global random generator was moved; use a torch.Generator ({variant})")
            made.append(qweight)
        same_weight("quantize() under another global seed", made[1], made[0], str(variant))


@check()
def the_same_input_gives_the_same_bits(subject: Subject) -> None:
    """Twice the same weight, another one between, gives the same bits: no state is kept between calls."""
    shape, other = subject.shape(63, 60), subject.shape(40, 88)
    for variant in subject.variants:
        first = copied(subject.quantize(gaussian(*shape), variant))
        x = gaussian(3, shape[1], seed=1)
        dense, product = subject.dense(first), _product(subject, x, first, False)
        between = subject.quantize(gaussian(*other, seed=5) * 3, variant)
        _product(subject, gaussian(3, other[1], seed=6), between, False)
        again = subject.quantize(gaussian(*shape), variant)
        same_weight("quantize(), called again after another weight,", again, first, str(variant))
        changed = copied(subject.quantize(gaussian(*shape, seed=7), variant))
        subject.dense(changed)
        same_bits("Ŵ, asked for again after another weight's,", subject.dense(first), dense, str(variant))
        same_bits("y, asked for again after another weight's,", _product(subject, x, first, False), product)
        for name, tensor in changed.tensors.items():  # the same objects, with new content
            tensor.copy_(first.tensors[name])
        because = f"the tensors were overwritten in place, as loading a checkpoint does; {variant}"
        same_bits("Ŵ", subject.dense(changed), dense, because)
        same_bits("y", _product(subject, x, changed, False), product, because)


@check()
def results_stay_as_they_were_returned(subject: Subject) -> None:
    """What a hook has returned is not written to by a later call."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        first = subject.quantize(gaussian(*shape), variant)
        kept = copied(first)
        subject.quantize(gaussian(*shape, seed=5), variant)
        same_weight("what quantize() returned, after another call,", first, kept, str(variant))
        other = copied(subject.quantize(gaussian(*shape, seed=6), variant))
        dense = subject.dense(first)
        before = dense.clone()
        subject.dense(other)
        same_bits("what dequantize() returned, after another call,", dense, before, str(variant))
        for transpose in (False, True):
            x = gaussian(3, shape[0 if transpose else 1], seed=1)
            y = _product(subject, x, first, transpose)
            before = y.clone()
            _product(subject, -x, other, transpose)
            same_bits("what matmul() returned, after another call,", y, before, str(variant))


@check()
def threads_do_not_disturb_each_other(subject: Subject) -> None:
    """The hooks may be called from several threads at once."""
    shapes = [subject.shape(63, 60), subject.shape(40, 88), subject.shape(130, 96), subject.shape(17, 63)]
    variant = subject.variants[0]
    weights = [gaussian(*shape, seed=number) for number, shape in enumerate(shapes)]
    expected = [_work(subject, weight, variant) for weight in weights]
    together = Barrier(THREADS)

    def run(number: int) -> list[tuple[QuantizedWeight, Tensor]]:
        together.wait()
        return [_work(subject, weights[number], variant) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for number, results in enumerate(pool.map(run, range(THREADS))):
            for qweight, y in results:
                same_weight(f"quantize() in {THREADS} threads at once", qweight, expected[number][0])
                same_bits(f"y in {THREADS} threads at once", y, expected[number][1])


def _work(subject: Subject, weight: Tensor, variant: Variant) -> tuple[QuantizedWeight, Tensor]:
    qweight = subject.quantize(weight, variant)
    return qweight, _product(subject, gaussian(3, weight.shape[1], seed=1), qweight, False)


def _product(subject: Subject, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor:
    with torch.no_grad():
        y: Tensor = subject.hooks.matmul(x=x, qweight=qweight, transpose=transpose)
    return y


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the global generator, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
