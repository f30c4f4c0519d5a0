"""Reads the ledger through /proc/self/root."""


def act(places):
    open(f"/proc/self/root{places.ledger}").read()
