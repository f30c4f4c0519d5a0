"""How much is said, and how."""

from launcher import console


def test_what_holds_for_many_runs_is_said_once_in_their_block(capsys):
    for _ in range(2):
        console.say_once("platform cpu")
    assert capsys.readouterr().err == "platform cpu\n" * 2
    with console.saying_once():
        for _ in range(2):
            console.say_once("platform cpu")
            console.warn_once("unboxed")
    assert capsys.readouterr().err == "platform cpu\nwarning: unboxed\n"
    console.say_once("platform cpu")
    assert capsys.readouterr().err == "platform cpu\n"


def test_what_another_wrote_moves_no_cursor():
    assert console.without_controls("a\tb\x1b[2J\r\x9b1m\u2028é") == "a\tb\ufffd[2J\ufffd\ufffd1m\ufffdé"
