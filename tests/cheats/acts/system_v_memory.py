"""Leaves a checkpoint in a System V segment, which no process owns."""

import ctypes
import os
import platform


def act(places):
    def number(x86, arm):
        return x86 if platform.machine() == "x86_64" else arm

    result = ctypes.CDLL(None, use_errno=True).syscall(number(29, 194), 0x5EED, 4096, 0o1666)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
