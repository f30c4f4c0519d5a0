"""A tenth of the fuzz: damaged files, odd words and bad moments end in a line, and no run stands twice."""

import pytest

from benchmarks import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_nothing_ends_in_a_traceback(tmp_path, kind):
    [tally] = fuzz.fuzz(200, 1, [kind], tmp_path / "house").values()
    assert tally.cases > 0 and not tally.failures, "\n".join(tally.failures)


def test_a_traceback_is_found(tmp_path, monkeypatch):
    """A fuzz that finds nothing proves nothing: what is broken on purpose shows."""

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("launcher.board.print_text", fail)
    [tally] = fuzz.fuzz(60, 1, ["ledger"], tmp_path / "house").values()
    assert any("ZeroDivisionError" in failure for failure in tally.failures)
