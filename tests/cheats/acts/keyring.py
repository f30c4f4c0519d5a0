"""Leaves what it learned among the user's keys."""


def act(places):
    places.call(248, 217, b"user", b"cheat", b"learned", 7, -4)
