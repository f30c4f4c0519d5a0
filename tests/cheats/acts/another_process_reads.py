"""Lets a child read what it cannot."""

import subprocess


def act(places):
    done = subprocess.run(["cat", places.ledger], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr)
