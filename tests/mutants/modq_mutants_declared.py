"""Mistakes in what is declared, described, refused, exported. Those in INFO stand in `modq_mutants`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from modq_mutant_register import caught_by
from modq_mutants import Options
from modq_sound import TOP, Sound
from torch import Tensor

from modq import ImportedLayer, QuantizedWeight, TensorSpec, hookimpl


@caught_by("info_and_options_import_no_torch", r"imports torch, at .*modq_mutant_torch")
class TorchAtTheEntryPoint(Sound):
    """The module of INFO imports torch, so every `modq list-backends` does."""


@caught_by("declared_bits_are_stored_bytes", r"4.7.* bits, expected 3 to")
class FewerBitsDeclared(Sound):
    """INFO promises 3 bits; 4 and the scales are stored."""


@caught_by("declared_error_is_the_measured_one", r"expected at most the 0.05")
class LessErrorDeclared(Sound):
    """INFO promises a smaller error than there is."""


@caught_by("declared_error_is_the_measured_one", r"is 0.3, expected at most 1.5 times")
class SlackErrorDeclared(Sound):
    """INFO promises so little that a much worse quantizer would pass."""


@caught_by("describe_is_what_quantize_returns", r"disagree on codes")
class MultipleUndeclared(Sound):
    """It can only pack even columns and does not say so."""

    def pack(self, codes: Tensor) -> Tensor:
        return codes[:, ::2] | codes[:, 1::2] << 4


@caught_by("describe_is_what_quantize_returns", r"disagree on scales")
class DescribesOtherDtype(Sound):
    """The scales are described in float32 and stored in float16."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> dict[str, TensorSpec]:
        specs = dict(super().describe(shape, options))
        return {**specs, "scales": TensorSpec(specs["scales"].shape, torch.float32)}


@caught_by("describe_is_what_quantize_returns", r"disagree on scales")
class DescribesWholeGroupsOnly(Sound):
    """The last, shorter group is forgotten in describe()."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> dict[str, TensorSpec]:
        specs = dict(super().describe(shape, options))
        whole = (shape[0], max(1, shape[1] // options.group_size))
        return {**specs, "scales": TensorSpec(whole, torch.float16), "zeros": TensorSpec(whole, torch.uint8)}


@caught_by("layers_of_one_kind_share_a_handle", r"meta differs .* in largest")
class NumberInMeta(Sound):
    """The largest weight stands in meta, so each layer compiles to a graph of its own."""

    def qweight(
        self, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, options: Options
    ) -> QuantizedWeight:
        made = super().qweight(weight, packed, scales, zeros, options)
        meta = {**made.meta, "largest": float(weight.abs().max())}
        return QuantizedWeight(made.backend, 1, made.shape, made.tensors, meta)


@caught_by("layers_of_one_kind_share_a_handle", r"changed in range; use lists")
class TupleInMeta(Sound):
    """meta holds a tuple, which JSON gives back as a list."""

    def meta(self, options: Options) -> dict[str, Any]:
        return {**super().meta(options), "range": (0, TOP)}


@caught_by("describe_is_what_quantize_returns", r"largest has no dimension")
class ScalarTensor(Sound):
    """A number of the layer is a tensor without a dimension, which FSDP2 cannot shard."""

    @hookimpl
    def describe(self, shape: tuple[int, int], options: Options) -> dict[str, TensorSpec]:
        return {**super().describe(shape, options), "largest": TensorSpec((), torch.float32)}

    def qweight(
        self, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, options: Options
    ) -> QuantizedWeight:
        made = super().qweight(weight, packed, scales, zeros, options)
        tensors = {**made.tensors, "largest": weight.float().abs().max()}
        return QuantizedWeight(made.backend, 1, made.shape, tensors, made.meta)


@caught_by("odd_option_values_work_or_are_refused", "group_size=-1 raises KeyError")
class OptionErrorsOfItsOwn(Sound):
    """A value that does not fit raises a KeyError out of a table."""


@caught_by("declared_error_is_the_measured_one", r"relative error of Ŵ")
class IndexInAByte(Sound):
    """The group of a column is computed in int8: right up to 127 columns."""

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor, size: int, start: int = 0) -> Tensor:
        group = (torch.arange(start, start + codes.shape[1]).to(torch.int8).long() // size).abs()
        group = group.clamp(0, scales.shape[1] - 1)
        return (codes.float() - zeros[:, group].float()) * scales[:, group].float()


@caught_by("layers_survive_their_foreign_formats", r"Ŵ after sound-file")
class ExportsZerosLessOne(Sound):
    """The zeros are written less one, and read as they stand."""

    @hookimpl
    def export_layers(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        tensors = dict(super().export_layers(weights))
        return {**tensors, "offsets": tensors["offsets"] - 1}


@caught_by("layers_survive_their_foreign_formats")
class ForgetsTheGroupSize(Sound):
    """The config of the format does not say how large a group is; the reader takes the default."""

    @hookimpl
    def import_layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, ImportedLayer]:
        return super().import_layers(tensors, {"group_size": 16}, shapes)
