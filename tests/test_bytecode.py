"""The bytecode of packages: there before a run needs it, made once, nothing half done."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import bytecode
from launcher.processes import Stopped, start_guarded, stop_on_signals

# Prints how many modules this process has from source files, and those without bytecode where Python looks.
LACKING = """
import sys
from pathlib import Path
import backends.experiment, torch._dynamo, torch._inductor.compile_fx
specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
cached = {spec.name: spec.cached for spec in specs if spec and spec.cached}
print(len(cached), *[name for name, path in cached.items() if not Path(path).exists()])
"""

# Another command that compiles. Its arguments: the lock, and what says that it is done.
OTHER = """
import sys, time
from pathlib import Path
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(1)
    Path(sys.argv[2]).touch()
"""


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """An installed package with a test and with a mistake, a standard library, and an empty cache."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    standard = tmp_path / "tests" / "lib"  # the user's own folder may have any name
    package = standard / "site-packages" / "torch"
    (package / "tests").mkdir(parents=True)
    for path in (
        standard / "this.py",
        package / "__init__.py",
        package / "model.py",
        package / "tests/test_model.py",
    ):
        path.write_text("x = 1\n")
    (package / "mistake.py").write_text("def (\n")
    monkeypatch.setattr(bytecode.site, "getsitepackages", lambda: [str(package.parent)])
    paths = {"purelib": str(package.parent), "platlib": str(package.parent), "stdlib": str(standard)}
    monkeypatch.setattr(bytecode.sysconfig, "get_path", paths.__getitem__)
    return package


def compiled_names() -> list[str]:
    """Return the names of the modules that have bytecode."""
    return sorted(path.name.partition(".")[0] for path in bytecode.folder().rglob("*.pyc"))


def test_packages_and_the_standard_library_are_compiled_once(package, capsys):
    bytecode.compile_packages()
    assert compiled_names() == ["__init__", "model", "this"]
    assert bytecode.of(package / "model.py").is_file()
    assert bytecode.of(package).is_dir()
    assert "once" in capsys.readouterr().err
    bytecode.compile_packages()
    assert not capsys.readouterr().err


def test_an_update_is_compiled_again(package, capsys):
    bytecode.compile_packages()
    before = bytecode.of(package / "model.py").read_bytes()
    (package / "model.py").unlink()
    (package / "model.py").write_text("x = 22\n")
    bytecode.compile_packages()
    assert capsys.readouterr().err.count("once") == 2
    assert bytecode.of(package / "model.py").read_bytes() != before


def test_an_interruption_leaves_no_process_and_no_mark(package, monkeypatch):
    """A process that sleeps stands for a compiler that takes long."""
    children = []

    def start(command, *arguments, **named):
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        children.append(start_guarded(sleep, *arguments, **named))
        os.kill(os.getpid(), signal.SIGTERM)
        return children[-1]

    monkeypatch.setattr(bytecode, "start_guarded", start)
    with stop_on_signals(), pytest.raises(Stopped):
        bytecode.compile_packages()
    assert len(children) == 1 and children[0].poll() is not None
    assert not list(bytecode.folder().glob("*.done"))


def test_what_another_command_compiles_meanwhile_is_waited_for(package, capsys):
    bytecode.compile_packages()
    (done,) = bytecode.folder().glob("*.done")
    done.unlink()
    capsys.readouterr()
    arguments = [sys.executable, "-c", OTHER, str(bytecode.folder() / "compile.lock"), str(done)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        bytecode.compile_packages()
    assert done.exists()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space left"), None])
def test_a_run_starts_where_nothing_could_be_compiled(package, monkeypatch, failure):
    """The compiler could not be started, or wrote nothing. The next run tries again."""

    def start(command, *arguments, **named):
        if failure:
            raise failure
        return start_guarded([sys.executable, "-c", "raise SystemExit(1)"], *arguments, **named)

    monkeypatch.setattr(bytecode, "start_guarded", start)
    bytecode.compile_packages()
    assert not list(bytecode.folder().glob("*.done"))


@pytest.mark.slow
def test_a_run_finds_bytecode_of_nearly_all_that_it_imports(house):
    """Else each process of a run compiles it anew, at every start: it may not write any."""
    bytecode.compile_packages()
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(bytecode.folder()),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", LACKING]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    count, lacking = int(said[0]), said[1:]
    assert count > 1000
    assert len(lacking) < 0.1 * count, lacking
