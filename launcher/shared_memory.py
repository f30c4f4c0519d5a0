"""
What a run leaves in shared memory, which outlives its processes.

PyTorch's compiler needs locks there, so a trainer may write in that folder. A file that was not there before
the run, that is ours, and that no living process has open, is removed: nothing in it reaches the next run.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from launcher.box import SHARED_MEMORY
from launcher.compiled import paths_below


def files() -> set[Path]:
    """Return what lies in shared memory now."""
    return set(paths_below(Path(SHARED_MEMORY)))


def remove_new(before: set[Path]) -> int:
    """Remove what was not there `before` and no process uses. Returns how many files and folders went."""
    new = sorted(files() - before, key=lambda path: len(path.parts), reverse=True)
    if not new:
        return 0
    used = set(inodes_in_use())
    removed = 0
    for path in new:
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid == os.getuid() and found.st_ino not in used:
                remove_unless_filled(path)
                removed += 1
    return removed


def remove_unless_filled(path: Path) -> None:
    """Remove a file, or a folder that is empty. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        os.chmod(path, 0o700)
        path.rmdir()
    else:
        path.unlink()


def inodes_in_use() -> Iterator[int]:
    """Yield the inodes of the files in shared memory that a process has open or mapped.

    Their names would not do: the C library makes a semaphore under another name than the one that it gets.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(link).startswith(SHARED_MEMORY):
                        yield link.stat().st_ino
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if SHARED_MEMORY in line:
                    yield int(line.split()[4])  # address, permissions, offset, device, inode, path
