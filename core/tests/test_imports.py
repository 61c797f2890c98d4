"""What `import modq` costs and offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import modq


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_modq_loads_nothing_but_itself_and_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
import modq
assert modq.__version__
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = set(run(code).split())
    assert loaded - sys.stdlib_module_names == {"modq"}


def test_errors_and_version_need_nothing_more() -> None:
    code = "import sys, modq; modq.errors.ModqError; modq.__version__; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


@pytest.mark.parametrize("name", modq.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(modq, name) is not None
    assert name in dir(modq)


def test_every_lazy_name_is_public() -> None:
    assert sorted([*modq._HOME, *modq._SUBMODULES]) == sorted(modq.__all__)


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'modq' has no attribute 'quantise'"):
        modq.quantise  # noqa: B018  # the access is the test


def test_what_every_session_of_pytest_loads_of_modq_is_next_to_nothing() -> None:
    code = "import sys, modq.testing.pytest_plugin; print(*{'torch', 'pytest'} & set(sys.modules))"
    assert run(code).split() == []
