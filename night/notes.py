"""The notes that agents keep from turn to turn: the one file beside the trainer that outlives a turn."""

import os
from pathlib import Path

from launcher.runs import runs_dir

NOTES = "runs/notes.md"  # where an agent finds them, from the folder that it works in
NOTES_CHARS = 6000  # of the notes that are shown


def notes_path() -> Path:
    """Return the file of the notes. It is not in git."""
    return runs_dir() / "notes.md"


def read_notes() -> str:
    """Return the notes; of long ones the end, and a line that says so."""
    try:
        with open(notes_path(), "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 4 * NOTES_CHARS))  # a character has at most four bytes
            text = f.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
    if len(text) <= NOTES_CHARS and size <= 4 * NOTES_CHARS:
        return text
    return f"(the notes are too long: this is their end; shorten them)\n{text[-NOTES_CHARS:]}"
