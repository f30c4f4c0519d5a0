"""Kills the launcher."""

import os
import signal


def act(places):
    os.kill(os.getppid(), signal.SIGKILL)
