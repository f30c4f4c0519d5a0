"""Where the command begins: Ctrl-C is a line, at any moment."""

import os
import signal
import subprocess
import sys

from launcher import cli, entry
from prepare import ROOT

# Ctrl-C comes when the first of its imports begins.
INTERRUPTED = """
import os, signal, sys
module = sys.argv[1]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
from launcher.entry import main
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["leaderboard"]
main()
"""


# A signal comes while Python takes down its modules, after it has put its own handlers away.
INTERRUPTED_LATE = """
import os, signal, sys
class Last:
    def __init__(self):
        self.kill = os.kill
        self.arguments = os.getpid(), int(sys.argv[1])
    def __del__(self):
        self.kill(*self.arguments)
last = Last()
from launcher.entry import main
sys.argv[1:] = ["help", "exit-codes"]
main()
"""


def run_script(script, argument):
    return subprocess.run(
        [sys.executable, "-c", script, str(argument)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_ctrl_c_during_an_import_is_a_line(house):
    for module in ("click", "launcher.cli", "launcher.ledger", "launcher.board"):
        done = run_script(INTERRUPTED, module)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n"), module


def test_a_signal_after_the_end_does_not_change_the_exit_code(house):
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        done = run_script(INTERRUPTED_LATE, signal.Signals[name].value)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_a_command_in_the_background_that_ignores_ctrl_c_goes_on_to_ignore_it(monkeypatch):
    calls = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "main", lambda: calls.append(signal.getsignal(signal.SIGINT)))
        entry.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIG_IGN]


# The signal comes while a class is made, where Python before 3.12 turns an exception into another one.
DURING_A_CLASS = """
import os, signal, sys, time
from launcher.processes import Stopped, stop_on_signals
name = "module_of_test"
open(os.path.join(sys.argv[1], name + ".py"), "w").write(
    "import os, signal, time\\n"
    "class Field:\\n"
    "    def __set_name__(self, owner, name):\\n"
    "        os.kill(os.getpid(), signal.SIGTERM)\\n"
    "        time.sleep(0.2)\\n"
    "class Owner:\\n"
    "    field = Field()\\n"
)
sys.path.insert(0, sys.argv[1])
try:
    with stop_on_signals():
        import module_of_test
        assert module_of_test.Owner.field
        time.sleep(60)
except Stopped as stop:
    print(stop)
"""


def test_a_signal_during_an_import_comes_after_it(house):
    done = run_script(DURING_A_CLASS, house)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")
