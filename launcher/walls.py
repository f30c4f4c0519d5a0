"""
Who may touch what: the policies of the three kinds of processes that run an experiment's code.

The trainer writes its own folder, and gets its rows from the launcher. A scorer sees the weights that it is
handed and the rows that it is asked about. None of them reads other runs, the prepared rows, the ledger, the
corpus of held-out text, or the home folder.
"""

import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from backends.protocol import RunDir
from launcher import compiled
from launcher.box import DEVICES, GPUS, SHARED_MEMORY, SYSTEM, Policy
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


def trainer_policy(run: RunDir, trainer: Path, track: Track, data: Prepared) -> Policy:
    """Return what a trainer may touch."""
    write = (str(run.box), str(compiled.folder()), str(compiled.bytecode_folder()), SHARED_MEMORY, *devices())
    return policy_of(trainer, track, data, write)


def scorer_policy(trainer: Path, folder: Path, compiles: bool, track: Track, data: Prepared) -> Policy:
    """Return what a process may touch that scores: `folder` holds the weights and its temporary files.

    Only one that compiles may write outside its folder: two that could would tell each other of the rows.
    """
    write = (str(folder), *devices())
    if compiles:
        write += (str(compiled.folder()), SHARED_MEMORY)
    return policy_of(trainer, track, data, write)


def policy_of(trainer: Path, track: Track, data: Prepared, write: tuple[str, ...]) -> Policy:
    """Return a policy with what all of them read: the system, Python, the harness, the data's description."""
    python = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    read = [*SYSTEM, *python, *packages(), str(compiled.bytecode_folder()), *map(str, kernels())]
    files = [*ROOT.glob("*.py"), *(ROOT / "backends").glob("*.py"), config_path(), trainer]
    files += [data.path / name for name in PREPARED]
    names = [ROOT, data.path]
    readable = {os.path.realpath(path) for path in read}
    # Most of what is hidden, as a corpus of many files, lies nowhere below.
    below = [path for path in map(os.path.realpath, hidden(track, data)) if readable & {path, *parents(path)}]
    return Policy(
        read=tuple(read),
        write=write,
        hidden=tuple(below),
        files=tuple(map(str, files)),
        names=tuple(map(str, names)),
    )


def parents(path: str) -> list[str]:
    """Return the folders that a path lies in."""
    return [str(parent) for parent in Path(path).parents]


def packages() -> Iterator[str]:
    """Yield the folders of the installed packages, and where links in them lead."""
    for folder in {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        if os.path.isdir(folder):
            yield folder
            yield from (os.path.realpath(entry) for entry in os.scandir(folder) if entry.is_symlink())


def kernels() -> Iterator[Path]:
    """Yield the kernels and models that were downloaded from the hub; its datasets are no one's to read."""
    yield from hub_cache().glob("models--*")


def hub_cache() -> Path:
    """Return the folder of the hub's downloads, as huggingface_hub finds it."""
    base = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(base) / "hub").expanduser()


def hidden(track: Track, data: Prepared) -> Iterator[Path]:
    """Yield what is out of reach although it may lie below something readable."""
    yield from (home() / "runs", home() / "results.tsv")
    yield from (ROOT / name for name in (".git", "runs", "results.tsv"))
    yield from cache_dir().glob("*-*")  # prepared data
    yield data.path
    yield from set(hub_cache().glob("*")) - set(kernels())
    for path in held_out_files(track):
        yield path
        for folder in SYSTEM_PACKAGES:  # another copy, of the system's Python
            yield from (Path(found) for found in glob(f"{folder}/{path.name}"))


def devices() -> Iterator[str]:
    """Yield the device files: a source of random numbers, and GPUs."""
    yield from DEVICES
    for pattern in GPUS:
        yield from map(str, sorted(Path("/dev").glob(pattern)))
