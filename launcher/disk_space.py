"""What a run leaves free of its disks: the ledger and other programs need them too."""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from os import stat_result
from pathlib import Path

from launcher import compiled

RESERVE = 4 * 2**30  # bytes that stay free, or half of what was free when the run began
SHARE = 0.25  # of what vanished from the disk since then: a run that wrote less is not to blame


class DiskSpace:
    """The disks of a run, from its start. A file that is deleted while a process has it open is not seen."""

    def __init__(self, run: Path) -> None:
        """Note what is free. run: the folder of the run, which is there."""
        self._run = run
        self._began = time.time()
        compiled.folder().mkdir(parents=True, exist_ok=True)
        self._free = {folder: free_bytes(folder) for folder in (run, compiled.folder())}

    def filled(self) -> str:
        """Return what the run did to a disk that is nearly full, "" where there is space or others did it."""
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
        """Yield what is known of each file of the run, and of the compiled code that is new."""
        for path in {*compiled.paths_below(self._run), *compiled.changed_since(self._began)}:
            with suppress(OSError):  # gone meanwhile
                yield path.lstat()


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of a folder."""
    return shutil.disk_usage(folder).free


def readable(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
