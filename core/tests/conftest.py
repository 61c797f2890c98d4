"""Puts the test backends on the path as an installed package would be: a module and its .dist-info folder."""

import sys
from pathlib import Path

import pytest
import torch

BACKENDS = Path(__file__).parent / "backends"
sys.path.insert(0, str(BACKENDS))

LAYOUTS = {
    "affine-integer": ("toy-affine", {}),
    "affine-symmetric-3bit": ("toy-affine", {"bits": 3, "zeros": "symmetric"}),
    "affine-float-permuted": ("toy-affine", {"bits": 2, "zeros": "float", "permuted": True}),
    "codebook": ("toy-book", {}),
    "codebook-nested": ("toy-book", {"nested": True}),
    "bare": ("toy-bare", {}),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def kind(request):
    """(backend, options), one for each way of storing a weight."""
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
