"""Kills its guard, so that what it starts is not ended."""

import os
import signal


def act(places):
    os.kill(places.guard, signal.SIGKILL)
