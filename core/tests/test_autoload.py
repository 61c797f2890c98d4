"""`modq._autoload`: what `import torch` installs, mostly tried on throw-away modules."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest

from modq import _autoload

FIRST_LINES = [
    "import torch",
    "import transformers.quantizers.auto",  # imports torch half-way through
    "from peft import LoraConfig",  # so does peft, and the other module besides
]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path where `awaited` is followed by `follow_up`, with nothing installed yet."""
    monkeypatch.setattr(_autoload, "FOLLOW_UPS", {"awaited": "follow_up"})
    monkeypatch.delenv("MODQ_AUTOLOAD", raising=False)
    others = [finder for finder in sys.meta_path if not isinstance(finder, _autoload._Finder)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.syspath_prepend(tmp_path)
    _autoload._warn_once.cache_clear()
    write(tmp_path, "events", "seen = []")
    write(tmp_path, "awaited", "import events; events.seen.append('awaited')")
    write(tmp_path, "follow_up", "import awaited, events; events.seen.append('follow_up')")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, module: str, code: str) -> None:
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    importlib.invalidate_caches()


def seen() -> list[str]:
    return list(importlib.import_module("events").seen)


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300)


def test_torch_is_told_to_call_install() -> None:
    (point,) = entry_points(group="torch.backends", name="modq")
    assert point.load() is _autoload.install


def test_the_follow_up_waits_for_its_module(sources: Path) -> None:
    _autoload.install()
    assert "follow_up" not in sys.modules
    importlib.import_module("awaited")
    assert seen() == ["awaited", "follow_up"]


def test_a_module_that_is_already_imported_is_followed_at_once(sources: Path) -> None:
    importlib.import_module("awaited")
    _autoload.install()
    assert seen() == ["awaited", "follow_up"]


def test_a_module_in_the_midst_of_its_import_is_followed_when_it_is_done(sources: Path) -> None:
    code = "import modq._autoload, events; modq._autoload.install(); events.seen.append('awaited')"
    write(sources, "awaited", code)
    module = importlib.import_module("awaited")
    assert seen() == ["awaited", "follow_up"]
    assert type(module.__spec__) is ModuleSpec


@pytest.mark.parametrize("prelude", ["", "import modq._autoload; modq._autoload.install()\n"])
def test_a_module_that_fails_keeps_its_own_error(sources: Path, prelude: str) -> None:
    write(sources, "awaited", f"{prelude}1 / 0")
    write(sources, "follow_up", "")
    if not prelude:
        _autoload.install()
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("awaited")
    assert "follow_up" not in sys.modules


def test_a_module_that_is_not_there_stays_an_ordinary_import_error(sources: Path) -> None:
    (sources / "awaited.py").unlink()
    _autoload.install()
    with pytest.raises(ModuleNotFoundError, match="No module named 'awaited'"):
        importlib.import_module("awaited")


def test_install_twice_is_install_once(sources: Path) -> None:
    _autoload.install()
    _autoload.install()
    importlib.import_module("awaited")
    _autoload.install()
    assert seen() == ["awaited", "follow_up"]
    assert sum(isinstance(finder, _autoload._Finder) for finder in sys.meta_path) == 1


def test_the_switch_turns_it_off(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODQ_AUTOLOAD", "0")
    _autoload.install()
    importlib.import_module("awaited")
    assert seen() == ["awaited"]


def test_a_failing_follow_up_warns_once_and_leaves_the_module_importable(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(sources, "follow_up", "raise RuntimeError('two\\nlines')")
    write(sources, "other", "")
    monkeypatch.setattr(_autoload, "FOLLOW_UPS", {"awaited": "follow_up", "other": "follow_up"})
    _autoload.install()
    with pytest.warns(RuntimeWarning, match="RuntimeError: two lines; MODQ_AUTOLOAD=0"):
        importlib.import_module("awaited")
    importlib.import_module("other")
    assert capsys.readouterr().err == ""  # where a second warning would be, for here warnings are errors


def test_a_failing_follow_up_raises_nothing_even_where_warnings_are_errors(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(sources, "follow_up", "raise RuntimeError('reason')")
    _autoload.install()
    importlib.import_module("awaited")  # pytest's filterwarnings is "error"
    assert "RuntimeError: reason" in capsys.readouterr().err


def test_an_imported_module_has_its_own_loader_back(sources: Path) -> None:
    _autoload.install()
    module = importlib.import_module("awaited")
    assert module.__spec__ is not None
    assert type(module.__spec__.loader) is SourceFileLoader
    assert module.__loader__ is module.__spec__.loader
    assert "events.seen" in inspect.getsource(module)
    assert pickle.loads(pickle.dumps(module.__spec__)) == module.__spec__


def test_a_found_module_answers_as_with_its_own_loader(sources: Path) -> None:
    (sources / "awaited.py").rename(sources / "code.txt")
    (sources / "awaited").mkdir()
    (sources / "code.txt").rename(sources / "awaited" / "__init__.py")
    (sources / "awaited" / "data.txt").write_text("data", encoding="utf-8")
    _autoload.install()
    spec = importlib.util.find_spec("awaited")
    assert spec is not None
    for copy in (spec, pickle.loads(pickle.dumps(spec))):
        assert copy.loader.is_package("awaited")
        assert "events.seen" in copy.loader.get_source("awaited")
        assert copy.loader.get_code("awaited").co_filename == spec.origin
        with copy.loader.get_resource_reader("awaited").open_resource("data.txt") as data:
            assert data.read() == b"data"
        assert not hasattr(copy.loader, "no_such_thing")
    module = importlib.util.module_from_spec(spec)
    assert files(module).joinpath("data.txt").read_text(encoding="utf-8") == "data"


def test_installing_imports_nothing_heavy() -> None:
    code = "import sys, modq._autoload as a; a.install(); print({m.split('.')[0] for m in sys.modules})"
    loaded = run(code).stdout
    assert "'modq'" in loaded
    for name in ("torch", "transformers", "peft", "pluggy", "numpy"):
        assert f"'{name}'" not in loaded


@pytest.mark.parametrize("first", FIRST_LINES)
def test_transformers_and_peft_know_modq_whatever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import sys
assert ("modq.hf" in sys.modules) == ("transformers.quantizers.auto" in sys.modules)
assert ("modq.hf.peft" in sys.modules) == ("peft" in sys.modules)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "modq" in AUTO_QUANTIZER_MAPPING
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "will not know modq" not in done.stderr


def test_transformers_survives_a_modq_that_does_not_import() -> None:
    code = """
import modq._autoload as autoload
autoload.FOLLOW_UPS["transformers.quantizers.auto"] = "modq.no_such_module"
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "modq" not in AUTO_QUANTIZER_MAPPING
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "No module named 'modq.no_such_module'; MODQ_AUTOLOAD=0 turns the attempt off" in done.stderr
