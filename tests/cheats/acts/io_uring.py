"""Opens a ring, whose reads and connections no filter of calls sees."""

import ctypes


def act(places):
    places.call(425, 425, 1, ctypes.create_string_buffer(256))
