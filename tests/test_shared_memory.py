"""Shared memory after a run: what it left goes, what others use stays."""

import gc
import multiprocessing
import secrets
from pathlib import Path

import pytest

from launcher import shared_memory

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")


def test_what_a_run_left_goes_and_what_others_have_open_stays():
    name = f"autoresearch-test-{secrets.token_hex(4)}"
    old, left, used, folder = (
        Path("/dev/shm", f"{name}-{what}") for what in ("old", "left", "used", "folder")
    )
    old.write_text("before the run")
    try:
        before = shared_memory.files()
        left.write_text("a checkpoint")
        folder.mkdir()
        (folder / "file").write_text("another")
        with open(used, "w") as file:
            file.write("of a process that lives")
            file.flush()
            assert shared_memory.remove_new(before) == 3
            assert old.exists() and used.exists() and not left.exists() and not folder.exists()
        assert shared_memory.remove_new(before) == 1 and old.exists()
    finally:
        for path in (old, left, used):
            path.unlink(missing_ok=True)


def test_a_lock_of_another_program_stays():
    """Its name is not the one under which the C library made and mapped it."""
    before = shared_memory.files()
    lock = multiprocessing.get_context("spawn").Lock()
    [path] = shared_memory.files() - before
    assert shared_memory.remove_new(before) == 0 and path.exists()
    del lock
    gc.collect()
    assert not path.exists()
