"""Reads training and evaluation data, and says by file and line what is wrong. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from modq.errors import ModqError

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Training examples in TRL's forms: `text`, `prompt` + `completion`, `messages`, or `input_ids`."""

FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The keys of a JSONL line, one of these; the first that fits counts, and all lines have the same."""

EXPECTED = "expected a JSON object with `text`, or `prompt` and `completion`, or `messages`"


class DataError(ModqError):
    """A data file that cannot be used as it is."""


def read_text(path: Path) -> str:
    """Read a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None


def read_rows(source: str, tokenizer: Any, max_length: int) -> Rows:
    """Read the examples of a file or a dataset.

    Args:
        source: a .jsonl file; a .txt file, which is cut into windows of `max_length` tokens; or a dataset,
            as NAME[@CONFIG][:SPLIT], on the hub or a folder that `datasets` can read. The split is `train`
            unless given, and may be a slice: `train[:1000]`.
        tokenizer: the model's.
        max_length: tokens in a window of a text.

    Raises:
        DataError: if there is no such thing, it is empty, or something in it is no example.
    """
    path = Path(source)
    if not is_file(source):
        rows = _dataset_rows(source)
    elif path.suffix == ".txt":
        rows = list(_text_rows(read_text(path), tokenizer, max_length))
    elif path.suffix in (".jsonl", ".json"):
        rows = _jsonl_rows(path)
    else:
        raise DataError(f"{source!r} ends with {path.suffix!r}, expected .jsonl (one object a line) or .txt")
    if not len(rows):
        raise DataError(f"{source!r} holds no example")
    if "messages" in rows[0] and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{source!r} holds `messages` but the model's tokenizer has no chat template; use `text`"
        )
    return rows


def is_file(source: str) -> bool:
    """Whether a source is a file, and not the name of a dataset.

    Raises:
        DataError: if it is named like a file and there is none.
    """
    if Path(source).is_file():
        return True
    if Path(source).suffix in (".jsonl", ".json", ".txt"):
        raise DataError(f"{source!r} does not exist; expected a file, or the name of a dataset")
    return False


def fingerprint(source: str) -> str | None:
    """Hash a file of data (SHA-256); None for a dataset, which has a revision of its own."""
    return sha256(Path(source).read_bytes()).hexdigest() if is_file(source) else None


def _dataset_rows(source: str) -> Rows:
    """Load a dataset by its name; only the columns that are trained on are kept."""
    from datasets import load_dataset  # imports torch, pandas and pyarrow

    parts = re.fullmatch(r"(?P<name>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?", source)
    if parts is None:
        raise DataError(f"{source!r} is no file and no NAME[@CONFIG][:SPLIT] of a dataset")
    try:
        dataset = load_dataset(parts["name"], parts["config"], split=parts["split"] or "train")
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises has no common class
        raise DataError(f"{source!r} cannot be loaded as a dataset: {str(error).splitlines()[0]}") from None
    keys = next((form for form in FORMS if all(key in dataset.column_names for key in form)), None)
    if keys is None:
        raise DataError(f"{source!r} has the columns {', '.join(dataset.column_names)}; {EXPECTED}")
    for number, row in enumerate(dataset.select(range(min(1, len(dataset))))):
        _checked(row, keys, f"{source}:{number}")
    return dataset.select_columns(list(keys))  # type: ignore[no-any-return]  # datasets ships no types


def as_text(row: Mapping[str, Any], tokenizer: Any) -> str:
    """Write out what an example says, in whichever form it is."""
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return str(row["text"]) if "text" in row else f"{row['prompt']}{row['completion']}"


def _text_rows(text: str, tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
    """A plain text has no examples in it, so it is trained on whole, window by window."""
    ids = tokenizer(text)["input_ids"]
    windows = (ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return ({"input_ids": window} for window in windows if len(window) > 1)  # one token predicts nothing


def _jsonl_rows(path: Path) -> Rows:
    rows: list[dict[str, Any]] = []
    keys: tuple[str, ...] | None = None
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path}:{number}")
        keys = keys or next((form for form in FORMS if all(key in row for key in form)), None)
        if keys is None:
            raise DataError(f"{path}:{number}: has {', '.join(sorted(row)) or 'no keys'}; {EXPECTED}")
        rows.append(_checked(row, keys, f"{path}:{number}"))
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON ({error.msg}); {EXPECTED}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: is a {type(row).__name__}; {EXPECTED}")
    return row


def _checked(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """Keep only the keys that are trained on, having checked their types."""
    for key in keys:
        if key not in row:
            raise DataError(f"{where}: has no {key!r}, which the lines before it have")
        if key == "messages":
            _check_messages(row[key], where)
        elif not isinstance(row[key], str):
            raise DataError(f"{where}: {key!r} is a {type(row[key]).__name__}, expected a string")
    return {key: row[key] for key in keys}


def _check_messages(messages: object, where: str) -> None:
    sound = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    if not sound or not messages:
        raise DataError(f"{where}: `messages` must be a list of objects with `role` and `content`")
