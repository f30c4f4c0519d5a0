"""The bytecode of packages is beside their sources when a boxed process starts, which cannot write there."""

import os
import subprocess
import sys
from importlib.util import cache_from_source

import pytest

from launcher import bytecode
from launcher.bytecode import compile_folders, lacking


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a part, a source with a mistake, and a test."""
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    sources = {"__init__": "", "part/__init__": "X = 1", "part/wrong": "def", "tests/__init__": ""}
    for name, text in sources.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "package"


def has_bytecode(package, name):
    return os.path.exists(cache_from_source(str(package / f"{name}.py")))


def test_a_package_is_compiled_once_whatever_is_wrong_in_it(package):
    assert lacking([package, package.parent / "not-installed"]) == [package]
    compile_folders([package], "none")
    assert has_bytecode(package, "__init__") and has_bytecode(package, "part/__init__")
    assert not has_bytecode(package, "part/wrong")
    assert lacking([package]) == []


def test_tests_are_left_out(package):
    compile_folders([package], bytecode.NEVER_IMPORTED)
    assert has_bytecode(package, "part/__init__") and not has_bytecode(package, "tests/__init__")


def test_what_cannot_be_written_is_left(package, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert lacking([package]) == []


def test_a_run_after_the_first_compiles_nothing(package, monkeypatch):
    monkeypatch.setattr(bytecode, "PACKAGES", ["package"])
    monkeypatch.setattr(bytecode.sysconfig, "get_path", lambda name: str(package.parent))
    bytecode.write_bytecode.cache_clear()
    bytecode.write_bytecode()
    assert has_bytecode(package, "part/__init__")
    bytecode.write_bytecode.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("compiled again"))
    bytecode.write_bytecode()
    bytecode.write_bytecode.cache_clear()
