"""Connects to a service that has no file."""

import socket


def act(places):
    socket.socket(socket.AF_UNIX).connect("\0cheat")
