"""Attaches to the launcher as a debugger."""

import os


def act(places):
    places.call(101, 117, 16, os.getppid(), 0, 0)
