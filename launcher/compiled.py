"""
The compiled code of earlier runs: a folder for each device, which its next run reuses, and which is bounded.

A dry run compiles an edit, and the run that follows finds its code here. The system's folder for temporary
files, where PyTorch would put it, is emptied by a reboot and grows without a bound. What a run writes here
after it has seen training rows is forgotten: nothing that was learned reaches the next run. Devices do not
share the folder: a run on one would forget what a run on another has just compiled, or read what that one
wrote after it had seen training rows.
"""

import getpass
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

from launcher.device import cores_if_some
from launcher.processes import remove_tree
from prepare import cache_dir

MOST_BYTES = 8 * 2**30  # that the folder may hold: some hundred models, each of about 30 to 100 MB
TRIMMED_BYTES = 6 * 2**30  # that are left when it held more
CLOCK_TICK = 0.02  # seconds by which the time of a change may lie behind the clock
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # what torch.compile makes, its Triton kernels too
NAME = "compiled"  # of the folder, with the part of the machine behind it
LONGEST_NAME = 60  # of a part, in characters
TRITON_GROUP = "__grp__"  # begins the name of such a list
KERNELS = "kernels"  # below that folder: what the trainer's own kernels are compiled to


def folder() -> Path:
    """Return where compiled code is kept: the user's own place, or ours. Each part of a machine has one."""
    return Path(f"{os.environ.get(VARIABLE) or cache_dir() / NAME}{part_of_machine()}")


def part_of_machine() -> str:
    """Return a name of the devices that a run may use, "" where they are all of the machine's."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cores = cores_if_some()
    parts = [gpus] if gpus else []
    if cores:
        parts.append("cpu" + "-".join(map(str, cores)))
    return "".join(f"-{shortened(re.sub(r'[^A-Za-z0-9-]', '-', part))}" for part in parts)


def shortened(name: str) -> str:
    """Return a name, or a shorter one in its place, which no other name has."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def environment(place: Path | None = None) -> dict[str, str]:
    """Return the variables that tell a process where to keep compiled code: in `place`, folder() if None."""
    place = place or folder()
    kernels = place / KERNELS
    return {
        VARIABLE: str(place),
        # Each library of kernels for a GPU has a place of its own, below the home folder or in the temporary
        # one, where a boxed process cannot write or what it wrote is soon gone.
        "TRITON_HOME": str(kernels),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(kernels / "flash4"),
        "QUACK_CACHE_DIR": str(kernels / "quack"),
        "CUTE_DSL_CACHE_DIR": str(kernels / "cute"),
        "CUDA_CACHE_PATH": str(kernels / "cuda"),
    }


def copy_kernels(place: Path) -> None:
    """Copy the GPU kernels of earlier runs to `place`, for a process that may not write to folder()."""
    with suppress(OSError, shutil.Error):  # another run removes some: they are compiled again
        shutil.copytree(folder() / KERNELS, place / KERNELS, dirs_exist_ok=True)
    # Triton keeps with each kernel a list of its files, by their whole paths.
    for path in (place / KERNELS).rglob(f"{TRITON_GROUP}*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            files = json.loads(path.read_text())["child_paths"]
            moved = {name: str(path.parent / Path(file).name) for name, file in files.items()}
            path.write_text(json.dumps({"child_paths": moved}))


def link_from(temporary: Path, process: str, place: Path | None = None) -> None:
    """Let the frameworks' own places in a folder for temporary files be in `place`, folder() if None.

    PyTorch keeps the precompiled header of its C++ kernels there, whatever VARIABLE says, and MLX all that it
    compiles for a CPU. A run's folder for temporary files goes with the run: each process would make it anew,
    which takes a core 13 to 20 s with PyTorch, and with MLX half a second for each kernel.

    process: its name in the run. No two of a run share a place: MLX would load a kernel that the other one is
        still writing.
    """
    place = place or folder()
    of_mlx = place / "mlx" / process
    with suppress(OSError):  # without it all works, more slowly
        of_mlx.mkdir(parents=True, exist_ok=True)
        (temporary / f"torchinductor_{user_name()}").symlink_to(place, target_is_directory=True)
        (temporary / "mlx").symlink_to(of_mlx, target_is_directory=True)


def user_name() -> str:
    """Return the user as PyTorch names that place (torch/_inductor/runtime/cache_dir_utils.py)."""
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):
        name = f"uid_{os.getuid()}"
    return re.sub(r'[\\/:*?"<>|]', "_", name)


def changed_since(moment: float, place: Path | None = None) -> dict[Path, bool]:
    """Return what was written here after `moment`, seconds of the wall clock: {path: whether it is a folder}.

    place: of the compiled code, folder() if None

    A file's time of its last change is the kernel's: unlike the others, a process cannot set it.
    """
    changed = {}
    for path in paths_below(place or folder()):
        with suppress(OSError):  # another run removed it
            status = path.lstat()
            if status.st_ctime > moment - CLOCK_TICK:
                changed[path] = S_ISDIR(status.st_mode)
    return changed


def write_back(moment: float) -> None:
    """Write to the disk what was written here after `moment`, seconds of the wall clock.

    Only then does another write through a map of such a file change its time again.
    """
    for path in changed_since(moment):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())


def remove_since(moment: float, place: Path | None = None) -> int:
    """Remove what was written here after `moment`, seconds of the wall clock. Returns how much went.

    place: of the compiled code, folder() if None

    The files beside one that changed go with it, as in trim. A folder that changed although nothing in it did
    was renamed, and its name may say something: it goes whole.
    """
    changed = changed_since(moment, place)
    with_changes = {path.parent for path in changed}
    renamed = [path for path, is_folder in changed.items() if is_folder and path not in with_changes]
    for path in renamed:
        remove_tree(path)
    removed = len(renamed)
    holders = {path.parent for path, is_folder in changed.items() if not is_folder}
    for holder in holders:
        for path in files_in(holder):
            remove_tree(path)
            removed += 1
    folders = holders | {path for path, is_folder in changed.items() if is_folder}
    folders -= {place or folder()}
    for path in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty
            path.rmdir()
    return removed


def paths_below(place: Path) -> Iterator[Path]:
    """Yield all that a folder holds, deep down. What goes away meanwhile is passed over."""
    for above, folders, names in os.walk(place):
        for name in (*folders, *names):
            yield Path(above, name)


def files_in(place: Path) -> list[Path]:
    """Return what lies directly in a folder and is no folder itself."""
    try:
        return [path for path in place.iterdir() if path.is_symlink() or not path.is_dir()]
    except OSError:
        return []


def trim(most: int = MOST_BYTES, rest: int = TRIMMED_BYTES) -> int:
    """Remove the folders that were used longest ago where all hold too much. Returns the bytes removed.

    A folder goes whole: of a kernel of which a part is missing, Triton takes the rest for good. What is gone
    is compiled again. Files that another run removes meanwhile are passed over.
    """
    used: dict[Path, float] = {}
    sizes: dict[Path, int] = {}
    for path in paths_below(folder()):
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
    for place in sorted(used, key=used.__getitem__):
        if total - removed <= rest:
            break
        for path in files_in(place):
            path.unlink(missing_ok=True)
        removed += sizes[place]
    return removed
