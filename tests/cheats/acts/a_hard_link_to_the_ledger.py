"""Reads the ledger by another name in its own folder."""

import os


def act(places):
    link = places.box / "hard-link"
    os.link(places.ledger, link)
    link.read_text()
