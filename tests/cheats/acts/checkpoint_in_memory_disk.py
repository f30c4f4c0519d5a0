"""Leaves a checkpoint in /run."""

from pathlib import Path


def act(places):
    Path("/run/checkpoint-of-a-cheat").write_bytes(b"weights")
