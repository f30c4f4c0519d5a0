"""Speaks to the network card."""

import socket


def act(places):
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
