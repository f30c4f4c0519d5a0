"""
Python's bytecode of the packages that a run imports, compiled before its first process needs it.

A boxed process cannot write beside the packages, and uv installs them without bytecode: each process of a run
would compile PyTorch's sources by itself, on one core, at every start. Here all cores compile them once, to a
folder that a boxed process only reads: no run leaves code there that another one executes.
"""

import hashlib
import marshal
import os
import re
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock

from launcher.console import say
from launcher.device import acquire
from launcher.processes import defer_signals, remove_tree, start_guarded
from prepare import ROOT, cache_dir

NAME = "pycache"  # of the folder; not "bytecode": trainers of earlier versions could write there
# Packages with many files that trainers and compilers import. Each process compiles the others itself.
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
LONGEST = 600  # seconds that a compiler may take
MOST_MISTAKES = 0.01  # share of the sources that may have a mistake, and so no bytecode
HEADER = 16  # bytes of a file of bytecode, before the code


def folder() -> Path:
    """Return where the bytecode is of the packages as they are installed now. It is complete, or not there.

    Each set of versions has its own: installers keep a version in the name of a folder beside the package.
    """
    installed = sorted(str(path) for place in package_folders() for path in place.glob("*.dist-info"))
    known = [sys.version, str(standard_library()), installed]
    return cache_dir().absolute() / NAME / hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def bytecode_path(source: Path, below: Path | None = None) -> Path:
    """Return where the bytecode is of a source file, or of a folder with such.

    below: the folder of all bytecode, folder() if None
    """
    place = Path(f"{below or folder()}{source.absolute()}")
    return place.with_suffix(f".{sys.implementation.cache_tag}.pyc") if source.suffix == ".py" else place


def compile_packages() -> None:
    """Compile what a run imports, unless it is compiled already. It takes some seconds.

    If that fails, for example on a full disk, runs still work but start more slowly.
    """
    place = folder()
    if place.is_dir():
        return
    try:
        locks = cache_dir() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{NAME}.lock")
        acquire(lock, lambda: "another command compiles Python's bytecode")
        try:
            if not place.is_dir():  # the other command may have made it
                compile_to(place)
        finally:
            lock.release()
    except OSError as error:
        say(f"each process of the run compiles Python's bytecode for itself: {error}")


def compile_to(place: Path) -> None:
    """Compile the packages and the standard library to a new folder.

    Raises:
        OSError: they cannot be compiled.
    """
    say("compiling the packages that a run imports to Python's bytecode, once")
    new = place.with_suffix(".new")
    remove_tree(new)  # of a command that was killed
    new.mkdir(parents=True)
    try:
        for parent in package_folders():
            packages = [parent / name for name in PACKAGES if (parent / name).is_dir()]
            if packages:
                compile_below(parent, packages, NEVER_IMPORTED, new)
        compile_below(standard_library(), [standard_library()], NEVER_IMPORTED + INSTALLED, new)
        new.rename(place)
    finally:
        remove_tree(new)


def compile_below(place: Path, folders: Sequence[Path], excluded: Sequence[str], new: Path) -> None:
    """Compile the sources in some folders on all cores. Nothing of them is executed.

    Args:
        place: their parent folder, or the folder itself if it is the only one.
        excluded: names of folders, anywhere below `place`, that are left out.
        new: where the bytecode goes.

    Raises:
        OSError: the compiler failed, or what it wrote is not whole.
    """
    pattern = rf"^{re.escape(str(place))}/(.*/)?({'|'.join(map(re.escape, excluded))})/"
    options = ["-qq", "-j", "0", "-x", pattern]
    command = [sys.executable, "-P", "-W", "ignore", "-m", "compileall", *options, *map(str, folders)]
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(new),
        "PYTHONDONTWRITEBYTECODE": "1",  # none of its own imports; it writes what it is told to compile
        "PYTHONOPTIMIZE": "",
    }
    with tempfile.TemporaryFile() as log, ExitStack() as stack:
        with defer_signals():
            child = start_guarded(command, ROOT, environment, stdout=log)
            stack.callback(child.end)
        try:
            code = child.wait(LONGEST)
        except subprocess.TimeoutExpired:
            raise ChildProcessError(f"it takes longer than {LONGEST} s") from None
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if code not in (0, 1) or said:  # 1: a source has a syntax error; -qq does not print it
        last = said.rpartition("\n")[2]
        raise ChildProcessError(f"exit code {code} {last}")
    check(list(sources_below(place, folders, excluded)), new)


def check(sources: Sequence[Path], new: Path) -> None:
    """Make sure that sources have bytecode, and that no file was cut off because the disk was full.

    Raises:
        OSError: something is missing.
    """
    missing = 0
    for source in sources:
        path = bytecode_path(source, new)
        if path.exists():
            try:
                marshal.loads(path.read_bytes()[HEADER:])
            except (EOFError, ValueError, TypeError):
                raise OSError(f"{path} is cut off") from None
        else:
            missing += 1
    if missing > MOST_MISTAKES * len(sources):
        raise OSError(f"{missing} of {len(sources)} modules were not compiled; the disk may be full")


def sources_below(place: Path, folders: Sequence[Path], excluded: Sequence[str]) -> Iterator[Path]:
    """Yield the sources that compile_below compiles."""
    for path in folders:
        for above, names, files in os.walk(path):
            names[:] = [name for name in names if name not in excluded]
            yield from (Path(above, file) for file in files if file.endswith(".py"))


def standard_library() -> Path:
    """Return the folder of Python's own modules."""
    return Path(sysconfig.get_path("stdlib"))


def package_folders() -> list[Path]:
    """Return the folders that packages are installed in."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return [Path(place) for place in dict.fromkeys(places)]
