"""Stops its guard, so that it ends nothing."""

import os
import signal


def act(places):
    os.kill(places.guard, signal.SIGSTOP)
