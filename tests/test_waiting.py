"""The edits that wait: none is lost, and a person's file is never changed."""

import pytest
from conftest import edit, row

from launcher.harness import git_output
from night import repo
from night.agent import Answer
from night.repo import git_checked
from night.state import Edit, LoopState, read_state, write_state
from night.waiting import UNCOMMITTED, WaitingEdits
from prepare import UserError

TRAINER = "train_cuda.py"
LONG = "FIRST = 1\n# far\n# from\n# it\nSCORE = 1.5\n"


@pytest.fixture
def waiting(repository):
    """The edits of a repository whose trainer is LONG, with their state file."""
    edit(repository, LONG)
    commit("by a person")

    def save():
        write_state(LoopState(edits=tuple(waiting)))

    waiting = WaitingEdits(TRAINER, save)
    return waiting


def commit(message, *options):
    options = options or ("-a",)
    git_checked("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qm", message, *options)


def made(old, new, name="claude"):
    """Return an edit of an agent, on the last commit."""
    source = repo.content("HEAD", TRAINER).decode().replace(old, new)
    commit = repo.commit_alone(TRAINER, new, source.encode())
    return Edit(commit, repo.head(), Answer(f"{old} to {new}"), name)


def text_of(one):
    return repo.content(one.commit, TRAINER).decode()


def test_two_edits_wait_and_are_saved_at_each_step(waiting):
    first = made("1.5", "1.4")
    second = made("FIRST = 1", "FIRST = 2")
    waiting.add(first)
    waiting.add(second)
    assert list(waiting) == [first, second] and read_state().edits == (first, second)
    waiting.drop(first)
    assert waiting.first == second and read_state().edits == (second,)


def test_an_edit_with_a_verdict_waits_no_more(waiting):
    first = made("1.5", "1.4")
    second = made("1.5", "1.3")
    waiting.change([first, second])
    waiting.drop_judged([row(commit=first.commit[:7]), row(commit=second.commit[:7], marks="contended")])
    assert read_state().edits == (second,)


def test_an_edit_survives_a_git_that_fails_while_it_is_rebased(waiting, monkeypatch):
    first = made("1.5", "1.4")
    waiting.add(first)
    commit("of other files", "--allow-empty")
    with monkeypatch.context() as patch:

        def fail(*arguments):
            raise UserError("git is busy")

        patch.setattr(repo, "merge", fail)
        with pytest.raises(UserError):
            waiting.put_on_branch()
    assert list(waiting) == [first] and read_state().edits == (first,)
    waiting.put_on_branch()
    assert waiting.first.base == repo.head() and text_of(waiting.first) == LONG.replace("1.5", "1.4")
    assert waiting.first.answer == first.answer


def test_what_conflicts_is_stashed_and_the_next_one_is_first(waiting, capsys):
    waiting.change([made("1.5", "1.4"), made("FIRST = 1", "FIRST = 2")])
    (repo.ROOT / TRAINER).write_text(LONG.replace("1.5", "1.6"))
    commit("by a person")
    waiting.put_on_branch()
    [left] = waiting
    assert text_of(left) == LONG.replace("1.5", "1.6").replace("FIRST = 1", "FIRST = 2")
    assert "«1.5 to 1.4» does not go together" in capsys.readouterr().err
    assert git_output("for-each-ref", "refs/autoresearch/stash/")


def test_the_edit_in_the_working_tree_comes_first_and_the_others_wait(waiting, repository):
    other = made("1.5", "1.4")
    waiting.add(other)
    edit(repository, LONG.replace("1.5", "1.2"))
    waiting.take_from_tree()
    mine, left = waiting
    assert (mine.answer, mine.agent, left) == (Answer(UNCOMMITTED), "", other)
    waiting.take_from_tree()  # in the next turn
    assert list(waiting) == [mine, other]
    edit(repository, LONG)
    waiting.take_from_tree()
    assert list(waiting) == [mine, other]


def test_an_edit_of_a_person_that_was_cut_off_is_tried_on_a_commit_of_other_files(waiting, repository):
    """Its base is an older commit by then."""
    text = LONG.replace("1.5", "1.2")
    edit(repository, text)
    waiting.take_from_tree()
    (repository / "README.md").write_text("read me too\n")
    commit("of other files", "--", "README.md")
    waiting.take_from_tree()
    waiting.put_on_branch()
    [mine] = waiting
    assert mine.base == repo.head() and text_of(mine) == text
    assert (repository / TRAINER).read_text() == text


def test_a_persons_file_stays_and_is_not_tried_again_until_it_changes(waiting, repository, capsys):
    edit(repository, "def broken(:\n")
    waiting.take_from_tree()
    waiting.stash(waiting.first)
    assert (repository / TRAINER).read_text() == "def broken(:\n" and "train_cuda.py, and as" in said(capsys)
    waiting.take_from_tree()
    assert waiting.first is None
    edit(repository, "def whole(): 1\n")
    waiting.take_from_tree()
    assert text_of(waiting.first) == "def whole(): 1\n"


def said(capsys):
    return capsys.readouterr().err


@pytest.mark.parametrize("lies", ["nothing", "a folder"])
def test_a_trainer_that_is_no_file_is_no_edit(waiting, repository, lies):
    (repository / TRAINER).unlink()
    if lies == "a folder":
        (repository / TRAINER).mkdir()
    waiting.take_from_tree()
    assert waiting.first is None


def test_a_ref_names_each_edit_as_long_as_it_waits(waiting):
    def named():
        refs = git_output("for-each-ref", "--format=%(objectname)", "refs/autoresearch/untried-*")
        return set(refs.split())

    one, two = made("1.5", "1.4"), made("1.5", "1.3")
    waiting.add(one)
    waiting.add(two)
    assert named() == {one.commit, two.commit}
    waiting.drop(one)
    assert named() == {two.commit}
    waiting.stash(two)
    assert named() == set() and repo.is_commit(two.commit)
