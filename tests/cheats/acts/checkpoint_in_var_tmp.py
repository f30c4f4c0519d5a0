"""Leaves a checkpoint in /var/tmp."""

from pathlib import Path


def act(places):
    Path("/var/tmp/checkpoint-of-a-cheat").write_bytes(b"weights")
