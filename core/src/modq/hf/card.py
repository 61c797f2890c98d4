"""Model cards: README.md says how a base was quantized, on which base an adapter was trained, and how.

The hub shows a card's text and reads its front matter. transformers, PEFT and TRL write cards too, and so do
users, so what modq knows goes into sections of its own, each between two comments: they are written anew when
something changed, and the rest of the text stays. The form full of "[More Information Needed]" that the
others start from is left out, for nobody would find the facts at its end.

In the front matter the hub refuses a base model that is a folder, and nobody needs to know whose folder it
was: such a name, as PEFT writes it, is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported silently
from torch import nn
from transformers.utils.hub import PushToHubMixin

from modq.hf.provenance import base_layers, describe_base, describe_scheme, save_base
from modq.hf.wrap import wrap
from modq.linear import QuantLinear
from modq.model import quantized_layers
from modq.sharing import packed_bytes
from modq.spec import JSON

FILE = "README.md"
_ADAPTER = "Adapter for a quantized model"
_ADAPTER_TAG = "base_model:adapter:"
"""How PEFT begins the tag that names the base."""


def write_base_card(
    folder: str | Path, model: Any, source_name: str | None = None, name: str | None = None
) -> None:
    """Write the card of a quantized model, or the facts into the card that is there.

    Args:
        folder: where the model is saved.
        model: a transformers model that modq has quantized.
        source_name: the folder or hub id of what was quantized; by default, what transformers knows.
        name: what the model is called; by default, as the folder.
    """
    card = _load(folder, name or Path(folder).resolve().name)
    source_name = source_name or _source_name(model)
    data: Any = card.data
    if data.get("base_model") is None and _is_hub_id(source_name):
        data.base_model, data["base_model_relation"] = source_name, "quantized"
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or _task(model)
    _tag(card, ["modq", "quantized", *_backends(model)])
    card.text = _with_section(card.text, "base", _base_section(model, source_name, name or "this folder"))
    card.save(Path(folder, FILE))


def write_adapter_card(folder: str | Path, model: Any) -> None:
    """Write what base an adapter was trained on into its card."""
    card = _load(folder, _ADAPTER)
    data: Any = card.data
    if not _is_hub_id(data.base_model):
        name = getattr(model, "name_or_path", None)
        data.base_model = name if _is_hub_id(name) else None
    data.library_name = "peft"
    data.tags = [tag for tag in data.tags or [] if not _names_a_folder(tag)]
    _tag(card, ["modq", *_backends(model)])
    card.text = _with_section(card.text, "adapter", _adapter_section(model))
    card.save(Path(folder, FILE))


def write_training_card(folder: str | Path, run: Mapping[str, JSON]) -> None:
    """Write how an adapter was trained into its card.

    Args:
        folder: where the adapter is saved.
        run: what `train.json` holds; of it, data, recipe, result and versions are told.
    """
    card = _load(folder, _ADAPTER)
    told = {key: _told(run[key]) for key in ("data", "recipe", "result", "versions") if run.get(key)}
    lines = ["## Training", "", *(f"- {key.capitalize()}: {text}" for key, text in told.items())]
    card.text = _with_section(card.text, "training", "\n".join(lines))
    card.save(Path(folder, FILE))


def write_card(folder: str | Path, model: Any, name: str) -> None:
    """Write the card of what is in a folder: of an adapter if there is one on the model, else of the base."""
    start_card(folder, name)
    if hasattr(model, "create_or_update_model_card"):
        tags = _load(folder, name).data.get("tags") or []
        model.create_or_update_model_card(str(folder))  # PEFT's: it ends with ours, and forgets the tags
        card = _load(folder, name)
        _tag(card, [tag for tag in tags if not _names_a_folder(tag)])
        card.save(Path(folder, FILE))
    elif getattr(model, "_hf_peft_config_loaded", False):
        write_adapter_card(folder, model)
    else:
        write_base_card(folder, model, name=name)


def start_card(folder: str | Path, title: str = _ADAPTER) -> None:
    """Begin a card with a title, unless there is one that somebody has written in."""
    _load(folder, title).save(Path(folder, FILE))


# Sections


def _base_section(model: Any, source_name: str | None, name: str) -> str:
    layers, base = base_layers(model), describe_base(model)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    dense = held - sum(packed_bytes(layers).values())
    dense += sum(_weights(layer) * layer.compute_dtype.itemsize for layer in layers.values())
    packages = ["modq", *sorted({scheme["package"] for scheme in base.schemes})]
    auto = "AutoModelForCausalLM" if _task(model) == "text-generation" else type(model).__name__
    lines = [
        "## Quantization",
        "",
        f"{len(layers)} linear layers are quantized by modq; the model is a LoRA base as it is.",
        "",
        *_table(model),
        "",
        f"- Size: {held / 1e6:.4g} MB; with all layers dense it would be {dense / 1e6:.4g} MB",
        *([f"- Quantized from: {_shown(source_name)}"] if source_name else []),
        *_source_line(base.source),
        "",
        f"It loads where {' and '.join(f'`{package}`' for package in packages)} are installed:",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        "```",
    ]
    return "\n".join(lines)


def _adapter_section(model: Any) -> str:
    lines = [
        "## The base",
        "",
        "The adapter was trained on a base quantized by modq, and fits that one: `modq.json` says which it",
        "is, and modq refuses the adapter on another.",
        "",
        *_table(model),
        "",
        *_source_line(describe_base(model).source),
    ]
    return "\n".join(lines).rstrip()


def _table(model: Any) -> list[str]:
    layers, base = base_layers(model), describe_base(model)
    nbytes = packed_bytes(layers)
    rows = ["| backend and options | package | layers | bits a weight |", "|---|---|---|---|"]
    for number, scheme in enumerate(base.schemes):
        its = base.names(number)
        bits = 8 * sum(nbytes[name] for name in its) / sum(_weights(layers[name]) for name in its)
        package = f"{scheme['package']} {scheme['version']}"
        rows.append(f"| `{describe_scheme(scheme)}` | {package} | {len(its)} | {bits:.4g} |")
    return rows


def _weights(layer: QuantLinear) -> int:
    return layer.out_features * layer.in_features


def _source_line(source: str | None) -> list[str]:
    return [f"- Hash of the source weights: `{source}`"] if source else []


def _with_section(text: str, name: str, section: str) -> str:
    """Put a section in the place of its last version, or at the end."""
    begin, end = f"<!-- modq {name} -->", f"<!-- end of modq {name} -->"
    block = f"{begin}\n{section}\n{end}"
    old = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return old.sub(lambda _: block, text) if old.search(text) else f"{text.rstrip()}\n\n{block}\n"


def _told(value: JSON) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, list | tuple):
        return " and ".join(_told(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else _shown(" ".join(str(value).split()))


def _shown(name: str) -> str:
    """Return a name without the folders that lead to it, if it is a path."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


# The card itself


def _load(folder: str | Path, title: str) -> ModelCard:
    """Load a folder's card; begin one if there is none, or an empty form."""
    path = Path(folder, FILE)
    card: ModelCard = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    if _is_form(card):
        card.text = f"\n# {title}\n\n"
    return card


def _is_form(card: ModelCard) -> bool:
    """Whether a card's text is the form that transformers and PEFT start from, with nothing filled in."""
    lines = set(card.text.splitlines())
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return form <= lines and all("has been automatically generated" in line for line in lines - form)


def _tag(card: ModelCard, tags: Iterable[str]) -> None:
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))


def _backends(model: Any) -> list[str]:
    return sorted({layer.backend for layer in base_layers(model).values()})


def _source_name(model: Any) -> str | None:
    """The name of the model that this one was quantized from; None if it was loaded quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    name: str | None = getattr(model, "name_or_path", None)
    return None if getattr(quantizer, "pre_quantized", False) else name or None


def _names_a_folder(tag: str) -> bool:
    """Whether a tag is PEFT's that names the base, and that base is no model on the hub."""
    return tag.startswith(_ADAPTER_TAG) and not _is_hub_id(tag.removeprefix(_ADAPTER_TAG))


def _is_hub_id(name: Any) -> bool:
    """Whether this can be a model on the hub, or a list of such, rather than a folder or nothing."""
    if not isinstance(name, str):
        return isinstance(name, list) and bool(name) and all(map(_is_hub_id, name))
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _task(model: Any) -> str | None:
    from transformers.modelcard import TASK_MAPPING  # late: it imports modeling code, see modq._autoload

    cls = type(model).__name__
    return next((task for task, classes in TASK_MAPPING.items() if cls in classes.values()), None)


def _carding(upload: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module) and any(quantized_layers(self)):
            write_card(working_dir, self, repo_id)
            if getattr(self, "_hf_peft_config_loaded", False):
                save_base(self, working_dir)  # of transformers' own adapters it is written after the upload
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return wrapped


wrap(PushToHubMixin, "_upload_modified_files", _carding)
