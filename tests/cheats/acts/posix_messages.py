"""Leaves what it learned in a queue of POSIX."""


def act(places):
    places.call(240, 180, b"cheat", 0o102, 0o600, None)
