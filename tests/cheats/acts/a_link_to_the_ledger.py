"""Reads the ledger through a link in its own folder."""


def act(places):
    link = places.box / "link"
    link.symlink_to(places.ledger)
    link.read_text()
