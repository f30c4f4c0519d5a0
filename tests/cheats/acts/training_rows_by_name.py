"""Opens the training rows by their name, for writing."""

import os


def act(places):
    os.open(places.data / "train.bin", os.O_RDWR)
