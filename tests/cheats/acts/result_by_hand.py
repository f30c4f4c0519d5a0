"""Writes its result itself."""


def act(places):
    (places.box.parent / "result.json").write_text("{}")
