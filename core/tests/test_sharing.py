"""`modq.sharing`: which packed tensors are one, and how many bytes they take."""

import pytest
import torch
from torch import nn

import modq
from modq.errors import CheckpointError
from modq.sharing import find_shared, named_packed, packed_bytes, share


@pytest.fixture
def model(generator):
    """Two layers of one kind, and what `share` needs of a transformers model."""
    made = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in ("one", "two")})
    for name in made:
        made[name].weight.data = torch.randn(32, 64, generator=generator)
        made[name] = modq.QuantLinear.from_linear(made[name], "toy-affine")
    made.all_tied_weights_keys = {}
    return made


def test_a_shared_tensor_is_found_and_its_bytes_are_divided(model):
    assert find_shared(named_packed(model.items())) == {}
    apart = packed_bytes(dict(model.items()))
    share(model, {"two.codes": "one.codes"})
    assert model["two"].codes is model["one"].codes
    assert model.all_tied_weights_keys == {"two.codes": "one.codes"}
    assert find_shared(named_packed(model.items())) == {"two.codes": "one.codes"}
    together = packed_bytes(dict(model.items()))
    assert together["one"] == together["two"] == apart["one"] - model["one"].codes.nbytes / 2
    assert sum(together.values()) == sum(p.nbytes for p in model.parameters())


def test_equal_memory_is_one_tensor_and_equal_values_are_not():
    a = torch.arange(6)
    tensors = {"a": a, "again": nn.Parameter(a, requires_grad=False), "copy": a.clone(), "part": a[:3]}
    empty = {name: torch.empty(0) for name in ("b", "c")}  # their memory is at one address: none
    meta = {name: torch.empty(3, device="meta") for name in ("d", "e")}
    assert find_shared([*tensors.items(), *empty.items(), *meta.items()]) == {"again": "a"}


@pytest.mark.parametrize("wrong", [{"two.codes": "three.codes"}, {"six.codes": "one.codes"}])
def test_a_record_of_other_tensors_is_refused(model, wrong):
    with pytest.raises(
        CheckpointError, match=r"record of shared tensors has (two|six).codes as .*edited by hand"
    ):
        share(model, wrong)
