"""Reads the launcher's memory by a call."""

import ctypes
import os


def act(places):
    buffer = ctypes.create_string_buffer(64)
    places.call(310, 270, os.getppid(), buffer, 1, buffer, 1, 0)
