"""Kills the launcher."""

import os
import signal


def act(places):
    os.kill(places.launcher, signal.SIGKILL)
