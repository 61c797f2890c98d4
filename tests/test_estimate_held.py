"""Nothing is held twice: not when a quantized model is loaded, not after a step, not for the logits."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import modq
from modq.model import quantized_layers
from modq.train.sft import TILE, fused_head, small_tiles

VOCABULARY = 2 * TILE + 100
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are read from /proc")


def llama(**more: Any) -> Any:
    """A random Llama in bfloat16 with a head of its own; its sizes lead to codes at odd addresses."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**{**settings, "tie_word_embeddings": False, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(params=[("nf4", {}), ("hqq", {"bits": 3, "group_size": 32})], ids=["nf4", "hqq"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A model that was saved quantized and is loaded again."""
    backend, options = request.param
    modq.quantize_model(llama(vocab_size=VOCABULARY), backend, **options).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def mapped_files() -> list[tuple[int, int]]:
    """The addresses at which this process has safetensors files mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    found = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    return [(int(start, 16), int(end, 16)) for start, end in found]


@linux
def test_a_loaded_checkpoint_stays_mapped(loaded: Any) -> None:
    files = mapped_files()

    def is_mapped(tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < end for start, end in files)

    small = 64  # bytes: numbers of which a copy may be needed for their alignment
    parameters = {name: each for name, each in loaded.named_parameters() if each.nbytes > small}
    assert [name for name, each in parameters.items() if not is_mapped(each)] == []
    assert len(parameters) > len(list(quantized_layers(loaded))) > 0
    assert not is_mapped(torch.zeros(1000))


@linux
def test_codes_are_mapped_wherever_they_lie_and_floats_are_aligned(loaded: Any) -> None:
    found = []
    for _, layer in quantized_layers(loaded):
        for name, tensor in layer.quantized_weight.tensors.items():
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0, name
            found.append(tensor.data_ptr() % 8)
    assert len(found) > 20


def storages() -> dict[int, int]:
    """The bytes of all tensors that Python knows, by their memory's address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in PLAIN]
    own = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in own}


PLAIN = (Tensor, torch.nn.Parameter)


def test_a_step_leaves_nothing_behind_but_the_optimizers_states(loaded: Any) -> None:
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16, torch.uint8}  # no float32 norms
    model = get_peft_model(loaded, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    before = storages()
    ids = torch.arange(32)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    known = {each.untyped_storage().data_ptr() for each in (*states, ids)}
    added = {at: nbytes for at, nbytes in storages().items() if at not in before and at not in known}
    dense = min(layer.out_features * layer.in_features for _, layer in quantized_layers(loaded))
    assert {at: nbytes for at, nbytes in added.items() if nbytes >= dense} == {}
    assert sum(each.nbytes for each in states) >= 2 * sum(each.nbytes for each in trained)


class Widths(TorchDispatchMode):
    """Collects the last dimension of every tensor that appears."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {
            each.shape[-1] for each in pytree.tree_leaves(result) if isinstance(each, Tensor) and each.dim()
        }
        return result


def gradients(model: Any, **more: Any) -> tuple[float, dict[str, Tensor], set[int]]:
    """Return the loss of a batch, the gradients, and the widths of all that was computed on the way."""
    ids = torch.arange(2 * 24).reshape(2, 24) * 37 % VOCABULARY
    labels = ids.masked_fill(torch.arange(24) < 5, -100)
    model.zero_grad()
    with Widths() as widths:
        loss = model(input_ids=ids, labels=labels, **more).loss
        loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), found, widths.seen


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def adapted(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A quantized model in float32 with an adapter that is not zero, and TRL's loss to choose."""
    model = llama(vocab_size=VOCABULARY, tie_word_embeddings=request.param).float()
    modq.quantize_model(model, "nf4")
    fused_head(model)
    with torch.random.fork_rng():
        lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        yield get_peft_model(model, lora).train()


def test_the_loss_in_tiles_is_the_loss_and_no_tensor_is_as_wide_as_the_vocabulary(adapted: Any) -> None:
    plain, expected, widths = gradients(adapted)
    assert VOCABULARY in widths  # the plain loss has the logits
    with small_tiles():
        loss, found, widths = gradients(adapted, fused_lm_head=True)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
        )
    assert TILE in widths
    assert max(widths) <= TILE


def test_the_tiles_are_trls_own_outside_of_training() -> None:
    from trl.trainer import utils

    theirs = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with small_tiles():
        assert theirs > utils._CHUNKED_LOGPROB_CHUNK_SIZE == TILE
    assert theirs == utils._CHUNKED_LOGPROB_CHUNK_SIZE
