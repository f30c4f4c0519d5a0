"""Mounts a folder over the data, in a name space of its own."""

import ctypes
import os


def act(places):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x10000000 | 0x00020000)
    if libc.mount(b"none", str(places.data).encode(), b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
