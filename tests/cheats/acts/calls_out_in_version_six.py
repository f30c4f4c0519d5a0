"""Connects to another machine by IPv6."""

import socket


def act(places):
    socket.create_connection(("::1", 9), timeout=5)
