"""Nothing ends a night: a few cases of each part of benchmarks/hostile.py, and that it sees what is wrong."""

import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last: it has a night.py of its own

from house import (  # noqa: E402
    Ended,
    adopt_orphans,
    build_house,
    copy_house,
    differences,
    end_all,
    ledger_faults,
    look,
    survivors,
    temporary_faults,
)
from stand_ins.agent import ACTS, HONEST, THERE  # noqa: E402
from stand_ins.person import STATES, add_belongings, edit_trainer  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it adopts orphans")
HEADER = "commit\tstatus\trun\n"


@pytest.mark.alone
def test_nothing_ends_a_night():
    """A case of each part, drawn with a seed. All of them take hours: uv run python benchmarks/hostile.py

    The part hosts is in test_hosts.py.
    """
    parts = ("acts", "states", "kill", "signal", "git", "twice", "fleet")
    options = ("--count", "1", "--seed", "1", "--jobs", "2", "--patience", "30", "--part", *parts)
    command = [sys.executable, "benchmarks/hostile.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^failed_.*: 0 of 1$", done.stdout, re.M)) == len(parts)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    house = build_house(tmp_path_factory.mktemp("hostile") / "house")
    add_belongings(house)
    return house


@pytest.fixture
def house(built, tmp_path):
    return copy_house(built, tmp_path / "house")


def shell(house, script):
    subprocess.run(["sh", "-c", script], cwd=house.project, env=house.environment(), check=True)


@pytest.mark.parametrize(
    "script, says",
    [
        ("rm notes/todo.txt", "lost: notes/todo.txt"),
        ("rmdir notes/empty", "lost: notes/empty"),
        ("echo 1 >> notes/large.bin", "changed: notes/large.bin"),
        ("echo 1 >> ignored/secret.txt", "changed: ignored/secret.txt"),
        ("chmod 644 notes/private.txt", "changed: notes/private.txt"),
        ("chmod +x train_cuda.py", "changed: mode of train_cuda.py"),
        ("ln -sf go.sh notes/link", "changed: notes/link"),
        ("touch new", "new: new"),
        ("echo 1 >> ~/private.txt", "changed: home: private.txt"),
        ("git rm -q --cached notes/staged.txt", "lost: index: notes/staged.txt 0"),
        ("echo 1 >> README.md; git add README.md", "changed: index: README.md 0"),
        ("git update-index --skip-worktree README.md", "changed: index: README.md 0"),
        ("git branch -q -D other", "lost: refs/heads/other"),
        ("git tag v1", "new: refs/tags/v1"),
        ("git stash drop -q", "lost: refs/stash"),
        ("git checkout -q -b mine", "changed: HEAD"),
        ("git config core.pager false", "changed: .git: config"),
        ("touch .git/hooks/post-commit", "new: .git: hooks/post-commit"),
        ("touch .git/index.lock", "lock: index.lock"),
        ("touch .git/refs/heads/main.lock", "lock: main.lock"),
        ("git commit -q -m mine", "branch: a commit of 'notes/staged.txt\\x00'"),
        ("git reset -q --soft HEAD~1", "branch: it lost commits"),
        ("echo 1 >> train_cuda.py", "trainer: it is neither HEAD's nor the person's"),
        ("echo 1 >> train_cuda.py; git add train_cuda.py", "trainer: its entry in the index is not HEAD's"),
        ("rm train_cuda.py; ln -s README.md train_cuda.py", "trainer: it is no file"),
        ("rm -f .git/objects/*/*", "the repository is broken: "),
        ("rm -rf .git", "the repository is broken: "),
    ],
)
def test_what_a_night_may_not_do_is_seen(house, script, says):
    before = look(house)
    assert differences(before, house) == []
    shell(house, script)
    assert any(found.startswith(says) for found in differences(before, house))


def test_damaged_objects_are_seen(house):
    before = look(house)
    blob = house.git("rev-parse", "HEAD:LICENSE").strip()
    (house.project / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    assert [found[:5] for found in differences(before, house)] == ["fsck:"]


def test_what_a_night_may_do_is_not_seen(house):
    before = look(house)
    shell(
        house,
        "echo '# kept' >> train_cuda.py; git commit -q -m kept -- train_cuda.py;"
        "git update-ref refs/autoresearch/x HEAD; touch results.tsv README.md; mkdir runs; git status -s",
    )
    assert differences(before, house) == []


def test_an_edit_of_the_person_is_lost_when_nothing_leads_to_it(house):
    edit_trainer(house)
    before = look(house)
    assert differences(before, house) == []
    shell(house, "git checkout -q HEAD train_cuda.py")
    assert differences(before, house) == ["trainer: the person's edit is lost"]
    (house.project / "train_cuda.py").write_bytes(house.edit)
    shell(
        house,
        "git stash push -q -- train_cuda.py; git update-ref refs/autoresearch/x stash@{0}; git stash drop -q",
    )
    assert differences(before, house) == []


@pytest.mark.parametrize("name", STATES)
def test_a_state_alone_is_no_difference(house, name):
    for ledger in ("results.tsv", "runs"):
        (house.project / ledger).touch()
    STATES[name](house)
    stale = ["lock: index.lock"] if "index.lock" in name else []
    assert differences(look(house), house) == stale


def test_each_run_stands_in_the_ledger_once(house):
    for run in ("a", "b"):
        (house.project / "runs" / run).mkdir(parents=True)
        (house.project / "runs" / run / "run.json").touch()
    house.ledger.write_text(HEADER + "1\tkeep\ta\n1\tkeep\tb\n1\tmoved\tb\n")
    assert ledger_faults(house) == []
    house.ledger.write_text(HEADER + "1\tkeep\ta\n1\tcrash\ta\n")
    assert ledger_faults(house) == ["ledger: a stands in it 2 times", "ledger: b is missing"]
    house.ledger.write_text(HEADER + "1\tkeep\n")
    assert ledger_faults(house) == ["ledger: a line of 2 fields"]
    house.ledger.unlink()
    assert "No such file" in ledger_faults(house)[0]


def test_temporary_files_are_seen(house):
    assert temporary_faults(house) == []
    (house.temporary / "dry-x").mkdir()
    assert temporary_faults(house) == ["temporary: dry-x"]


@pytest.mark.parametrize(
    "ended, fault",
    [
        (Ended(0, "", ""), ""),
        (Ended(1, "ended: gave up", ""), ""),
        (Ended(1, "", "autoresearch: no"), ""),
        (Ended(None, "", ""), "it hangs"),
        (Ended(1, "", "no reason"), "exit code 1 without a word"),
        (Ended(-9, "", "said last"), "exit code -9: said last"),
        (Ended(0, "", "Traceback (most recent call last):\nKeyError: 1"), "traceback: KeyError: 1"),
    ],
)
def test_how_a_night_ends(ended, fault):
    assert ended.fault((0, 1)) == fault


def leave_a_daemon():
    """Return (what was found alive, what is left after it was killed)."""
    script = "setsid sh -c 'setsid sleep 600 & sleep 600' > /dev/null 2>&1 < /dev/null &"
    subprocess.run(["sh", "-c", script], env={}, check=True)
    found = survivors(0.5)
    end_all()
    return found, survivors(0.0)


def test_a_process_that_hides_is_found():
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=adopt_orphans) as pool:
        found, left = pool.submit(leave_a_daemon).result()
    assert "alive: sleep 600" in found and left == []


def test_the_agent_refuses_to_work_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "stand_ins" / "agent.py"), str(tmp_path), "no .git"]
    for marker in ("nothing", "throwaway"):
        (tmp_path / marker).touch()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "nothing is done here" in done.stderr
    assert (ROOT / ".git").exists()


def test_there_are_enough_acts():
    assert len([name for name in ACTS if name != HONEST and not name.startswith(THERE)]) >= 65
