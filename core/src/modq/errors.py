"""The errors for what a user, a file or a plugin can cause: one line, given + expected + what to do."""

from __future__ import annotations


class ModqError(Exception):
    """The base of every error that modq raises on purpose."""


class BackendError(ModqError):
    """A quantizer backend that is missing, broken, or breaks its contract."""


class OptionError(ModqError, ValueError):
    """An option that the backend does not have, or a value that it does not take."""


class ShapeError(ModqError, ValueError):
    """A tensor whose shape does not fit."""


class DtypeError(ModqError, TypeError):
    """A tensor whose dtype does not fit."""


class WeightError(ModqError, ValueError):
    """A weight that cannot be quantized because of what is in it, such as NaN."""


class RequantizeError(ModqError):
    """A write into a quantized weight that its backend cannot turn into codes again."""


class CheckpointError(ModqError):
    """A checkpoint whose config and tensors disagree, or that lacks something."""
