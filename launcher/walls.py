"""
Who may touch what: the policies of the trainer and of the two processes that score.

The trainer writes its own folder, and gets its rows from the launcher. A scorer sees the weights that it is
handed and the rows that it is asked about. None of them reads other runs, the prepared rows, the ledger, the
corpus of held-out text, or the home folder.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import IO

from backends.protocol import RunSettings
from launcher import bytecode, compiled
from launcher.box import DEVICES, GPUS, SHARED_MEMORY, SYSTEM, Policy, parents
from launcher.processes import Guarded, start_guarded
from launcher.runs import home
from prepare import ROOT, Prepared, Track, cache_dir, config_path, held_out_files

SYSTEM_PACKAGES = (
    "/usr/lib/python3*/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
    "/usr/local/lib/python3*/site-packages",
    f"{sys.base_prefix}/lib/python3*/site-packages",
)
PREPARED = ("meta.json", "tokenizer.json", "token_bytes.npy")  # what a trainer may read of prepared data


def common_policy(trainer: Path, track: Track, data: Prepared) -> Policy:
    """Return what all of them may touch: the system, Python, the harness, the data's description."""
    python = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    read = [*SYSTEM, *python, *packages(), str(bytecode.folder()), *map(str, kernels())]
    files = [*ROOT.glob("*.py"), *(ROOT / "backends").glob("*.py"), config_path(), trainer]
    files += [data.path / name for name in PREPARED]
    names = [ROOT, data.path]
    readable = {os.path.realpath(path) for path in read}
    # Most of what is hidden, as a corpus of many files, lies nowhere below.
    below = [path for path in map(os.path.realpath, hidden(track, data)) if readable & {path, *parents(path)}]
    return Policy(
        read=tuple(read),
        write=tuple(devices()),
        hidden=tuple(below),
        files=tuple(map(str, files)),
        names=tuple(map(str, names)),
    )


def trainer_policy(common: Policy, folder: Path) -> Policy:
    """Return what a trainer may touch: it writes in `folder`, and compiled code."""
    more = (folder, compiled.folder(), SHARED_MEMORY)
    return replace(common, write=(*common.write, *map(str, more)))


def scorer_policy(common: Policy, folder: Path, compiles: bool) -> Policy:
    """Return what a process may touch that scores: `folder` holds the weights and its temporary files.

    Only one that compiles may write outside its folder: two that could would tell each other of the rows.
    """
    more = (folder, compiled.folder(), SHARED_MEMORY) if compiles else (folder,)
    return replace(common, write=(*common.write, *map(str, more)))


def start_boxed(
    policy: Policy,
    command: Sequence[str],
    settings: RunSettings,
    folder: Path,
    log: IO[bytes],
    descriptor: int,
    code: Path | None = None,
) -> Guarded:
    """Start a process that runs an experiment's code, behind a guard: see start_guarded.

    Args:
        policy: what it may touch.
        command: with its arguments.
        settings: what it is told.
        folder: its own, which is there.
        log: takes what it prints.
        descriptor: of its end of a socket; it inherits no other.
        code: where it keeps compiled code; None: where all runs do.
    """
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    (code or compiled.folder()).mkdir(parents=True, exist_ok=True)
    compiled.link_from(temporary, folder.name, code)
    environment = {
        **os.environ,
        **compiled.environment(code),
        **settings.to_env(),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPYCACHEPREFIX": str(bytecode.folder()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONOPTIMIZE": "",
        "PYTHONNOUSERSITE": "1",
        # A process that a boxed one starts may not name threads (see box.THREADS), and so cannot start CUDA.
        # PyTorch's own for compiling does, and what waits for it fails, or compiles one kernel after the
        # other. Forks need no CUDA of their own; they ask whether a GPU is there.
        "TORCHINDUCTOR_WORKER_START": "fork",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "HF_HUB_OFFLINE": "1",  # there is no network: what is not there is known at once
        "TMPDIR": str(temporary),
    }
    return start_guarded(
        policy.command(command), cwd=ROOT, env=environment, stdout=log, pass_fds=(descriptor,)
    )


def packages() -> Iterator[str]:
    """Yield the folders of the installed packages, and where links in them lead."""
    for folder in bytecode.package_folders():
        if folder.is_dir():
            yield str(folder)
            yield from (os.path.realpath(entry) for entry in os.scandir(folder) if entry.is_symlink())


def kernels() -> Iterator[Path]:
    """Yield the kernels and models that were downloaded from the hub; its datasets stay hidden."""
    yield from hub_cache().glob("models--*")


def hub_cache() -> Path:
    """Return the folder of the hub's downloads, as huggingface_hub finds it."""
    base = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(base) / "hub").expanduser()


def hidden(track: Track, data: Prepared) -> Iterator[Path]:
    """Yield what is out of reach although it may lie below something readable."""
    yield from (home() / "runs", home() / "results.tsv")
    yield from (ROOT / name for name in (".git", "runs", "results.tsv"))
    # Prepared data. The folder of compiled code of a device has a dash in its name too.
    yield from set(cache_dir().glob("*-*")) - {compiled.folder()}
    yield data.path
    yield from set(hub_cache().glob("*")) - set(kernels())
    for path in held_out_files(track):
        yield path
        if track.packages:  # bytecode has the strings of its source
            yield bytecode.bytecode_path(path)
            yield from path.parent.glob(f"__pycache__/{path.stem}.*")  # of a module that is a single file
        for folder in SYSTEM_PACKAGES:  # another copy, of the system's Python
            yield from (Path(found) for found in glob(f"{folder}/{path.name}"))


def devices() -> Iterator[str]:
    """Yield the device files: a source of random numbers, and GPUs."""
    yield from DEVICES
    for pattern in GPUS:
        yield from map(str, sorted(Path("/dev").glob(pattern)))
