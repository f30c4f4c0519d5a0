"""
Python's bytecode of the installed packages, written beside their sources before the first run.

A boxed process cannot write there: it would compile PyTorch's sources at each start, for 7 s. pip writes
this bytecode when it installs a package, uv where it is told to. Nothing of an experiment is run for it.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path

from launcher.console import say

# Of PyTorch, MLX and what they import to compile a model, those with many files.
PACKAGES = ("torch", "sympy", "mpmath", "networkx", "numpy", "triton", "mlx", "nvidia_cutlass_dsl", "quack")
NEVER_IMPORTED = r"[/\\](tests?|idlelib|lib2to3|benchmarks)[/\\]"


@cache
def write_bytecode() -> None:
    """Write the bytecode that a run needs, where it is missing and its folder can be written to."""
    installed = Path(sysconfig.get_path("purelib"))
    packages = lacking(installed / name for name in PACKAGES)
    standard = lacking([Path(sysconfig.get_path("stdlib"))])
    if packages or standard:
        say("Python compiles its packages for the first run")
    compile_folders(packages, NEVER_IMPORTED)
    compile_folders(standard, f"{NEVER_IMPORTED}|site-packages|dist-packages")


def lacking(folders: Iterable[Path]) -> list[Path]:
    """Return the folders of packages that can be written to and have no bytecode of the first."""
    found = []
    for folder in folders:
        packages = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}__init__.py")]
        if packages and os.access(folder, os.W_OK) and not os.path.exists(cache_from_source(packages[0])):
            found.append(folder)
    return found


def compile_folders(folders: list[Path], but_not: str) -> None:
    """Compile the sources in some folders, with all cores. A source with a mistake has no bytecode.

    but_not: a regular expression, for paths that are left out.
    """
    if folders:
        options = ["-qq", "-j", "0", "-x", but_not]
        command = [sys.executable, "-I", "-m", "compileall", *options, *map(str, folders)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
