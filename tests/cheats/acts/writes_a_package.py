"""Puts a start-up file among the packages, which every later Python would run."""

import sysconfig
from pathlib import Path


def act(places):
    Path(sysconfig.get_path("purelib"), "cheat.pth").write_text("import os")
