"""An entry module that imports torch, which is its mistake."""

import torch
from modq_mutants import declare

INFO = declare("modq_mutants_declared", "TorchAtTheEntryPoint", "torch-at-the-entry-point")
DTYPE = torch.float16
