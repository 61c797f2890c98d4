"""How much memory training an adapter takes, by part, before anything is downloaded whole or loaded.

What is held comes from the model's config and the quantizers' `describe`; what a step adds, from running the
step itself on tensors that have shapes and no content (`modq.estimate.step`); what the process takes, from
starting one (`modq.estimate.process`). No formula for any architecture, optimizer or quantizer is in here.
"""

from modq.estimate.parts import Estimate, Training, estimate

__all__ = ["Estimate", "Training", "estimate"]
