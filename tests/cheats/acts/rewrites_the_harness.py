"""Rewrites the clock."""

from pathlib import Path

import backends.experiment


def act(places):
    Path(backends.experiment.__file__).write_text("")
