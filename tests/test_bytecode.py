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
from prepare import cache_dir

# Prints how many modules this process has from source files, and those without bytecode where Python looks.
LACKING = """
import sys
from pathlib import Path
import backends.experiment, torch._dynamo, torch._inductor.compile_fx
specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
cached = {spec.name: spec.cached for spec in specs if spec and spec.cached}
print(len(cached), *[name for name, path in cached.items() if not Path(path).exists()])
"""
# Another command that compiles. Its arguments: the lock, and the folder that it makes.
OTHER = """
import sys, time
from pathlib import Path
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(1)
    Path(sys.argv[2]).mkdir(parents=True)
"""
SAID = "once"  # in what is said before anything is compiled


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """An installed package with a test, a standard library, and an empty cache."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    standard = tmp_path / "tests" / "lib"  # the user's own folder may have any name
    package = standard / "site-packages" / "torch"
    (package / "tests").mkdir(parents=True)
    for path in (standard / "this.py", package / "model.py", package / "tests" / "test_model.py"):
        path.write_text("x = 1\n")
    monkeypatch.setattr(bytecode.site, "getsitepackages", lambda: [str(package.parent)])
    paths = {"purelib": str(package.parent), "platlib": str(package.parent), "stdlib": str(standard)}
    monkeypatch.setattr(bytecode.sysconfig, "get_path", paths.__getitem__)
    return package


def compiled_names() -> list[str]:
    """Return the names of the modules that have bytecode."""
    return sorted(path.name.partition(".")[0] for path in bytecode.folder().rglob("*.pyc"))


def test_packages_and_the_standard_library_are_compiled_once(package, capsys):
    bytecode.compile_packages()
    assert compiled_names() == ["model", "this"]
    assert bytecode.bytecode_path(package / "model.py").is_file()
    assert bytecode.bytecode_path(package).is_dir()
    assert SAID in capsys.readouterr().err
    bytecode.compile_packages()
    assert not capsys.readouterr().err
    assert [path.name for path in (cache_dir() / bytecode.NAME).iterdir()] == [bytecode.folder().name]


def test_an_update_is_compiled_to_another_folder(package):
    bytecode.compile_packages()
    before = bytecode.folder()
    (package / "new.py").write_text("x = 1\n")
    (package / "__pycache__").mkdir()  # an import outside the box makes it
    assert bytecode.folder() == before
    (package.parent / "torch-2.0.dist-info").mkdir()
    assert bytecode.folder() != before
    bytecode.compile_packages()
    assert compiled_names() == ["model", "new", "this"]


def test_what_was_written_to_the_folder_of_earlier_versions_is_not_read(package):
    """A trainer could write there."""
    planted = Path(f"{cache_dir() / 'bytecode'}{package}", "planted.cpython-311.pyc")
    planted.parent.mkdir(parents=True)
    planted.touch()
    bytecode.compile_packages()
    assert not bytecode.folder().is_relative_to(cache_dir() / "bytecode")
    assert "planted" not in compiled_names()


def test_a_few_sources_with_a_mistake_are_passed_over(package):
    for number in range(200):
        (package / f"module{number}.py").touch()
    (package / "mistake.py").write_text("def (\n")
    bytecode.compile_packages()
    assert len(compiled_names()) == 202 and "mistake" not in compiled_names()


@pytest.mark.parametrize("name", ["PYTHONOPTIMIZE", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"])
def test_what_the_user_tells_python_changes_nothing(package, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "1")
    bytecode.compile_packages()
    assert compiled_names() == ["model", "this"]


def test_a_relative_cache(package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE", "relative")
    bytecode.compile_packages()
    assert compiled_names() == ["model", "this"]


def test_an_interruption_leaves_no_process_and_nothing_half_done(package, monkeypatch):
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
    assert not list((cache_dir() / bytecode.NAME).iterdir())


def test_what_another_command_compiles_meanwhile_is_waited_for(package, capsys):
    lock = cache_dir() / "locks" / f"{bytecode.NAME}.lock"
    lock.parent.mkdir(parents=True)
    arguments = [sys.executable, "-c", OTHER, str(lock), str(bytecode.folder())]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        bytecode.compile_packages()
    assert bytecode.folder().is_dir()
    said = capsys.readouterr().err
    assert "waiting: another command" in said and SAID not in said


FAILURES = {
    "it cannot be started": "",
    "it fails": "raise SystemExit(1)",
    "it is killed": "import os; os.kill(os.getpid(), 9)",
    "it prints an error": "print('no worker'); raise SystemExit(1)",
    "it takes too long": "import time; time.sleep(60)",
    "what it writes is cut off": """
import compileall, os, sys
from pathlib import Path
compileall.compile_dir(sys.argv[1], quiet=2)
for path in Path(os.environ["PYTHONPYCACHEPREFIX"]).rglob("*.pyc"):
    path.write_bytes(path.read_bytes()[:-9])
""",
}


@pytest.mark.parametrize("script", FAILURES.values(), ids=FAILURES)
def test_a_run_starts_where_the_compiler_failed(package, monkeypatch, capsys, script):
    """Nothing of it is read: a file that is cut off would end each import. The next run tries again."""

    def start(command, *arguments, **named):
        if not script:
            raise OSError(errno.EAGAIN, "no more processes")
        return start_guarded([sys.executable, "-c", script, command[-1]], *arguments, **named)

    monkeypatch.setattr(bytecode, "start_guarded", start)
    monkeypatch.setattr(bytecode, "LONGEST", 2.0)
    bytecode.compile_packages()
    assert "for itself: " in capsys.readouterr().err
    assert not list((cache_dir() / bytecode.NAME).iterdir())


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
