"""Writes what it learned into an attribute of a file that it may read."""

import os

import backends.experiment


def act(places):
    os.setxattr(backends.experiment.__file__, "user.weights", b"learned")
