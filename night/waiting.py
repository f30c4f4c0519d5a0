"""
The edits that wait for a verdict: a person's, that of a loop that was cut off, those of the agent.

They stand in the state file from the moment they are made, so that a loop that is cut off loses none. A file
in the working tree is a person's, and is never changed here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.console import say
from launcher.ledger import Row
from launcher.runs import new_run_id
from night import repo
from night.agent import Answer
from night.state import Edit

UNCOMMITTED = "what lay in the trainer, uncommitted"


class WaitingEdits:
    """The edits in the order in which they are tried.

    trainer: file name. save: writes the state file; it is called after each change.
    """

    def __init__(self, trainer: str, save: Callable[[], None]) -> None:
        self.trainer = trainer
        self._edits: list[Edit] = []
        self._save = save
        self._left_alone: set[str] = set()  # texts in the working tree that are not tried again, by blob
        self._texts: dict[str, set[str]] = {}  # by commit of an edit that was rebased: see texts_of

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def first(self) -> Edit | None:
        """The edit that is tried next."""
        return self._edits[0] if self._edits else None

    def change(self, edits: list[Edit]) -> None:
        """Let other edits wait in place of these.

        A ref names each: git removes in time what nothing names.
        """
        if edits == self._edits:
            return
        before = {edit.commit for edit in self._edits}
        now = {edit.commit for edit in edits}
        for commit in now - before:
            repo.set_ref(f"untried-{commit}", commit)
        self._edits = edits
        self._save()
        for commit in before - now:
            repo.remove_ref(f"untried-{commit}")

    def add(self, edit: Edit) -> None:
        self.change([*self._edits, edit])

    def drop(self, edit: Edit) -> None:
        """Take an edit from the list that has its verdict."""
        self.change([other for other in self._edits if other != edit])

    def drop_judged(self, rows: list[Row]) -> None:
        """Take the edits from the list on which the ledger has a verdict. rows: those of the ledger."""
        judged = {row.commit for row in rows if row.judged and row.commit}
        self.change([edit for edit in self._edits if not edit.commit.startswith(tuple(judged))])

    def stash(self, edit: Edit, name: str = "") -> None:
        """Take an edit from the list that is not tried, and keep it under a ref.

        Where it lies in the working tree, it stays there, and is not tried again until the file changes.

        name: of the ref, below refs/autoresearch/
        """
        ref = repo.save_ref(name or f"stash/{new_run_id()}", edit.commit)
        lying = repo.lying_blob(self.trainer)
        lies = lying in self.texts_of(edit)
        if lies:
            self._left_alone.add(lying)
        self.drop(edit)
        where = f"in {self.trainer}, and as {ref}" if lies else f"as {ref}"
        say(f"stashed «{edit.answer.description}»: it stays {where}")

    def texts_of(self, edit: Edit) -> set[str]:
        """Return the trainers that are this edit, by blob: its own, and what it was before it was rebased."""
        return {repo.committed_blob(self.trainer, edit.commit), *self._texts.get(edit.commit, ())}

    def take_from_tree(self) -> None:
        """Let the edit that lies in the working tree be the first, where there is one."""
        blob = repo.lying_blob(self.trainer)
        if blob in ("", repo.committed_blob(self.trainer), *self._left_alone):
            return
        known = [edit for edit in self._edits if blob in self.texts_of(edit)]
        if known:  # where the branch has moved since, it is put there before its run: see rebase
            self.change([known[0], *(edit for edit in self._edits if edit not in known)])
            return
        edit = Edit(repo.commit_alone(self.trainer, UNCOMMITTED), repo.head(), Answer(UNCOMMITTED))
        self.change([edit, *self._edits])

    def rebase(self, edit: Edit) -> Edit | None:
        """Put an edit on the last commit, and return it so; None where it conflicts with what is there."""
        rebased = rebase(edit, self.trainer)
        if rebased is not None:
            if rebased != edit:
                self._texts[rebased.commit] = self.texts_of(edit)
            self.change([rebased if other == edit else other for other in self._edits])
        return rebased

    def put_on_branch(self) -> None:
        """Put the first edit on the last commit. Those that conflict with what is there now are stashed."""
        while self._edits:
            if self.rebase(self._edits[0]) is not None:
                return
            say(f"«{self._edits[0].answer.description}» does not go together with what is there now")
            self.stash(self._edits[0])


def rebase(edit: Edit, trainer: str) -> Edit | None:
    """Return an edit as one on the last commit, None where it conflicts with what changed there."""
    head = repo.head()
    if edit.base == head:
        return edit
    ours, base, theirs = (repo.content(commit, trainer) for commit in (head, edit.base, edit.commit))
    merged = repo.merge(ours, base, theirs)
    if merged is None or merged == ours:
        return None
    return replace(edit, commit=repo.commit_alone(trainer, edit.answer.description, merged), base=head)
