"""Moves a file out of its own folder."""

import os


def act(places):
    path = places.box / "checkpoint"
    path.write_bytes(b"weights")
    os.rename(path, places.runs / "checkpoint")
