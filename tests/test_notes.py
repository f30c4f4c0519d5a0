"""The notes that agents keep."""

from night import notes
from night.notes import notes_path, read_notes


def test_of_long_notes_the_end_is_shown(house, monkeypatch):
    assert read_notes() == ""
    notes_path().parent.mkdir()
    notes_path().write_text("width helps\n")
    assert read_notes() == "width helps"
    monkeypatch.setattr(notes, "NOTES_CHARS", 20)
    notes_path().write_bytes(b"old " * 99 + "\u00e4ltest\xff new".encode())
    text = read_notes()
    assert text.startswith("(the notes are too long") and text.endswith(" new")
    assert len(text.splitlines()[1]) == 20
