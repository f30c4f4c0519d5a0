"""Leaves a checkpoint in /tmp."""

from pathlib import Path


def act(places):
    Path("/tmp/checkpoint-of-a-cheat").write_bytes(b"weights")
