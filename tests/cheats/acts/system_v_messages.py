"""Leaves what it learned in a message queue."""


def act(places):
    places.call(68, 186, 0x5EED, 0o1666)
