"""The conformance kit looks at the core, too: bugs planted in the core fail it, with right backends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modq.hf.peft  # noqa: F401  # it wraps what a bug unwraps
from modq import op
from modq.api import dequantize
from modq.linear import QuantLinear
from modq.materialize import blocks
from modq.testing import Subject, Verdict, run_check
from modq.testing.checks import all_checks


@dataclass(frozen=True)
class Bug:
    """What is wrong with the core, on which backend it shows, which check must fail, and what it must say."""

    plant: Callable[[], AbstractContextManager[Any]]
    backend: str
    caught_by: str
    says: str


def dense_product(x: Tensor, tensors: list[Tensor], handle: str, transpose: bool = False) -> Tensor:
    return F.linear(x, dequantize(op.unstored(tensors, handle), x.dtype))


def broken_graph(x: Tensor, *arguments: Any) -> Tensor:
    torch._dynamo.graph_break()
    return op.multiply(x, *arguments)


def twice(grad: Tensor, tensors: list[Tensor], handle: str) -> Tensor:
    return 2 * ORIGINAL_BACKWARD(grad, tensors, handle)


def without_the_last_line(width: int, depth: int, block_elements: int) -> Iterable[slice]:
    *most, last = blocks(width, depth, block_elements)
    return [*most, slice(last.start, last.stop - 1)]


def lenient(backend: str, cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key in {field.name for field in fields(cls)}}


def moved(self: QuantLinear, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
    nn.Module._apply(self, fn, recurse)
    if fn(torch.empty(1)).dtype == torch.bfloat16:
        next(iter(dict(self.named_packed()).values())).data.view(-1)[0] ^= 1
    return self


def forgetful(self: QuantLinear, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
    name, _ = list(self.named_packed())[-1]
    del destination[prefix + name]


ORIGINAL_BACKWARD = op._linear_backward
LORA = peft.tuners.lora.Linear
MERGING = "merging_quantizes_the_exact_sum_and_unmerging_restores_every_bit"

BUGS = {
    "autograd: the dense weight is kept for backward": Bug(
        lambda: patch("modq.linear.multiply", dense_product),
        "nf4",
        "nothing_dense_is_saved_for_backward",
        "is saved for backward, expected references",
    ),
    "autograd: the gradient is twice what it should be": Bug(
        lambda: patch("modq.op._linear_backward", twice),
        "nf4",
        "lora_gradients_are_those_of_dense_autograd",
        "dX",
    ),
    "autograd: autocast is not followed": Bug(
        lambda: patch("modq.op._autocast", lambda x: x), "nf4", "autocast_decides_the_dtype", "bfloat16"
    ),
    "compile: the layer breaks the graph": Bug(
        lambda: patch("modq.linear.multiply", broken_graph),
        "nf4",
        "a_compiled_layer_is_one_graph_and_saves_nothing_dense",
        "graph",
    ),
    "products: each block lacks its last line": Bug(
        lambda: patch("modq.materialize.blocks", without_the_last_line),
        "nf4",
        "the_product_is_as_close_as_the_dense_one",
        "y = ",
    ),
    "registry: unknown options are dropped": Bug(
        lambda: patch("modq.options._by_field", lenient),
        "nf4",
        "options_that_do_not_exist_are_refused",
        "an unknown option is taken without a word",
    ),
    "registry: any format version is handed to the plugin": Bug(
        lambda: patch("modq.api.check_format_version", lambda *given: None),
        "nf4",
        "unknown_format_versions_are_refused",
        "format version 2 is taken without a word",
    ),
    "weights: NaN is not looked for": Bug(
        lambda: patch("modq.api._check_weight", lambda *given: None),
        "nf4",
        "weights_that_are_no_numbers_are_refused",
        "a weight with nan",
    ),
    "weights: missing calibration is not noticed": Bug(
        lambda: patch("modq.api._check_weight", lambda *given: None),
        "optq",
        "missing_calibration_is_refused",
        "no calibration",
    ),
    "state: scales are held as floats": Bug(
        lambda: patch("modq.linear.stored", lambda tensors: dict(sorted(tensors.items()))),
        "hqq",
        "no_dtype_move_changes_a_bit",
        r"scales of the weight of a layer: .* numbers differ",
    ),
    "state: a dtype move flips a bit": Bug(
        lambda: patch.object(QuantLinear, "_apply", moved),
        "nf4",
        "no_dtype_move_changes_a_bit",
        "codes of the weight of a layer: 1 of",
    ),
    "save: the state dict lacks a tensor": Bug(
        lambda: patch.object(QuantLinear, "_save_to_state_dict", forgetful),
        "nf4",
        "a_state_dict_is_all_of_a_layer",
        "Missing key",
    ),
    "load: what was loaded is not compared with what was described": Bug(
        lambda: patch("modq.hf.quantizer._check_loaded", lambda *given: None),
        "nf4",
        "damaged_checkpoints_are_refused",
        "taken out",
    ),
    "merge: unmerging subtracts instead of restoring": Bug(
        lambda: patch.object(LORA, "unmerge", LORA.unmerge.__wrapped__),
        "nf4",
        MERGING,
        "of the unmerged model",
    ),
    "merge: a backend that needs calibration is quantized into without": Bug(
        lambda: patch.object(QuantLinear, "check_requantizable", lambda self: None),
        "optq",
        MERGING,
        "needs calibration",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # of functorch, under compile
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_core_fails_the_kit(name: str) -> None:
    bug = BUGS[name]
    check, subject = all_checks()[bug.caught_by], Subject(bug.backend)
    with bug.plant():
        outcome = run_check(check, subject)
    assert outcome.verdict is Verdict.FAILED
    assert re.search(bug.says, outcome.detail), outcome.detail
    assert run_check(check, Subject(bug.backend)).verdict is Verdict.PASSED
