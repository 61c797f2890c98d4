"""Which layers are chosen, and quantizing a model that is in memory."""

import pytest
import torch
from torch import nn

import modq
from modq.errors import OptionError, ShapeError
from modq.model import Recipe, is_skipped, plan_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 60)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(60, 62), "down": nn.Linear(62, 60)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(60)
        self.head = nn.Linear(60, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return self.head(self.norm(x))


def quantized(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, modq.QuantLinear)}


def test_every_linear_but_tied_ones_becomes_quantized():
    model = modq.quantize_model(Net(), "toy-affine")
    assert set(quantized(model)) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")}
    assert model.head.weight is model.embed.weight


def test_the_model_computes_with_the_quantized_weights():
    model = modq.quantize_model(Net(), "toy-affine", bits=8)
    reference = Net()
    reference.load_state_dict(
        {**model.state_dict(), **{f"{name}.weight": m.dequantize() for name, m in quantized(model).items()}},
        strict=False,
    )
    tokens = torch.arange(8)[None]
    assert torch.allclose(model(tokens), reference(tokens), atol=1e-5)


def test_rules_override_options_and_backends_and_the_first_match_counts():
    model = modq.quantize_model(
        Net(),
        "toy-affine",
        layers={r"0\.up": {"group_size": 16}, "up": {"backend": "toy-book"}, r"1\.down": None},
        bits=3,
    )
    made = quantized(model)
    assert set(made) == {"layers.0.up", "layers.1.up", "layers.0.down"}
    assert (made["layers.0.up"].options.group_size, made["layers.0.up"].options.bits) == (16, 3)
    assert made["layers.1.up"].backend == "toy-book"
    assert made["layers.0.down"].options.group_size == 32


def test_no_default_backend_leaves_the_rest_dense():
    plan = plan_layers(Net(), Recipe(None, layers={"down": {"backend": "toy-affine"}}), skip=["head"])
    assert set(plan) == {"layers.0.down", "layers.1.down"}


def test_modules_to_not_convert_are_left_dense():
    assert set(quantized(modq.quantize_model(Net(), "toy-affine", modules_to_not_convert=["layers.0"]))) == {
        "layers.1.up",
        "layers.1.down",
    }


@pytest.mark.parametrize(
    ("name", "pattern", "skipped"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.1.mlp", "layers.1", True),
        ("model.layers.11.mlp", "layers.1", False),
        ("block.two", "wo", False),
        ("block.wo", "wo", True),
        ("a.gate_proj", "gate", False),
        ("model.layers.11.mlp", r"layers\.\d+", True),
    ],
)
def test_a_pattern_matches_whole_parts_of_a_name(name, pattern, skipped):
    assert is_skipped(name, [pattern]) is skipped


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            {"nothing_like_it": {}},
            "'nothing_like_it' matches no linear of the model; its linears are layers.0.up",
        ),
        ({"(": {}}, "is not a regex"),
        ({"up": 4}, "'up' maps to 4, expected options or None"),
        (["up"], "expected {regex: overrides}"),
        ({"up": {"bitz": 4}}, "has no option 'bitz'"),
    ],
)
def test_wrong_rules_are_refused(layers, said):
    with pytest.raises(OptionError) as caught:
        modq.quantize_model(Net(), "toy-affine", layers=layers)
    assert said in str(caught.value)


def test_an_error_in_one_layer_names_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(
        ShapeError, match=r"^1: weight has shape \(3, 4\); backend 'toy-bare' needs multiples"
    ):
        modq.quantize_model(model, "toy-bare")
