"""
Python's bytecode of the packages that a run imports, compiled before its first process needs it.

A boxed process cannot write beside the packages, and uv installs them without bytecode: each process of a run
would compile PyTorch's sources by itself, on one core, at every start. Here all cores compile them once, to a
folder that a boxed process only reads: no run leaves code there that another one executes.
"""

import hashlib
import os
import re
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock

from launcher.console import say
from launcher.processes import defer_signals, start_guarded
from prepare import ROOT, cache_dir

NAME = "bytecode"  # of the folder
# What trainers and compilers import, where it has many files. A process compiles the rest for itself.
PACKAGES = (
    "torch",
    "triton",
    "mlx",
    "numpy",
    "sympy",
    "mpmath",
    "networkx",
    "pydantic",
    "setuptools",
    "jinja2",
    "nvidia_cutlass_dsl",
    "cuda",
    "flash_attn",
    "quack",
)
NEVER_IMPORTED = ("test", "tests", "benchmarks", "idlelib", "lib2to3", "tkinter", "ensurepip")  # folders
INSTALLED = ("site-packages", "dist-packages")  # may lie below the standard library, and are no part of it


def folder() -> Path:
    """Return where the bytecode is kept."""
    return cache_dir() / NAME


def of(source: Path) -> Path:
    """Return where the bytecode is of a source file, or of a folder with such."""
    place = Path(f"{folder()}{source.absolute()}")
    return place if source.is_dir() else place.with_suffix(f".{sys.implementation.cache_tag}.pyc")


def compile_packages() -> None:
    """Compile what a run imports, where that was not done since it was installed. It takes some seconds.

    Without it, as on a full disk, all works: each process of a run compiles for itself.
    """
    standard = Path(sysconfig.get_path("stdlib"))
    packages = installed_packages()
    done = folder() / f"{fingerprint([standard, *packages])}.done"
    if done.exists():
        return
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with FileLock(folder() / "compile.lock"):
            if done.exists():  # another command did it meanwhile
                return
            say("compiling the packages that a run imports to Python's bytecode, once")
            for place in dict.fromkeys(package.parent for package in packages):
                compile_below(place, [path for path in packages if path.parent == place], NEVER_IMPORTED)
            compile_below(standard, [standard], NEVER_IMPORTED + INSTALLED)
            if all(of(path).exists() for path in packages):
                done.touch()


def installed_packages() -> list[Path]:
    """Return the folders of PACKAGES that are installed."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    paths = [Path(place, name) for place in dict.fromkeys(places) for name in PACKAGES]
    return [path for path in paths if path.is_dir()]


def fingerprint(sources: Sequence[Path]) -> str:
    """Return a name of these folders as they are installed: an update of a package changes its folder."""
    known = [(str(path), path.stat().st_mtime_ns) for path in sources]
    return hashlib.sha256(repr([sys.version, known]).encode()).hexdigest()[:12]


def compile_below(place: Path, sources: Sequence[Path], but_not: Sequence[str]) -> None:
    """Compile the sources in some folders on all cores. One that has a mistake gets no bytecode.

    Nothing of them is executed.

    Args:
        place: where the folders lie, or the only one.
        but_not: names of folders, anywhere below `place`, that are left out.
    """
    left_out = rf"^{re.escape(str(place))}/(.*/)?({'|'.join(map(re.escape, but_not))})/"
    options = ["-qq", "-f", "-j", "0", "-x", left_out]
    command = [sys.executable, "-P", "-m", "compileall", *options, *map(str, sources)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder())}
    with ExitStack() as stack:
        with defer_signals():
            child = start_guarded(command, ROOT, environment, stdout=subprocess.DEVNULL)
            stack.callback(child.end)
        child.wait()
