"""Leaves a checkpoint in the current folder."""

from pathlib import Path


def act(places):
    Path("checkpoint-of-a-cheat").write_bytes(b"weights")
