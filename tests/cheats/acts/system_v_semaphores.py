"""Leaves what it learned in semaphores."""


def act(places):
    places.call(64, 190, 0x5EED, 100, 0o1666)
