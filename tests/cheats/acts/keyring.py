"""Leaves what it learned among the user's keys."""

import ctypes
import os
import platform


def act(places):
    def number(x86, arm):
        return x86 if platform.machine() == "x86_64" else arm

    result = ctypes.CDLL(None, use_errno=True).syscall(number(248, 217), b"user", b"cheat", b"learned", 7, -4)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
