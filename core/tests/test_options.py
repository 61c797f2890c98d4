"""`modq.options`: from keywords or `key=value` text to the options dataclass of a backend."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from modq import options
from modq.errors import ModqError, OptionError
from modq.options import build_options, options_to_json, parse_settings


@dataclass(frozen=True)
class Options:
    """One option of each type that options use."""

    block_size: int = field(default=64, metadata={"shorthand": "group_size"})
    kind: Literal["a", "b", 2] = "a"
    nested: bool = True
    damping: float = 0.01
    seed: int | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}, expected at least 1")


@dataclass(frozen=True)
class Wide:
    """Options of a backend with several widths."""

    width: int = field(default=4, metadata={"shorthand": "bits"})


@dataclass(frozen=True)
class Nothing:
    """No options at all."""


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends by name, without the registry: "one" width, "wide", and "bare" without any option."""
    classes = {"one": Options, "wide": Wide, "bare": Nothing}
    widths = {"one": (4,), "wide": (2, 3, 4), "bare": (2, 1.5)}
    monkeypatch.setattr(options, "options_class", classes.__getitem__)
    monkeypatch.setattr(options, "describe_backend", lambda name: SimpleNamespace(bits=widths[name]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Options()),
        ({"block_size": 32}, Options(block_size=32)),
        ({"group_size": 32}, Options(block_size=32)),
        ({"bits": 4}, Options()),
        ({"bits": 4.0, "nested": False}, Options(nested=False)),
        ({"kind": "b"}, Options(kind="b")),
        ({"kind": 2}, Options(kind=2)),
        ({"damping": 0.5}, Options(damping=0.5)),
        ({"damping": 1}, Options(damping=1)),
        ({"seed": 7}, Options(seed=7)),
        ({"seed": None}, Options()),
        ({"shape": (1, 2)}, Options(shape=(1, 2))),
        ({"shape": [1, 2]}, Options(shape=(1, 2))),
    ],
)
def test_what_a_backend_takes_becomes_its_options(given: dict[str, Any], expected: Options) -> None:
    assert build_options("one", given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"blocksize": 32},
            "backend 'one' has no option 'blocksize'; "
            "it has block_size, damping, group_size, kind, nested, seed, shape",
        ),
        ({"bits": 8}, "backend 'one': bits=8, expected 4, its only width"),
        ({"bits": "4"}, "backend 'one': bits='4', expected 4, its only width"),
        ({"block_size": "32"}, "backend 'one': block_size='32', expected int"),
        ({"group_size": 32.0}, "backend 'one': block_size=32.0, expected int"),
        ({"block_size": True}, "backend 'one': block_size=True, expected int"),
        ({"block_size": None}, "backend 'one': block_size=None, expected int"),
        ({"block_size": 0}, "backend 'one': block_size=0, expected at least 1"),
        (
            {"block_size": 32, "group_size": 64},
            "backend 'one': 'group_size' and 'block_size' are one option, given twice",
        ),
        ({"kind": "c"}, "backend 'one': kind='c', expected 'a' or 'b' or 2"),
        ({"kind": 2.0}, "backend 'one': kind=2.0, expected 'a' or 'b' or 2"),
        ({"kind": ["a"]}, "backend 'one': kind=('a',), expected 'a' or 'b' or 2"),
        ({"nested": 1}, "backend 'one': nested=1, expected bool"),
        ({"nested": "true"}, "backend 'one': nested='true', expected bool"),
        ({"damping": "0.1"}, "backend 'one': damping='0.1', expected float"),
        ({"damping": True}, "backend 'one': damping=True, expected float"),
        ({"seed": "x"}, "backend 'one': seed='x', expected int | None"),
        ({"shape": 1}, "backend 'one': shape=1, expected tuple[int, ...]"),
    ],
)
def test_what_a_backend_does_not_take_is_named_with_what_it_does(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_options("one", given)
    assert str(caught.value) == message
    assert isinstance(caught.value, ModqError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("given", [{"bits": 3}, {"width": 3}])
def test_a_plugin_maps_bits_to_an_option_of_its_own(given: dict[str, Any]) -> None:
    assert build_options("wide", given) == Wide(width=3)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_no_shorthand_is_ignored_silently(key: str) -> None:
    with pytest.raises(OptionError, match=f"^backend 'bare' has no option '{key}'; it has none$"):
        build_options("bare", {key: 2})


def test_options_survive_json() -> None:
    chosen = Options(block_size=128, kind=2, nested=False, damping=0.25, seed=3, shape=(4, 5))
    given = options_to_json(chosen)
    assert json.loads(json.dumps(given)) == given
    assert build_options("one", given) == chosen


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("size=64", {"size": 64}),
        ("ratio=0.5", {"ratio": 0.5}),
        ("nested=true", {"nested": True}),
        ("nested=True", {"nested": "True"}),  # JSON spells it in lower case; the type check will say so
        ("seed=null", {"seed": None}),
        ("kind=a", {"kind": "a"}),
        ('kind="2"', {"kind": "2"}),
        ("path=a=b", {"path": "a=b"}),
        ("kind=", {"kind": ""}),
        ("shape=[1, 2]", {"shape": [1, 2]}),
    ],
)
def test_a_setting_is_json_or_a_string(setting: str, expected: dict[str, Any]) -> None:
    parsed = parse_settings([setting])
    assert parsed == expected
    assert [type(value) for value in parsed.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("setting", ["size", "=64", ""])
def test_a_text_that_is_no_setting_is_refused(setting: str) -> None:
    with pytest.raises(OptionError, match=f"^{setting!r} is not a setting; expected key=value$"):
        parse_settings([setting])


def test_the_last_of_equal_settings_counts() -> None:
    assert parse_settings(["size=1", "kind=a", "size=2"]) == {"size": 2, "kind": "a"}
