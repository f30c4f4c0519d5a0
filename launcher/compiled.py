"""
The compiled code of earlier runs: one folder of this machine, which every run reuses, and which is bounded.

A dry run compiles an edit, and the run that follows finds its code here. The system's folder for temporary
files, where PyTorch would put it, is emptied by a reboot and grows without a bound.
"""

import os
from pathlib import Path

from prepare import cache_dir

MOST_BYTES = 8 * 2**30  # that the folder may hold: some hundred models, each of about 30 to 100 MB
TRIMMED_BYTES = 6 * 2**30  # that are left when it held more
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # Triton's cache lies below it too


def compiled_dir() -> Path:
    return cache_dir() / "compiled"


def environment() -> dict[str, str]:
    """Return the variables that tell a trainer's process where to keep compiled code. A user's own stays."""
    return {} if VARIABLE in os.environ else {VARIABLE: str(compiled_dir())}


def trim(most: int = MOST_BYTES, rest: int = TRIMMED_BYTES) -> int:
    """Remove the folders that were used longest ago where all hold too much. Returns the bytes removed.

    A folder goes whole: of a kernel of which a part is missing, Triton takes the rest for good. What is gone
    is compiled again. Files that another run removes meanwhile are passed over.
    """
    used: dict[Path, float] = {}
    sizes: dict[Path, int] = {}
    for path in compiled_dir().rglob("*"):
        try:
            stat = path.lstat()
        except OSError:
            continue
        if not path.is_dir():
            used[path.parent] = max(used.get(path.parent, 0.0), stat.st_atime, stat.st_mtime)
            sizes[path.parent] = sizes.get(path.parent, 0) + stat.st_size
    total = sum(sizes.values())
    if total <= most:
        return 0
    removed = 0
    for folder in sorted(used, key=used.__getitem__):
        if total - removed <= rest:
            break
        for path in folder.iterdir():
            if not path.is_dir():
                path.unlink(missing_ok=True)
        removed += sizes[folder]
    return removed
