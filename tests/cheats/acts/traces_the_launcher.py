"""Attaches to the launcher as a debugger."""


def act(places):
    places.call(101, 117, 16, places.launcher, 0, 0)
