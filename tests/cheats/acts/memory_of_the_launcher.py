"""Reads the launcher's memory by a call."""

import ctypes
import os
import platform


def act(places):
    def number(x86, arm):
        return x86 if platform.machine() == "x86_64" else arm

    result = ctypes.CDLL(None, use_errno=True).syscall(number(310, 270), os.getppid(), ctypes.create_string_buffer(64), 1, ctypes.create_string_buffer(64), 1, 0)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
