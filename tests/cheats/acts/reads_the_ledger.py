"""Reads the ledger."""


def act(places):
    places.ledger.read_text()
