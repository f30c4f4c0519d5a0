"""What a run leaves free of the disks that it writes to: the ledger and other programs need them too."""

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from launcher import compiled

RESERVE = 4 * 2**30  # bytes that stay free, or half of what was free when the run began


class DiskSpace:
    """The disks of a run, from its start."""

    def __init__(self, box: Path) -> None:
        """Note what is free. box: the run's own folder, which is there."""
        self._box = box
        self._began = time.time()
        compiled.folder().mkdir(parents=True, exist_ok=True)
        self._free = {folder: free_bytes(folder) for folder in (box, compiled.folder())}

    def filled(self) -> str:
        """Return what the run has done to a disk that is nearly full, "" while there is space.

        Raises:
            OSError: ENOSPC, when most of it was written by others.
        """
        for folder, before in self._free.items():
            free = free_bytes(folder)
            if free >= min(RESERVE, before // 2):
                continue
            written = self._written()
            if 2 * written < before - free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            return (
                f"the trainer wrote {written / 1e9:.1f} GB, and left {free / 1e9:.1f} GB free on the disk: "
                "write no checkpoints, exp.finish saves the weights"
            )
        return ""

    def _written(self) -> int:
        """Return the bytes on disk in the run's folder, and of the compiled code that is new."""
        total = 0
        for path in (*compiled.paths_below(self._box), *compiled.changed_since(self._began)):
            with suppress(OSError):  # gone meanwhile
                total += 512 * path.lstat().st_blocks
        return total


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of a folder."""
    return shutil.disk_usage(folder).free
