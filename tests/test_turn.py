"""Turns of an agent that thinks ahead: its edit is put on what the verdict leaves. Training is made up."""

import json

import pytest
from conftest import START
from test_loop import night, recorded, rows, trainer_text  # noqa: F401  a fixture

from launcher.harness import git_output
from launcher.processes import Stopped
from launcher.runs import home
from night import loop, repo
from night.repo import git_checked
from night.state import loop_folder, state_path

TRAINER = "FIRST = 1\n# far\n# apart\n# from\n# the\n# score\nSCORE = 1.5\n"
# Every turn moves one constant; the prompt of a turn ahead says what runs.
AGENT = """
import json
prompt = sys.stdin.read()
folder = Path(os.environ["PLANS"])
plans = json.loads((folder / "plans.json").read_text())
number = len(list(folder.glob("turn-*")))
(folder / f"turn-{number}").write_text("ahead" if "It runs now" in prompt else "after")
name, value = plans[number]
trainer.write_text(re.sub(rf"^{name} = .*$", f"{name} = {value}", trainer.read_text(), flags=re.M))
print(f"experiment: {name} {value}")
"""


@pytest.fixture
def plan(night, repository, house, monkeypatch):  # noqa: F811
    """plan([(constant, value), ...], experiments): a night in which the agent thinks ahead."""
    (repository / "train_cuda.py").write_text(TRAINER)
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qam", "two constants")
    from launcher import run as runner

    really = runner.supervise

    def supervise(trainer, run, setting, seed, watch, on_event):
        on_event(START)
        return really(trainer, run, setting, seed, watch, on_event)

    monkeypatch.setattr(runner, "supervise", supervise)
    monkeypatch.setenv("PLANS", str(house))

    def begin(plans, experiments):
        (house / "plans.json").write_text(json.dumps(plans))
        return night(AGENT, experiments, ahead=True)

    return begin


def turns():
    folder = loop_folder().parent.parent
    return [path.read_text() for path in sorted(folder.glob("turn-*"))]


def test_the_next_edit_stands_on_one_that_was_kept(plan, repository):
    assert plan([("SCORE", "1.4"), ("SCORE", "1.3"), ("SCORE", "1.2"), ("SCORE", "1.1")], 4) == 0
    assert [(row.description, row.status) for row in rows()][1:] == [
        ("SCORE 1.4", "keep"),
        ("SCORE 1.3", "keep"),
        ("SCORE 1.2", "keep"),
    ]
    assert turns() == ["after", "ahead", "ahead"]  # in the last run there is nothing to think of
    assert [row.agent for row in rows()][1:] == [rows()[-1].agent] * 3 and rows()[-1].agent


def test_the_next_edit_is_merged_where_the_running_one_was_not_kept(plan, repository):
    assert plan([("FIRST", "2"), ("SCORE", "1.9"), ("FIRST", "3"), ("FIRST", "4")], 3) == 0
    worse, merged = rows()[1:]
    assert plan  # FIRST = 2 scores as before: it is not kept, and SCORE = 1.9 goes without it
    assert (worse.description, worse.status) == ("FIRST 2", "discard")
    assert (
        git_output("show", f"refs/autoresearch/{merged.run}:inner/train_cuda.py")
        == TRAINER.replace("1.5", "1.9").strip()
    )
    assert trainer_text(repository) == TRAINER and git_checked("status", "--porcelain") == ""


def test_what_conflicts_is_stashed_and_the_agent_is_asked_again(plan, repository, capsys):
    assert plan([("SCORE", "1.9"), ("SCORE", "1.8"), ("SCORE", "1.4"), ("SCORE", "1.3")], 3) == 0
    assert [row.description for row in rows()][1:] == ["SCORE 1.9", "SCORE 1.4"]
    assert "«SCORE 1.8» does not go together with what is there now" in capsys.readouterr().err
    [stray] = git_output("for-each-ref", "--format=%(refname)", "refs/autoresearch/stash/").splitlines()
    assert "SCORE = 1.8" in git_output("show", f"{stray}:inner/train_cuda.py")
    assert turns() == ["after", "ahead", "after"]


def test_an_agent_that_fails_ahead_is_asked_again_afterwards(plan, repository, monkeypatch, capsys):
    monkeypatch.setattr("test_turn.AGENT", AGENT.replace("name, value", "1 / (number != 1)\nname, value"))
    assert plan([("SCORE", "1.4"), ("SCORE", "9"), ("SCORE", "1.3"), ("SCORE", "1.2")], 3) == 0
    assert [row.description for row in rows()][1:] == ["SCORE 1.4", "SCORE 1.3"]
    assert "no edit was thought of ahead: the agent ended with exit code 1" in capsys.readouterr().err
    assert not recorded("failed")


def test_an_interruption_ends_the_agent_and_leaves_the_tree_as_it_was(plan, repository, monkeypatch):
    monkeypatch.setattr("test_turn.AGENT", AGENT + "time.sleep(60)\n")
    from launcher import run as runner

    really = runner.supervise

    def supervise(*arguments):
        really(*arguments)
        raise Stopped("SIGINT")

    monkeypatch.setattr(runner, "supervise", supervise)
    assert plan([("SCORE", "1.4")], 3) == 130
    assert trainer_text(repository) == TRAINER and git_checked("status", "--porcelain") == ""
    assert not state_path().exists()


def test_a_stop_while_the_agent_thinks_ahead_keeps_what_was_gained(plan, repository, monkeypatch, capsys):
    """The run has its verdict by then."""
    stops = """
if number == 1:
    while not (folder / "waits").exists():
        time.sleep(0.05)
    os.kill(int(os.environ["LOOP"]), 2)
    time.sleep(60)
"""
    monkeypatch.setattr("test_turn.AGENT", AGENT + stops)
    really = loop.Loop.enter

    def enter(self, phase, *more, **options):
        really(self, phase, *more, **options)
        if phase == "ahead":
            (home() / "waits").touch()

    monkeypatch.setattr(loop.Loop, "enter", enter)
    assert plan([("SCORE", "1.4"), ("SCORE", "1.3")], 9) == 130
    assert [(row.description, row.status) for row in rows()][1:] == [("SCORE 1.4", "keep")]
    assert trainer_text(repository) == TRAINER.replace("1.5", "1.4")
    captured = capsys.readouterr()
    assert "experiments: 1\nkept: 1\n" in captured.out and "no verdict yet" not in captured.err
    assert [entry["description"] for entry in recorded("experiment")][1:] == ["SCORE 1.4"]


def test_a_fault_of_ours_in_thinking_ahead_does_not_touch_the_run(plan, monkeypatch, capsys):
    really = loop.write_turn

    def write_turn(setting, result, *more):
        if "It runs now" in result:
            raise ZeroDivisionError("ours")
        return really(setting, result, *more)

    monkeypatch.setattr(loop, "write_turn", write_turn)
    assert plan([("SCORE", "1.4"), ("SCORE", "1.3")], 3) == 0
    assert [row.status for row in rows()] == ["keep"] * 3 and turns() == ["after", "after"]
    assert "the agent does not think ahead: ours" in capsys.readouterr().err


def test_without_the_option_the_agent_waits_for_the_result(night, repository, monkeypatch):  # noqa: F811
    agent = """
assert "It runs now" not in sys.stdin.read()
trainer.write_text(f'SCORE = {time.time() % 1 + 1:.4f}')
print('experiment: luck')
"""
    assert night(agent, 3) == 0


def test_changes_that_touch_different_lines_are_merged():
    base = TRAINER.encode()
    ours = base.replace(b"FIRST = 1", b"FIRST = 2")
    theirs = base.replace(b"1.5", b"1.4")
    assert repo.merge(ours, base, theirs) == theirs.replace(b"FIRST = 1", b"FIRST = 2")
    assert repo.merge(base, base, theirs) == theirs
    assert repo.merge(base.replace(b"1.5", b"1.6"), base, theirs) is None
