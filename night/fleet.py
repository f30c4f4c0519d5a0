"""
`autoresearch loop --devices ...`: a night over several devices, with several agents.

The loop's turns overlap here: each agent edits the trainer that is the best when it begins, each device takes
the next edit that waits, and verdicts come when they come. An edit whose parent is no longer the best is
judged all the same: as better than its parent or not, and against what is best by now. Where it is better
than its parent, what it changes is merged into the best, and that is an experiment of its own.

One process decides: it alone moves the branch, from one verdict to the next. A device is only lent a trainer.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from backends.platforms import cpu_facts
from launcher.belief import PRIOR
from launcher.harness import source_hash
from launcher.ledger import STATUSES, Flag, Row
from launcher.processes import defer_signals
from launcher.runs import ledger, new_run_id, record_killed_runs
from launcher.verdict import fresh_seed, survey_board
from night import repo
from night.agent import Answer, TurnFailed, save_answer
from night.crew import Crew, Doing
from night.devices import parse_devices
from night.job import Job, JobAnswer
from night.loop import BASELINE, NO_VERDICT_TRIES, Loop, run_night
from night.panel import DeviceLine, Panel
from night.plan import Night
from night.state import Edit, LoopState, loop_folder, record
from night.stop import rest
from night.trial import check_source, lab_message, put_on_branch, scored_before
from night.turn import Turn, begin_turn, end_turn
from prepare import ROOT, UserError, first_line

POLL_SECONDS = 0.2  # between looks whether a device or an agent has ended
LOOK_SECONDS = 5.0  # between looks at all else: the clock, `autoresearch stop`, what a person edits
FAR = 3.0  # errors by which a device must differ from the others, to be told of
UNDER_WAY = "These edits are run now or wait for it, and there is no result yet. Do something else:"
OTHERS = "Other agents think of an edit at this moment ({count}). What comes to mind first, they try too."


@dataclass(frozen=True)
class Task:
    """What a device does."""

    doing: Doing
    text: str
    began: float  # of time.monotonic()
    edit: Edit | None = None  # None: the committed trainer is run
    source: str = ""  # content hash of the trainer


class AtWork(NamedTuple):
    """An agent at work."""

    turn: Turn
    place: int  # of its folder


def run_fleet(night: Night, devices: str, agents: int | None = None) -> int:
    """Run a night over several devices. Returns the exit code: see run_night.

    devices: as parse_devices takes it
    agents: that may work at once, as many as there are devices if left out

    Raises:
        UserError: there are no such devices, dask is missing, or as run_night.
    """
    chosen = parse_devices(devices)
    if chosen[0].kind != night.setting.platform.device_kind:
        raise UserError(
            f"--devices {devices}: platform {night.setting.platform.name} runs on a "
            f"{night.setting.platform.device_kind} (--platform)",
            2,
        )
    if chosen[0].cores:  # a run sees so many cores, and is ranked with such runs
        night.setting = replace(night.setting, facts=cpu_facts(len(chosen[0].cores)))
    crew = Crew(chosen, loop_folder())
    return run_night(night, lambda night, panel: Fleet(night, panel, crew, agents or len(chosen)))


class Fleet(Loop):
    """A loop whose experiments run on several devices at once. The repository must be held."""

    def __init__(self, night: Night, panel: Panel, crew: Crew, agents: int) -> None:
        """agents: that may work at once"""
        super().__init__(night, panel)
        self.crew = crew
        self.agents = agents
        self.tasks: list[Task] = []
        self.turns: list[AtWork] = []
        self.tries: dict[
            str, int
        ] = {}  # runs without a verdict, by commit; of the committed trainer, by source
        self.asked = 0  # turns so far
        self.rested = 0.0  # of time.monotonic(): before it, nothing is begun
        self.conflict = ""  # of two edits, for the next agent
        self.began_with: dict[str, Row] = {}  # the first run of the committed trainer on each device
        panel.devices = self.describe_devices

    # --- The turns ------------------------------------------------------------------------------------------

    def take_turns(self) -> tuple[str, int]:
        """Keep devices and agents at work until there is a reason to end. Returns (the reason, exit code)."""
        try:
            with self.crew:
                return self.work_on()
        except UserError as error:  # no workers
            return str(error), 1
        finally:
            self.tasks.clear()
            self.end_turns()

    def work_on(self) -> tuple[str, int]:
        """Do what take_turns does, while the crew is there."""
        looked = -LOOK_SECONDS
        while True:
            try:
                if self.collect() or time.monotonic() > looked + LOOK_SECONDS:
                    looked = time.monotonic()
                    enough = self.why_over()
                    if enough and not self.tasks:
                        return enough, 0
                    if not enough and looked >= self.rested:
                        self.give_work()
                        self.ask_agents()
            except Exception as error:
                self.rested = time.monotonic() + self.record_failure(error)
                if self.failures.are_too_many:
                    count = self.failures.in_a_row
                    reason = first_line(error)
                    return f"gave up after {count} turns without an experiment in a row: {reason}", 1
            rest(POLL_SECONDS, lambda: False)

    def is_full(self) -> bool:
        """Return whether as many experiments are under way as were asked for."""
        most = self.night.experiments
        return most is not None and self.panel.done + len(self.experiments_under_way()) >= most

    def experiments_under_way(self) -> list[Task]:
        """Return the tasks that end in an experiment: a further run of the committed trainer does not."""
        return [task for task in self.tasks if task.edit or task.text == BASELINE]

    def collect(self) -> bool:
        """Take what has ended: an agent's edit, or a device's verdict. Returns whether anything has."""
        for at_work in self.turns:
            if self.has_ended(at_work.turn):
                self.take_edit(at_work)
                return True
        for task in self.tasks:
            if task.doing.done():
                self.tasks.remove(task)
                self.take_answer(task)
                return True
        return False

    # --- The devices ----------------------------------------------------------------------------------------

    def give_work(self) -> None:
        """Give each free device something to do."""
        if self.needs_baseline():
            self.run_baselines()
        self.require_harness()
        if not self.tasks:
            self.waiting.take_from_tree()
        while len(self.tasks) < len(self.crew.devices) and not self.is_full():
            edit = next(iter(self.idle_edits()), None)
            if edit is None:
                return
            self.run_edit(edit)

    def needs_baseline(self) -> bool:
        """Return whether the committed trainer has no run on this board yet, and gets none now."""
        is_under_way = any(task.text == BASELINE for task in self.tasks)
        return not is_under_way and super().needs_baseline()

    def run_baselines(self) -> None:
        """Run the committed trainer on every device at once: do they give the same?"""
        source = repo.content("HEAD", self.trainer.name)
        seed = max(self.night.seed, fresh_seed(ledger().rows(), [source_hash(source)]))
        for number in range(len(self.crew.devices) - len(self.tasks)):
            text = f"the committed trainer on another device, seed {seed + number}" if number else BASELINE
            flags = (Flag.NOISE,) if number else ()
            self.submit(
                self.job(
                    seed=seed + number,
                    description=text,
                    trainer=source,
                    commit=repo.head(),
                    parent=source,
                    flags=flags,
                ),
                text,
            )

    def job(self, **more: Any) -> Job:
        """Return a job of this night."""
        setting = self.setting
        return Job(setting.platform.name, setting.track.name, setting.budget, **more)

    def idle_edits(self) -> list[Edit]:
        """Return the edits that wait and are not run now."""
        running = {task.edit.commit for task in self.tasks if task.edit}
        return [edit for edit in self.waiting if edit.commit not in running]

    def run_edit(self, edit: Edit) -> None:
        """Have an edit run, put on the trainer that is the best by now.

        Raises:
            TurnFailed: it cannot be tried. It is then stashed.
        """
        edit = self.put_on_best(edit)
        description = edit.answer.description
        source = repo.content(edit.commit, self.trainer.name)
        digest = source_hash(source)
        try:
            check_source(self.trainer.name, source)
        except UserError as error:
            raise self.refuse(edit, str(error)) from None
        earlier = scored_before(source, self.setting)
        if earlier:
            raise self.refuse(
                edit, f"run {earlier.run} scored the same source: {earlier.val_bpb:.6f}, {earlier.status}"
            )
        if any(task.source == digest for task in self.tasks):
            raise self.refuse(edit, "the same source is run now")
        parent = repo.content(edit.base, self.trainer.name) if edit.base else None
        job = self.job(
            seed=self.night.seed,
            description=description,
            trainer=source,
            commit=edit.commit,
            parent=parent,
            agent=edit.agent,
            flags=(Flag.PARALLEL,),
            has_dry_run=True,
        )
        self.submit(job, description, edit)

    def put_on_best(self, edit: Edit) -> Edit:
        """Return an edit as one on the last commit. Raises TurnFailed where it conflicts with that."""
        rebased = self.waiting.rebase(edit)
        if rebased is None:
            raise self.refuse(edit, "it does not go together with what was kept meanwhile")
        return rebased

    def refuse(self, edit: Edit, why: str) -> TurnFailed:
        """Stash an edit that cannot be tried, and return what to raise."""
        self.waiting.stash(edit)
        return TurnFailed("edit", f"«{edit.answer.description}»: {why}")

    def submit(self, job: Job, text: str, edit: Edit | None = None) -> None:
        """Have a job done by the next free device."""
        record("phase", phase="fleet", text=text)
        doing = self.crew.submit(job)
        self.tasks.append(Task(doing, text, time.monotonic(), edit, source_hash(job.trainer)))
        self.enter_phase()

    def take_answer(self, task: Task) -> None:
        """Take what became of a task: a verdict, or a failure.

        Raises:
            TurnFailed: there is no verdict.
        """
        self.enter_phase()
        try:
            answer = task.doing.result()
        except Exception as error:  # dask's: worker after worker died over it
            answer = JobAnswer(status="error", reason=first_line(error))
        self.hours.dry_seconds = answer.seconds or self.hours.dry_seconds
        row = self.row_of(answer.run)
        if row is None:
            self.take_failure(task, answer)
            return
        if not row.judged:
            self.try_again(task, row.reason)
            return
        self.failures.clear()
        if task.edit is None:
            self.take_baseline(task, row, answer.device)
            return
        if task.edit.agent:
            save_answer(row.run, task.edit.answer)
        self.settle(task.edit, row)
        self.waiting.drop(task.edit)
        self.record_experiment(row)

    def row_of(self, run_id: str) -> Row | None:
        """Return the row of a run, None where there is none."""
        rows = ledger().rows() if run_id else []
        return next((row for row in reversed(rows) if row.run == run_id and row.status in STATUSES), None)

    def take_failure(self, task: Task, answer: JobAnswer) -> None:
        """Take a task that led to no run. Raises TurnFailed."""
        if task.edit is None or answer.status == "error":
            self.try_again(task, answer.reason)
            return
        ledger().append(self.refused_row(task.edit, answer.status, answer.reason, answer.seconds))
        raise self.refuse(
            task.edit, f"it failed its dry run ({answer.status}): {answer.reason}\n{answer.log_tail}"
        )

    def try_again(self, task: Task, why: str) -> None:
        """Have a task without a verdict done anew. Raises TurnFailed where that was in vain too often."""
        key = task.edit.commit if task.edit else task.source
        tries = self.tries[key] = self.tries.get(key, 0) + 1
        self.panel.note(f"no verdict on «{task.text}»: {why}")
        if tries >= NO_VERDICT_TRIES:
            if task.edit:
                self.waiting.stash(task.edit)
            raise TurnFailed("device", f"«{task.text}» was run {tries} times without a verdict: {why}")

    def take_baseline(self, task: Task, row: Row, device: str) -> None:
        """Take a run of the committed trainer, and say how its device compares with the first."""
        if task.text == BASELINE:
            self.record_experiment(row)
        if row.scored:
            self.began_with[device] = row
        if len(self.began_with) < 2:
            return
        believed = survey_board(ledger().rows(), self.setting.board)
        error = (believed.sigma if believed else PRIOR.sigma) * 2**0.5
        first_device, first = next(iter(self.began_with.items()))
        apart = row.val_bpb - first.val_bpb
        is_far = abs(apart) > FAR * error
        self.panel.note(
            f"{device} against {first_device}, the same trainer: {apart:+.6f} bpb, "
            f"{row.tokens_per_second / max(first.tokens_per_second, 1.0):.2f} of its speed"
            + (
                f"; that is more than {FAR:g} times the noise: run them in nights of their own"
                if is_far
                else ""
            )
        )

    # --- Verdicts -------------------------------------------------------------------------------------------

    def settle(self, edit: Edit, row: Row) -> None:
        """Let the branch follow a verdict, and merge an edit whose parent is not the best any more.

        It may be repeated: a loop that was cut off does so at its start.
        """
        name = self.trainer.name
        best_before = repo.content("HEAD", name)
        repo.save_ref(row.run, edit.commit)
        if row.build_on and row.build_on != source_hash(best_before):
            if row.build_on == row.source:
                text = repo.content(edit.commit, name)
                message = lab_message(edit.answer.description, row)
                repo.advance_branch(repo.commit_alone(name, message, text), name)
            else:
                put_on_branch(name, row.board, row.build_on)
        is_better = row.scored and row.effect < 0 and row.source != source_hash(best_before)
        if is_better and repo.content(edit.base, name) != best_before:
            self.merge(edit, best_before)

    def merge(self, edit: Edit, best: bytes) -> None:
        """Let an edit wait that is another one and what was the best when it ended, together."""
        name = self.trainer.name
        theirs = repo.content(edit.commit, name)
        merged = repo.merge(best, repo.content(edit.base, name), theirs)
        description = edit.answer.description
        if merged is None:
            self.conflict = (
                f"«{description}» was better than what it was made on, and conflicts with what was kept "
                "meanwhile. Do the same on the trainer as it is now."
            )
            self.panel.note(f"«{description}» conflicts with what was kept meanwhile: the next agent is told")
        elif merged not in (best, theirs):
            text = f"merged: {description}"
            commit = repo.commit_alone(name, text, merged)
            merged_edit = Edit(commit, repo.head(), Answer(text), edit.agent)
            self.waiting.change([merged_edit, *self.waiting])  # the first: both parts are gains already

    def drop_judged(self) -> None:
        """Let the branch follow the verdicts on edits that a loop which was cut off did not settle."""
        rows = ledger().rows()
        for edit in list(self.waiting):
            verdicts = [
                row for row in rows if row.judged and row.commit and edit.commit.startswith(row.commit)
            ]
            if verdicts:
                self.settle(edit, verdicts[-1])
        self.waiting.drop_judged(rows)

    def learn_noise(self) -> None:
        """Do nothing: the runs of the committed trainer on the other devices tell of the noise."""

    # --- The agents -----------------------------------------------------------------------------------------

    def ask_agents(self) -> None:
        """Ask as many agents for an edit as there is room for."""
        free = len(self.crew.devices) - len(self.tasks)
        wanted = free + (self.agents if self.night.ahead else 0)
        while (
            len(self.turns) < self.agents
            and len(self.turns) + len(self.idle_edits()) < wanted
            and not self.needs_baseline()
            and not self.is_enough_asked()
        ):
            seconds = self.hours.to_think()
            if not seconds:
                return
            self.start_turn(seconds)

    def is_enough_asked(self) -> bool:
        """Return whether the edits that wait or are made are as many as experiments are left."""
        most = self.night.experiments
        coming = len(self.experiments_under_way()) + len(self.idle_edits()) + len(self.turns)
        return most is not None and self.panel.done + coming >= most

    def start_turn(self, seconds: float) -> None:
        """Start an agent on the trainer that is the best now. Raises as turn.begin_turn."""
        night = self.night
        doing = [
            *(task.text for task in self.tasks if task.edit),
            *(e.answer.description for e in self.idle_edits()),
        ]
        told = [self.result]
        if doing:
            told.append("\n".join([UNDER_WAY, *(f"- {text}" for text in doing)]))
        if self.turns:
            told.append(OTHERS.format(count=len(self.turns)))
        self.complaint = self.complaint or self.conflict
        prompt = self.write_prompt("\n\n".join(told))
        self.complaint = self.conflict = ""
        place = min(set(range(self.agents)) - {one.place for one in self.turns})
        self.asked += 1
        # The builtin search draws from the seed.
        settings = self.setting.run_settings(night.seed + self.asked).to_env()
        if night.agent.is_builtin:
            settings["PYTHONPATH"] = str(ROOT)
        self.stamp = new_run_id()
        self.save_state()
        with defer_signals():
            turn = begin_turn(
                night.agent, prompt, repo.head(), self.stamp, seconds, settings, night.boxed, place
            )
            self.turns.append(AtWork(turn, place))
        self.stamp = ""
        self.enter_phase()

    def has_ended(self, turn: Turn) -> bool:
        """Return whether an agent has ended, or must."""
        return turn.child.poll() is not None or time.monotonic() > turn.deadline

    def take_edit(self, at_work: AtWork) -> None:
        """Let the edit of an agent wait that has ended. Raises TurnFailed where it made none."""
        self.turns.remove(at_work)
        try:
            self.waiting.add(end_turn(at_work.turn, self.trainer.name))
        finally:
            self.record_turn(at_work.turn)
            self.enter_phase()

    def end_turns(self) -> None:
        """End the agents at work. What they made of their folders is lost."""
        with defer_signals():
            for one in self.turns:
                one.turn.child.end()
        self.turns.clear()

    # --- The rest -------------------------------------------------------------------------------------------

    def state(self) -> LoopState:
        """Return what the next loop needs, should this one be killed."""
        stamps = [*(one.turn.files.stamp for one in self.turns), self.stamp]
        return replace(super().state(), stamp=" ".join(filter(None, stamps)))

    def finish_interrupted(self) -> None:
        """Finish what a signal interrupted: agents and devices are ended already, their runs get a row."""
        try:
            record_killed_runs()
        except Exception as error:
            self.panel.note(f"the next command records the runs that were cut off: {first_line(error)}")

    def enter_phase(self) -> None:
        """Show how many devices and agents are at work."""
        self.panel.phase = (
            f"{self.panel.done + 1}{self.panel.of_all()}: {len(self.tasks)} of {len(self.crew.devices)} "
            f"devices and {len(self.turns)} agents at work"
        )

    def describe_devices(self) -> list[DeviceLine]:
        """Return what the devices do, for the panel."""
        now = time.monotonic()
        places = self.crew.places() if self.tasks else {}
        return [(places.get(task.doing.key, "waiting"), task.text, now - task.began) for task in self.tasks]
