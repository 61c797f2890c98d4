"""How transformers loads and saves a model that modq quantizes: one HfQuantizer for all backends.

Quantize-on-load streams. Each planned linear becomes a QuantLinear that waits for its dense weight under the
usual key; the loader reads one weight, the operation below turns it into packed tensors, the dense one is
dropped. A checkpoint that is quantized already gets layers with empty slots of the right shapes, made from
what its config records for each module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert

from modq.api import describe_weight, quantize_weight
from modq.calibrate.engine import quantize_blocks
from modq.calibrate.replay import find_blocks, inside_blocks
from modq.calibrate.texts import as_samples
from modq.errors import CheckpointError, ModqError, OptionError, ShapeError
from modq.hf.config import ModqConfig, read_modules, read_shared, resolve
from modq.hf.foreign import ImportOnLoad, conversions, expect_foreign, required_format
from modq.hf.observe import current_observer
from modq.hf.provenance import hash_weight, join_hashes
from modq.linear import QuantLinear
from modq.model import Recipe, dense_linears, plan_layers, quantize_layers, quantized_layers
from modq.op import make_handle, stored, stored_specs
from modq.sharing import find_shared, named_packed, share
from modq.spec import TensorSpec


class ModqHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Serves every modq backend to transformers under quant_method "modq"."""

    requires_calibration = False
    quantization_config: ModqConfig

    def __init__(self, quantization_config: ModqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # The user's object may serve several models; what each became is recorded in a copy.
        self.quantization_config = deepcopy(quantization_config)
        self.failure: ModqError | None = None
        self.weight_hashes: dict[str, str] = {}  # of what is quantized on load, by module name

    # Loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the model cannot be loaded into, before anything is loaded."""
        _refuse_zero3()

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this checkpoint key is the dense weight that a layer waits for."""
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        return tensor == "weight" and isinstance(module, QuantLinear) and module.expects_dense

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element, for device maps: of the packed tensors where the parameter will become such."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        layer = model.get_submodule(param_name.rpartition(".")[0])
        if layer.options is None:  # of another format's checkpoint: not known before its tensors are read
            return param.element_size()
        specs = describe_weight((layer.out_features, layer.in_features), layer.backend, layer.options)
        return sum(_nbytes(spec) for spec in specs.values()) / param.numel()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave floats as they are where packed tensors belong: cast to bytes, they would pass for such."""
        packed = dtype is not None and not dtype.is_floating_point
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that the loader runs on each weight that needs quantization."""
        return _QuantizeOnLoad(self)

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.source is not None:
            expect_foreign(model, config.source, kwargs["checkpoint_files"], _names_in, dtype)
            return
        if self.pre_quantized:
            expect_packed(model, config, dtype)
            return
        if config.takeover:
            raise CheckpointError("ModqConfig(takeover=True) is for quantized checkpoints; this one is dense")
        plan = plan_layers(model, config.recipe, default_skips(model, config.recipe))
        if observer := current_observer():
            observer.planned(list(plan))
        for name, scheme in plan.items():
            layer = QuantLinear.like(model.get_submodule(name), scheme.backend, scheme.options, dtype=dtype)
            layer.expect_dense()
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure from None
        for name, layer in quantized_layers(model):
            _check_loaded(name, layer)
        foreign = self.quantization_config.source
        format = None if foreign is None else required_format(foreign)[1].name
        self._record(model, join_hashes(self.weight_hashes, model, format))
        if foreign is not None:  # from here on it is a model like any of modq's
            self.quantization_config.source = None
            model._weight_conversions = [c for c in model._weight_conversions if not _is_import(c)]
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What the loader does to tensors that the model's own conversions leave alone."""
        return [] if self.quantization_config.source is None else conversions(self)

    def collect_failure(self, name: str, convert: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run one module's conversion; keep its error until loading ends.

        Raised at once, the loader would bury it in a report of its own.
        """
        if self.failure is not None:
            return {}
        try:
            return convert()
        except ModqError as error:
            self.failure = type(error)(f"{name}: {error}")
            return {}

    # Using and saving

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Record anew what each module is now; the tensors themselves are the model's own state dict."""
        self._record(model)
        _keep_packed_as_they_are(model)
        shared = (self.quantization_config.resolved or {}).get("shared")
        if not shared:
            return None, {}
        state = model.state_dict()  # of which safetensors takes a tensor once
        return {name: tensor for name, tensor in state.items() if name not in shared}, {}

    def _record(self, model: Any, source: str | None = None) -> None:
        """Record what each module is now, with the hash of the source's weights, or the one known so far."""
        known = (self.quantization_config.resolved or {}).get("source")
        record = resolve(quantized_layers(model), source or known)
        shared = find_shared(named_packed(quantized_layers(model)))
        self.quantization_config.resolved = {**record, "shared": shared} if shared else record

    def is_serializable(self) -> bool:
        """Every backend's layers are plain tensors and JSON."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on every backend."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The products are opaque custom ops without graph breaks."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in list(quantized_layers(model)):
            if any(tensor.is_meta for _, tensor in layer.named_packed()):
                raise CheckpointError(
                    f"{name} is offloaded; to dequantize the model, load it without (device_map='cpu')"
                )
            model.set_submodule(name, dense_layer(layer, dtype or layer.compute_dtype))
        return model


class _QuantizeOnLoad(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Turn the dense weight that a layer waits for into that layer's packed tensors."""

    def __init__(self, quantizer: ModqHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return {full name: packed tensor} for {full name: dense weight}.

        Where the loader splits one tensor of the checkpoint into several layers' (a fused qkv), it may give
        some that stay dense.
        """
        loaded: dict[str, Any] = {}
        for key, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, key):
                loaded[key] = value
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            loaded |= self._convert_one(model, key, value[0] if isinstance(value, list) else value)
        return loaded

    def _convert_one(self, model: Any, key: str, weight: Tensor) -> dict[str, Tensor]:
        name = key.rpartition(".")[0]
        tensors = self.quantizer.collect_failure(
            name, lambda: _quantize_into(model.get_submodule(name), name, weight)
        )
        if tensors:
            self.quantizer.weight_hashes[name] = hash_weight(weight)
        return {f"{name}.{tensor_name}": tensor for tensor_name, tensor in tensors.items()}


def _refuse_zero3() -> None:
    if is_deepspeed_zero3_enabled():
        raise OptionError(
            "DeepSpeed ZeRO-3 partitions the parameters, which modq's packed ones do not support; "
            "use ZeRO stage 1 or 2, DDP, or FSDP2 to shard them"
        )


def default_skips(model: Any, recipe: Recipe) -> list[str]:
    """Return what stays dense: what the user listed, or else the heads (all that is outside the base model)
    and what the architecture keeps in float32.

    A head may be missing in the checkpoint, to be trained anew. Tied weights stay dense in any case.
    """
    tied = model.all_tied_weights_keys
    tied_modules = {key.removesuffix(".weight") for key in {*tied.keys(), *tied.values()}}
    listed = recipe.modules_to_not_convert
    if listed is None:
        fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        listed = (*map(re.escape, {*get_keys_to_not_convert(model), *_heads(model)}), *fp32)
    return sorted({*listed, *map(re.escape, tied_modules)})


def _heads(model: Any) -> list[str]:
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [name for name, _ in dense_linears(model) if not name.startswith(inside)]


def quantize_pretrained(model: Any, recipe: Recipe, calibration: Iterable[Any] | None = None) -> None:
    """Quantize a transformers model in memory and give it what `from_pretrained` would have."""
    _refuse_zero3()
    config = ModqConfig.of(recipe)
    plan = plan_layers(model, recipe, default_skips(model, recipe))
    if calibration is not None:
        plan = inside_blocks(plan, find_blocks(model, plan))
    source = join_hashes({name: hash_weight(model.get_submodule(name).weight) for name in plan}, model)
    if calibration is None:
        quantize_layers(model, plan)
    else:
        quantize_blocks(model, plan, as_samples(calibration, model.config), device=model.device)
    config.resolved = resolve(quantized_layers(model), source)
    model.hf_quantizer = ModqHfQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method


def _quantize_into(layer: QuantLinear, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Quantize a layer's dense weight; leave the layer with slots on meta, which the loader fills."""
    dense = weight.T if layer.conv1d else weight
    if dense.shape != (layer.out_features, layer.in_features):
        given, expected = tuple(dense.shape), (layer.out_features, layer.in_features)
        raise ShapeError(f"the checkpoint's weight is {given}, the model's config expects {expected}")
    observer = current_observer()
    if observer:
        observer.begins(name)
    qweight = quantize_weight(dense, layer.backend, layer.options)
    if observer:
        observer.quantized(name, dense, qweight)
    layer.allocate(qweight.format_version, qweight.meta)
    assert layer.handle == make_handle(qweight)  # `quantize_weight` has compared it with what was described
    return stored(qweight.tensors)


def expect_packed(model: Any, config: ModqConfig, dtype: torch.dtype | None) -> None:
    """Replace the linears that the checkpoint records as quantized by layers with empty slots."""
    resolved = config.resolved
    if resolved is None:
        raise CheckpointError(
            "the checkpoint's quantization_config records no modules; was it saved by modq?"
        )
    modules = read_modules(resolved)
    names = _names_in(model, {name: name for name in modules})
    for name, recorded in names.items():
        scheme, format_version, meta = modules[recorded]
        layer = QuantLinear.like(model.get_submodule(name), scheme.backend, scheme.options, dtype=dtype)
        layer.allocate(format_version, meta)
        model.set_submodule(name, layer)
    share(model, read_shared(resolved, {recorded: name for name, recorded in names.items()}))


def _names_in(model: Any, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Map recorded names to this model's: it may be the bare base of the saved one, or have a head around it.

    Names of parts that this class does not have (another head, a decoder) are left out.
    """
    linears = {name for name, _ in dense_linears(model)}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Any] = {}
    for name, scheme in recorded.items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in linears:
                found[candidate] = scheme
                break
    if recorded and not found:
        shown = next(iter(recorded))
        raise CheckpointError(
            f"the checkpoint records quantized modules such as {shown!r}, "
            f"and {type(model).__name__} has none of them"
        )
    return found


def _check_loaded(name: str, layer: QuantLinear) -> None:
    """Refuse a layer that the checkpoint did not fill: transformers only warns, and leaves garbage."""
    if layer.expects_dense:
        raise CheckpointError(
            f"the checkpoint has no tensor {name}.weight to quantize; is a shard missing? "
            "What shall be trained anew belongs into modules_to_not_convert"
        )
    described = describe_weight((layer.out_features, layer.in_features), layer.backend, layer.options)
    expected = stored_specs(described)
    for tensor_name, tensor in layer.named_packed():
        spec = expected[tensor_name]
        if not (_is_offloaded(layer, tensor_name) or getattr(tensor, "_is_hf_initialized", False)):
            raise CheckpointError(
                f"the checkpoint has no tensor {name}.{tensor_name} of the expected shape {spec.shape}; "
                "is a shard missing, or do config and tensors disagree?"
            )
        if TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{name}.{tensor_name} is {given}, expected {spec.dtype} of shape {spec.shape}: "
                "config and tensors disagree"
            )
        if tensor.data_ptr() % described[tensor_name].dtype.itemsize:
            # A byte view of floats must be aligned as they are, and in a mapped file it may not be. Codes
            # that are bytes lie as they like: a copy would be held beside the mapped pages.
            tensor.data = tensor.data.clone()


def _is_offloaded(layer: QuantLinear, tensor_name: str) -> bool:
    """Whether accelerate holds this tensor on disk or in memory, to be fetched for each forward."""
    held = getattr(getattr(layer, "_hf_hook", None), "weights_map", None) or {}
    return f"{getattr(held, 'prefix', '')}{tensor_name}" in set(held)


def _keep_packed_as_they_are(model: Any) -> None:
    """Drop the conversions that would fuse packed tensors on saving, as they split dense ones on loading.

    The others are kept: for tensors that are still dense the checkpoint follows its architecture's form.
    """
    if getattr(model, "_weight_conversions", None) is None:  # transformers would look them up, in this way
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    packed = [
        f"{name}.{tensor}" for name, layer in quantized_layers(model) for tensor, _ in layer.named_packed()
    ]

    def fuses_packed(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        back = conversion.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in packed)

    model._weight_conversions = [c for c in model._weight_conversions if not fuses_packed(c)]


def dense_layer(layer: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """Return the dense layer that a quantized one stands for, of the class that it had."""
    weight = layer.dequantize(dtype)
    dense: nn.Module
    if layer.conv1d:
        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)


def _is_import(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, ImportOnLoad) for operation in operations)


def _nbytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


if "modq" not in AUTO_QUANTIZER_MAPPING:
    register_quantizer("modq")(ModqHfQuantizer)
