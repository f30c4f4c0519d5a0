"""`autoresearch clean`: what weights, prepared data and compiled code take on the disk, and what can go."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from launcher import bytecode, compiled
from launcher.console import print_object
from launcher.ledger import missing_runs, warn
from launcher.runs import ledger, record_killed_runs, runs_dir, runs_to_keep
from prepare import cache_dir, load_tracks, prepared_path


class Item(NamedTuple):
    """Something on the disk that can be made again."""

    path: Path
    needed: bool
    num_bytes: int


def free_disk(apply: bool, as_json: bool = False) -> None:
    """Show what runs/ and the cache hold. apply: free what is not needed. as_json: print one object.

    Raises:
        UserError: as runs.record_killed_runs.
    """
    record_killed_runs()  # the ledger says what is needed: none of its rows may be lost
    items = [*saved_weights(), *prepared_data(), *compiled_code()]
    for item in items:
        state = "kept" if item.needed else "free"
        if not as_json:
            print(f"{state}  {item.num_bytes / 2**20:9.1f} MiB  {item.path}")
        if apply and not item.needed:
            if item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink()
    freed = sum(item.num_bytes for item in items if not item.needed)
    if as_json:
        listed = [{**item._asdict(), "path": str(item.path)} for item in items]
        print_object({"freed": apply, "bytes": freed, "items": listed})
        return
    done = "freed" if apply else "would free (--yes does it)"
    print(f"{done}: {freed / 2**20:.1f} MiB")


def saved_weights() -> Iterator[Item]:
    """Yield the weights of runs.

    Needed are those that runs keep, those that the user asked to keep, and those of a run under way.
    """
    kept = runs_to_keep(ledger().rows(warn)) | runs_under_way()
    for weights in sorted(runs_dir().glob("*/model.safetensors")):
        folder = weights.parent
        needed = folder.name in kept or (folder / "keep-weights").exists()
        yield Item(weights, needed, weights.stat().st_size)


def compiled_code() -> Iterator[Item]:
    """Yield the folders of compiled code, where there are any: the next run compiles what it needs.

    A run under way needs them.
    """
    needed = bool(runs_under_way()) or device_is_held()
    of_code = sorted(cache_dir().glob(f"{compiled.NAME}*"))
    of_earlier_versions = sorted(cache_dir().glob("bytecode*"))
    places = [compiled.folder(), *of_code, cache_dir() / bytecode.NAME, *of_earlier_versions]
    for folder in dict.fromkeys(places):
        if folder.is_dir():
            yield Item(folder, needed, folder_size(folder))


def runs_under_way() -> set[str]:
    """Return the runs without a row: those of a launcher that was killed have theirs by now."""
    return set(missing_runs(runs_dir(), ledger().rows()))


def device_is_held() -> bool:
    """Return whether a command computes on a device of this machine, a dry run too."""
    for path in (cache_dir() / "locks").glob("*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
    return False


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def prepared_data() -> Iterator[Item]:
    """Yield the folders of prepared data. Needed are those of the tracks of platforms.yaml."""
    current = {prepared_path(track) for track in load_tracks().values()}
    for folder in sorted(cache_dir().glob("*-????????????")):
        if (folder / "meta.json").is_file():
            yield Item(folder, folder in current, folder_size(folder))
