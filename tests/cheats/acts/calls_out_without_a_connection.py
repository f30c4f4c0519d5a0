"""Sends a datagram, which needs no connection."""

import socket


def act(places):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"weights", ("127.0.0.1", 9))
