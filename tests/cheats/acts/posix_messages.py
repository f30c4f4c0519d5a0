"""Leaves what it learned in a queue of POSIX."""

import ctypes
import os
import platform


def act(places):
    def number(x86, arm):
        return x86 if platform.machine() == "x86_64" else arm

    result = ctypes.CDLL(None, use_errno=True).syscall(number(240, 180), b"cheat", 0o102, 0o600, None)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
