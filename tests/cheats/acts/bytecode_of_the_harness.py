"""Puts bytecode beside the harness."""

from pathlib import Path

import backends.experiment


def act(places):
    folder = Path(backends.experiment.__file__).parent / "__pycache__"
    folder.mkdir(exist_ok=True)
    (folder / "cheat.pyc").write_bytes(b"code")
