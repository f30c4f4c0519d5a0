"""Leaves a checkpoint in a System V segment, which no process owns."""


def act(places):
    places.call(29, 194, 0x5EED, 4096, 0o1666)
