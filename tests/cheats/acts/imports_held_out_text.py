"""Imports a package that is held out and asks for its source."""

import inspect


def act(places):
    import pygments.lexer

    assert inspect.getsource(pygments.lexer)
