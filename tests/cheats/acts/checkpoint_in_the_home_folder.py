"""Leaves a checkpoint in the home folder."""

from pathlib import Path


def act(places):
    (Path.home() / ".checkpoint-of-a-cheat").write_bytes(b"weights")
