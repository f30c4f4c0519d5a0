"""Leaves what it learned in a message queue."""

import ctypes
import os
import platform


def act(places):
    def number(x86, arm):
        return x86 if platform.machine() == "x86_64" else arm

    result = ctypes.CDLL(None, use_errno=True).syscall(number(68, 186), 0x5EED, 0o1666)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
