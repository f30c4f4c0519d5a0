"""Opens a file that the launcher has open."""

import os


def act(places):
    for name in os.listdir(f"/proc/{places.launcher}/fd"):
        open(f"/proc/{places.launcher}/fd/{name}")
