"""What a run may write: its logs have a limit, and its disks keep space for the ledger and others."""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from os import stat_result
from pathlib import Path

from launcher import compiled

LONGEST_LOG = 2**28  # bytes that a trainer and its model may print and send
RESERVE = 4 * 2**30  # bytes that stay free, or half of what was free when the run began
SHARE = 0.25  # of what the disk lost since then: a run that wrote less is not to blame


class DiskSpace:
    """The disks that a run writes to. It knows what was free when the run began.

    A file that was deleted while a process has it open is not counted.
    """

    def __init__(self, run: Path) -> None:
        """Note what is free. run: the folder of the run, which is there."""
        self._run = run
        self._began = time.time()
        compiled.folder().mkdir(parents=True, exist_ok=True)
        self._free = {folder: free_bytes(folder) for folder in (run, compiled.folder())}

    def filled(self) -> str:
        """Return what a run is told that filled a disk, "" while there is space or where others did it."""
        for folder, before in self._free.items():
            free = free_bytes(folder)
            if free >= min(RESERVE, before // 2):
                continue
            disk = folder.stat().st_dev
            written = sum(512 * file.st_blocks for file in self._files() if file.st_dev == disk)
            if written >= SHARE * (before - free):
                return (
                    f"the run wrote {readable(written)}, and {readable(free)} are free on the disk: "
                    "write no checkpoints, exp.finish saves the weights"
                )
        return ""

    def _files(self) -> Iterator[stat_result]:
        """Yield the status of each file in the run's folder, and of the compiled code that is new."""
        for path in {*compiled.paths_below(self._run), *compiled.changed_since(self._began)}:
            with suppress(OSError):  # gone meanwhile
                yield path.lstat()


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of a folder."""
    return shutil.disk_usage(folder).free


def size_of(file: Path) -> int:
    """Return the size of a file in bytes, 0 where it cannot be seen."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def readable(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
