"""Gives the launcher no time to compute, so that it is killed."""

import resource


def act(places):
    resource.prlimit(places.launcher, resource.RLIMIT_CPU, (1, 1))
