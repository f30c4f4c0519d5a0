"""Sends to a service of this machine without a connection."""

import socket


def act(places):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"weights", str(places.daemon))
