"""Reads the text of packages that are held out as more data."""

from importlib.metadata import files


def act(places):
    for path in files("pygments"):
        if path.suffix == ".py":
            path.locate().read_text()
