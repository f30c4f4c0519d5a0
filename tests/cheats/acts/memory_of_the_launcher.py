"""Reads the launcher's memory by a call."""

import ctypes


def act(places):
    buffer = ctypes.create_string_buffer(64)
    places.call(310, 270, places.launcher, buffer, 1, buffer, 1, 0)
