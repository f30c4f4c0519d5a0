"""
`autoresearch loop --devices ...`: a night over several devices, with several agents.

The loop's turns overlap here: each agent edits the trainer that is the best when it begins, each device takes
the next edit that waits, and verdicts come when they come. An edit whose parent is no longer the best is
judged all the same: as better than its parent or not, and against what is best by now. Where it is better
than its parent, what it changes is merged into the best, and that is an experiment of its own.

One process decides: it alone moves the branch, from one verdict to the next. A device is only lent a trainer.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from launcher.belief import PRIOR, REPEATS
from launcher.harness import source_hash
from launcher.ledger import MOVED, Flag, Row, single_line
from launcher.processes import defer_signals
from launcher.report.timeline import DeviceNow
from launcher.runs import find_row, ledger, now_utc, record_killed_runs
from launcher.verdict import build_on_now, fresh_seed, survey_board
from night import repo
from night.agent import Answer, prints_without_end, save_answer
from night.devices import keep_to_cores
from night.failures import kind_of
from night.job import LOST, Job, JobAnswer
from night.lab_book import clip, remember_shares
from night.loop import BASELINE, NO_VERDICT_TRIES, Loop, run_night
from night.panel import Panel
from night.plan import Night
from night.state import Edit, LoopState, loop_folder, read_state, record
from night.trial import lab_message, put_on_branch, scored_before
from night.turn import Turn, end_turn
from night.workers import WORKER_SECONDS, Future, Pool, Workers, result_of, take_run
from prepare import UserError, first_line

RESTART_SECONDS = 20.0  # that a worker has to come back, before its task is done elsewhere
LOST_SECONDS = 1800.0  # that a night waits for machines that lend devices, while it has none
POLL_SECONDS = 0.2  # between looks whether a device or an agent has ended
LOOK_SECONDS = 5.0  # between looks at all else: the clock, `autoresearch stop`, what a person edits
MOST_FAILURES = 3  # jobs in a row without a score, after which a device is tested
LONGEST_REASON = 120  # characters that are shown
OF_AGENTS = ("agent", "edit")  # kinds of failures that another edit may not have
FAR_ERRORS = 3.0  # standard errors between two devices, from which on a line warns of it
MOST_MESSAGES = 3  # about failed turns, that the next agent gets
UNDER_WAY = "These edits are run now or wait for it, and there is no result yet. Do something else:"
OTHERS = "Other agents think of an edit at this moment ({count}). What comes to mind first, they try too."


@dataclass(frozen=True)
class Task:
    """What a device runs now: an edit, or the committed trainer."""

    device: str  # its name
    future: Future
    text: str
    began: float  # of time.monotonic()
    job: Job
    edit: Edit | None = None  # None: it is the committed trainer

    @cached_property
    def source(self) -> str:
        """Return the content hash of its trainer."""
        return source_hash(self.job.trainer)

    @property
    def key(self) -> str:
        """Return the name under which its failures are counted, from one try to the next."""
        return self.edit.commit if self.edit else self.text


@dataclass(frozen=True)
class AgentAtWork:
    """A turn, and which of the agents' folders it has."""

    turn: Turn
    place: int


def run_fleet(night: Night, pool: Pool, agents: int | None = None) -> int:
    """Run a night over several devices. Returns the exit code: see run_night.

    Args:
        night: its setting is that of the devices (pool.find_pool).
        pool: the devices.
        agents: that may work at once, as many as there are devices if left out.

    Raises:
        UserError: dask is missing, or as run_night.
    """
    workers = Workers(pool, loop_folder())
    count = agents or len(workers.devices)
    return run_night(night, lambda night, panel: Fleet(night, panel, workers, count))


class Fleet(Loop):
    """A loop whose experiments run on several devices at once. The repository must be held."""

    def __init__(self, night: Night, panel: Panel, workers: Workers, agents: int) -> None:
        """agents: that may work at once"""
        super().__init__(night, panel)
        self.workers = workers
        self.devices = [device.name for device in workers.devices]  # that get work
        self.hosts = {device.name: device.host for device in workers.devices}  # "": this machine
        self.agents = agents
        self.tasks: list[Task] = []
        self.turns: list[AgentAtWork] = []
        self.turns_begun = 0
        self.head = read_state().head  # the commit that this loop left the branch on
        self.branch = repo.branch()
        self.baseline = b""  # that this night ran, where its board had none
        self.baseline_seed = 0
        self.compared: list[str] = []  # the device of each run of it
        self.baselines: dict[str, list[Row]] = {}  # scored runs of it, by device
        self.told: set[str] = set()  # how the devices compare
        self.tries: Counter[str] = Counter()  # runs without a verdict, by the key of the task
        self.without_verdict = 0  # runs in a row, whatever they were of
        self.failed: Counter[str] = Counter()  # jobs in a row without a score, by device
        self.not_before: dict[str, float] = {}  # when a task may be done again, by its key
        self.no_agents_before = 0.0  # of time.monotonic()
        self.no_work_before = 0.0  # likewise: until then nothing new is begun
        self.now = {name: DeviceNow(name, "", 0.0, "") for name in self.devices}  # what they do, out or not
        self.missing_since: dict[str, float] = {}  # devices without a worker
        self.lost: set[str] = set()  # those of them that got no more work
        self.messages: list[str] = []  # about failed turns, for the next agent
        self.phase = ""  # as it stands in the log
        self.gave_up = ""  # why
        panel.devices = lambda: list(self.now.values())

    # --- The turns ------------------------------------------------------------------------------------------

    def take_turns(self) -> tuple[str, int]:
        """Keep devices and agents at work until there is a reason to end. Returns (the reason, exit code)."""
        try:
            with self.workers:
                return self.work()
        except UserError as error:  # no workers
            return str(error), 1
        finally:
            self.tasks.clear()
            self.end_turns()
            here = [device for device in self.workers.devices if not device.host]
            if here:
                keep_to_cores(here[0].environment())  # a claim is tested on the first device

    def work(self) -> tuple[str, int]:
        """Do what take_turns does, while there are workers."""
        looked = -LOOK_SECONDS
        while True:
            try:
                has_waited = time.monotonic() > looked + LOOK_SECONDS
                if has_waited:
                    looked = time.monotonic()
                    self.look_for_workers()
                if self.collect() or has_waited:
                    enough = self.gave_up or self.why_over()
                    if enough and not self.tasks:
                        return enough, 1 if self.gave_up else 0
                    if time.monotonic() < self.no_work_before:
                        continue
                    self.drop_judged()
                    if not enough and self.give_work():
                        self.ask_agents()
                else:
                    time.sleep(POLL_SECONDS)
            except Exception as error:
                self.take_failure(error)
                if kind_of(error) in OF_AGENTS:
                    looked = -LOOK_SECONDS  # there may be another edit for the device
                time.sleep(POLL_SECONDS)

    def collect(self) -> bool:
        """Take what has ended: an agent's edit, or a device's verdict. Returns whether anything has."""
        for at_work in self.turns:
            if self.has_ended(at_work.turn):
                self.take_edit(at_work)
                return True
        for task in self.tasks:
            if task.future.done():
                self.tasks.remove(task)
                self.take_answer(task, result_of(task.future))
                return True
        return False

    def take_failure(self, error: Exception) -> None:
        """Tell of a failed turn. Too many end the night.

        After one of an agent or an edit, agents rest for a while, and devices do not. Several agents that
        fail at once, as they do where their model refuses, count once. After any other nothing new is begun
        for a while: a person may undo what they changed.
        """
        is_of_agents = kind_of(error) in OF_AGENTS
        if is_of_agents and time.monotonic() < self.no_agents_before:
            self.panel.add("turns_lost")
            self.panel.note(f"no experiment: {first_line(error)}")
            self.messages.append(str(error))
            return
        then = time.monotonic() + self.record_failure(error)
        if is_of_agents:
            self.no_agents_before = then
        else:
            self.no_work_before = then
        self.messages.append(self.complaint)
        if self.failures.are_too_many:
            self.gave_up = self.describe_giving_up(error)

    def at_once(self) -> int:
        """Return how many experiments run at once."""
        return max(1, len(self.devices))

    def is_full(self) -> bool:
        """Return whether as many experiments are under way as were asked for."""
        most = self.night.experiments
        return most is not None and self.panel.done + len(self.experiments_under_way()) >= most

    def experiments_under_way(self) -> list[Task]:
        """Return the tasks that end in an experiment: a further run of the committed trainer does not."""
        return [task for task in self.tasks if task.edit or task.text == BASELINE]

    # --- The devices ----------------------------------------------------------------------------------------

    def free_devices(self) -> list[str]:
        """Return the devices that do nothing."""
        busy = {task.device for task in self.tasks} | self.missing_since.keys()
        return [device for device in self.devices if device not in busy]

    def give_work(self) -> bool:
        """Give each free device something to do. Returns whether the baseline has its verdict."""
        self.notice_move()
        needs_baseline = self.needs_baseline()
        if needs_baseline and not self.is_baseline_held_back():
            self.begin_board()
        self.run_on_others()
        self.require_harness()
        self.take_from_tree()
        if needs_baseline:  # nothing can be said of an edit before
            return False
        self.test_devices()
        for device in self.free_devices():
            edit = next(iter(self.idle_edits()), None)
            if edit is None or self.is_full():
                break
            self.run_edit(edit, device)
        return True

    def take_from_tree(self) -> None:
        """Let the edit that lies in the working tree wait, unless it is run now."""
        lying = repo.lying_blob(self.trainer.name)
        if lying in ("", repo.committed_blob(self.trainer.name)):
            return
        running = [self.waiting.texts_of(task.edit) for task in self.tasks if task.edit]
        if not any(lying in texts for texts in running):
            self.waiting.take_from_tree()

    def is_baseline_held_back(self) -> bool:
        """Return whether the committed trainer is run now, or is to be left alone for a while."""
        is_under_way = any(task.text == BASELINE for task in self.tasks)
        return is_under_way or self.not_before.get(BASELINE, 0.0) > time.monotonic()

    def begin_board(self) -> None:
        """Run the committed trainer on a free device: the board has no run of it."""
        for device in self.free_devices()[:1]:
            self.baseline = repo.content("HEAD", self.trainer.name)
            seed = fresh_seed(ledger().rows(), [source_hash(self.baseline)])
            self.baseline_seed = max(self.night.seed, seed)
            self.compared.append(device)
            self.run_committed(device, BASELINE, self.baseline, self.baseline_seed)

    def run_on_others(self) -> None:
        """Run the baseline of this night on each free device that has not run it: do they give the same?

        Hosts may join later than the first look. On two devices one runs it once more: of two runs that
        differ one may have gone wrong, so that they do not say how large the noise is.
        """
        if not self.baseline:
            return
        count = len(self.devices)
        for device in self.free_devices():
            is_compared = device in self.compared
            is_one_more_wanted = 1 < count <= len(self.compared) < REPEATS
            if is_compared and not is_one_more_wanted:
                continue
            text = f"the committed trainer on {device}{', once more' if is_compared else ''}"
            if self.not_before.get(text, 0.0) <= time.monotonic():
                self.compared.append(device)
                seed = self.baseline_seed + len(self.compared) - 1
                self.run_committed(device, text, self.baseline, seed)

    def run_committed(self, device: str, text: str, source: bytes, seed: int) -> None:
        """Run the committed trainer, given its source, on a device."""
        job = self.make_job(
            seed=seed,
            description=text,
            trainer=source,
            commit=repo.head(),
            parent=source,
            flags=() if text == BASELINE else (Flag.NOISE,),
        )
        self.submit(job, device, text)

    def test_devices(self) -> None:
        """Run the committed trainer on each free device that gave no score for long: is it the device?

        Only one that was scored can tell.
        """
        suspects = [device for device in self.free_devices() if self.failed[device] >= MOST_FAILURES]
        if not suspects:
            return
        source = repo.content("HEAD", self.trainer.name)
        known = scored_before(source, self.setting)
        if known is None or not known.scored:
            return
        seed = fresh_seed(ledger().rows(), [known.source])
        for number, device in enumerate(suspects):
            self.run_committed(device, f"is it {device}? the committed trainer", source, seed + number)

    def make_job(self, **more: Any) -> Job:
        """Return a job of this night."""
        setting = self.setting
        return Job(setting.platform.name, setting.track.name, setting.budget, **more)

    def idle_edits(self) -> list[Edit]:
        """Return the edits that wait, and are neither run now nor to be left alone for a while."""
        now = time.monotonic()
        running = {task.edit.commit for task in self.tasks if task.edit}
        return [
            edit
            for edit in self.waiting
            if edit.commit not in running and self.not_before.get(edit.commit, 0.0) <= now
        ]

    def run_edit(self, edit: Edit, device: str) -> None:
        """Have an edit run, put on the trainer that is the best by now.

        Raises:
            TurnFailed: it cannot be tried. It is then stashed.
        """
        rebased = self.waiting.rebase(edit)
        if rebased is None:
            raise self.refuse(edit, "it does not go together with what was kept meanwhile")
        if rebased != edit:
            self.tries[rebased.commit] = self.tries.pop(edit.commit, 0)
        edit = rebased
        source = self.read_new_source(edit)
        digest = source_hash(source)
        if any(task.source == digest for task in self.tasks):
            raise self.refuse(edit, "the same source is run now")
        job = self.make_job(
            seed=max(self.night.seed, fresh_seed(ledger().rows(), [digest])),
            description=edit.answer.description,
            trainer=source,
            commit=edit.commit,
            parent=repo.content(edit.base, self.trainer.name),
            agent=edit.agent,
            flags=(Flag.PARALLEL,),
            has_dry_run=True,
        )
        self.submit(job, device, edit.answer.description, edit)

    def submit(self, job: Job, device: str, text: str, edit: Edit | None = None) -> None:
        """Have a job done by a device."""
        self.note_device(device, text)
        future = self.workers.submit(job, device)
        self.tasks.append(Task(device, future, text, time.monotonic(), job, edit))
        self.show_phase()

    def note_device(self, device: str, doing: str, last: str | None = None) -> None:
        """Note what a device does: for the panel, and in the log for who watches from elsewhere.

        doing: "" for nothing
        last: what came of what it did before; as noted already if left out
        """
        last = self.now[device].last if last is None else last
        self.now[device] = DeviceNow(device, doing, time.time(), last)
        record("device", device=device, doing=doing, last=last)

    def look_for_workers(self) -> None:
        """Take the devices out of the night whose workers do not come back, and in again when they do."""
        for line in self.workers.tend():
            self.panel.note(line)
        now = time.monotonic()
        missing = self.workers.missing()
        self.missing_since = {device: self.missing_since.get(device, now) for device in missing}
        for device, since in self.missing_since.items():
            if now - since > RESTART_SECONDS:
                for task in self.tasks:
                    if task.device == device:  # it was given away before the worker was missed
                        task.future.cancel()
            if device in self.devices and now - since > WORKER_SECONDS:
                self.lost.add(device)
                self.take_out(device, f"its worker was not started again within {WORKER_SECONDS:.0f} s")
        for device in sorted(self.lost - missing):
            self.lost.remove(device)
            self.devices.append(device)
            self.note_device(device, "")
            self.panel.note(f"{device} is back")
        if not self.devices and now - min(self.missing_since.values(), default=now) > LOST_SECONDS:
            self.gave_up = f"no device came back within {LOST_SECONDS / 60:.0f} minutes"

    def take_out(self, device: str, why: str) -> None:
        """Give a device no more work. Without any, the night ends, or waits for machines that lend some."""
        self.devices.remove(device)
        self.note_device(device, f"no more work: {why}")
        self.panel.note(f"{device} gets no more work: {why}")
        if not self.devices and not any(self.hosts[one] for one in self.lost):
            self.gave_up = f"no device is left: {device}: {why}"

    # --- What the devices answer ----------------------------------------------------------------------------

    def take_answer(self, task: Task, answer: JobAnswer) -> None:
        """Take what became of a task: a verdict, or a failure.

        Raises:
            TurnFailed: the edit failed its dry run.
        """
        self.hours.dry_seconds = answer.seconds or self.hours.dry_seconds
        if answer.files:  # made on another machine
            answer = self.take_run(task, answer)
        row = find_row(answer.run)
        if task.device in self.devices:
            last = told_of(row) if row else f"{answer.status}: {shown(answer.reason)}"
            self.note_device(task.device, "", last)
        self.show_phase()
        if row and Flag.REPEAT in row.flags:  # here a job repeats its run itself
            self.panel.note(row.reason)
            again = replace(task.job, seed=row.seed + 1, has_dry_run=False)
            self.submit(again, task.device, task.text, task.edit)
            return
        if answer.status == LOST and self.workers.is_shaky(task.device):
            self.panel.note(f"{task.device} was lost with «{task.text}»: it is done again")
            self.hold_back(task)
            self.look_for_workers()
            return
        self.count_failure(task, answer, row)
        if row and row.judged:
            self.take_row(task, row)
        elif row or answer.run or answer.status in ("error", LOST) or task.edit is None:
            self.try_again(task, row.reason if row else answer.reason or "its row is missing")
        else:
            refused = self.refused_row(task.edit, answer.status, answer.reason, answer.seconds)
            ledger().append(refused)
            why = f"failed its dry run on {task.device} ({answer.status}): {answer.reason}\n{answer.log_tail}"
            raise self.refuse(task.edit, why, refused.run)

    def take_run(self, task: Task, answer: JobAnswer) -> JobAnswer:
        """Add a run of another machine to those of this one. Returns an error where it is another run."""
        remember_shares(task.source, answer.step_shares)
        expected = {
            "source": task.source,
            "seed": task.job.seed,
            "commit": task.job.commit[:7],
            "board": self.setting.board,
        }
        return take_run(answer, expected)

    def count_failure(self, task: Task, answer: JobAnswer, row: Row | None) -> None:
        """Count the jobs in a row without a score on a device.

        It may be their edits' fault. A device that does not score the committed trainer then is taken out:
        see test_devices. A run without a verdict says nothing of the device.
        """
        device = task.device
        if row and not row.judged:
            return
        if row and row.scored:
            self.failed[device] = 0
            return
        self.failed[device] += 1
        is_test = task.edit is None and self.failed[device] > MOST_FAILURES
        if is_test and device in self.devices:
            count = self.failed[device]
            why = shown(row.reason if row else answer.reason)
            last = f"the last of the committed trainer: {why}"
            self.take_out(device, f"{count} jobs in a row without a score, {last}")

    def take_row(self, task: Task, row: Row) -> None:
        """Take a run that has its verdict."""
        self.failures.clear()
        self.no_agents_before = 0.0
        self.without_verdict = 0
        self.tries.pop(task.key, None)
        if task.edit is None:
            if task.text == BASELINE:
                self.record_experiment(row)
            self.compare_baselines(task.device, row)
            return
        if task.edit.agent:
            save_answer(row.run, task.edit.answer)
        self.drop_judged()

    def try_again(self, task: Task, why: str) -> None:
        """Have a task without a verdict done anew after a pause.

        An edit that never gets one is stashed. Where nothing gets one, the night ends.
        """
        self.tries[task.key] += 1
        self.without_verdict += 1
        self.hold_back(task)
        self.panel.note(f"no verdict on {task.device} on «{task.text}»: {why}")
        if task.edit and self.tries[task.key] >= NO_VERDICT_TRIES:
            self.waiting.stash(task.edit)
        if self.without_verdict >= NO_VERDICT_TRIES * self.at_once():
            count = self.without_verdict
            self.gave_up = f"gave up after {count} runs without a verdict in a row: «{task.text}»: {why}"

    def hold_back(self, task: Task) -> None:
        """Have a task done again, after a pause."""
        self.not_before[task.key] = time.monotonic() + self.night.pause
        if task.edit is None and task.device in self.compared:
            self.compared.remove(task.device)

    def compare_baselines(self, device: str, row: Row) -> None:
        """Say how the devices compare with the first one that ran the committed trainer, when all have."""
        if row.scored:
            self.baselines.setdefault(device, []).append(row)
        else:
            self.panel.note(f"{device}: the committed trainer has no score: {row.status} ({row.reason})")
        if any(task.edit is None for task in self.tasks):
            return
        believed = survey_board(ledger().rows(), self.setting.board)
        sigma = believed.sigma if believed else PRIOR.sigma
        runs = sum(map(len, self.baselines.values()))
        for other in list(self.baselines)[1:]:
            line, errors = compare_rows(self.baselines, other, sigma)
            if runs >= REPEATS and abs(errors) > FAR_ERRORS:
                line += f"; that is more than {FAR_ERRORS:g} errors apart: give each a night of its own"
            if line not in self.told:
                self.told.add(line)
                self.panel.note(line)

    # --- The branch -----------------------------------------------------------------------------------------

    def drop_judged(self) -> None:
        """Follow the verdicts on edits that wait, in the order of the ledger, and take them from the list.

        It may be cut off and repeated: after kill -9 the next loop does so at its start.
        """
        running = {task.edit.commit for task in self.tasks if task.edit}
        edits = {edit.commit[:7]: edit for edit in self.waiting if edit.commit not in running}
        if not edits:
            return
        verdicts = {
            row.commit: row for row in ledger().rows() if row.decides and row.judged and row.commit in edits
        }
        for row in verdicts.values():
            edit = edits[row.commit]
            self.follow_verdict(edit, row)
            self.waiting.drop(edit)
            self.record_experiment(row)

    def follow_verdict(self, edit: Edit, row: Row) -> None:
        """Put the trainer to build on onto the branch, and merge an edit whose parent is not the best."""
        name = self.trainer.name
        self.notice_move()
        self.take_from_tree()  # what a person wrote there was made on the branch as it is
        repo.save_ref(row.run, edit.commit)
        best = repo.content(self.head, name)  # before this verdict, also where it is followed once more
        there = repo.committed_source(name)
        build_on = build_on_now(ledger().rows(), self.setting.board)
        if build_on and build_on != there:
            if build_on == row.source:
                message = lab_message(edit.answer.description, row)
                kept = repo.commit_alone(name, message, repo.content(edit.commit, name))
                repo.advance_branch(kept, name)
            else:
                put_on_branch(name, row.board, build_on)
        is_gain = row.scored and row.effect < 0 and row.build_on != ""
        if is_gain and source_hash(best) != row.source and repo.content(edit.base, name) != best:
            self.merge(edit, best)
        # What a person had left in the working tree is judged: it goes, as in `try`.
        repo.follow(name, self.waiting.texts_of(edit))
        self.head = repo.head()
        self.save_state()

    def merge(self, edit: Edit, best: bytes) -> None:
        """Let an edit wait that is another one and what was the best when it ended, together."""
        name = self.trainer.name
        theirs = repo.content(edit.commit, name)
        merged = repo.merge(best, repo.content(edit.base, name), theirs)
        description = edit.answer.description
        if merged is None:
            self.messages.append(
                f"«{description}» was better than what it was made on, and conflicts with what was kept "
                "meanwhile. Do the same on the trainer as it is now."
            )
            self.panel.note(f"«{description}» conflicts with what was kept meanwhile: the next agent is told")
        elif merged not in (best, theirs):
            text = f"merged: {description}"
            commit = repo.commit_alone(name, text, merged)
            both = Edit(commit, repo.head(), Answer(text), edit.agent)
            running = [task.edit for task in self.tasks]
            others = [one for one in self.waiting if one.answer.description != text or one in running]
            self.waiting.change([both, *others])  # the first: both parts are gains already

    def notice_move(self) -> None:
        """Note in the ledger where a person has moved the branch: what is there now is built on."""
        head = repo.head()
        branch = repo.branch()
        if head == self.head and branch == self.branch:
            return
        name = self.trainer.name
        there = repo.committed_source(name)
        build_on = build_on_now(ledger().rows(), self.setting.board)
        before = repo.content(self.head, name) if repo.is_commit(self.head) else b""
        if build_on and there != build_on:
            ledger().append(self.moved_row(there))
            self.panel.note("the branch was moved by hand: what is there now is built on")
        elif before and source_hash(before) != there:  # by this loop, which was killed then
            repo.follow(name, {repo.committed_blob(name, self.head)})
            return  # the verdict is followed once more: see follow_verdict
        self.head = head
        self.branch = branch
        self.save_state()

    def moved_row(self, source: str) -> Row:
        """Return the row that says that a person put a trainer on the branch, given its content hash."""
        board = self.setting.board._asdict()
        marks = [Flag.BY_HAND] if board.pop("boxed") else [Flag.BY_HAND, Flag.UNBOXED]
        text = "the branch as a person moved it"
        return Row(
            status=MOVED, description=text, time=now_utc(), build_on=source, marks=",".join(marks), **board
        )

    def learn_noise(self) -> None:
        """Do nothing: the runs of the committed trainer on the other devices tell of the noise."""

    # --- The agents -----------------------------------------------------------------------------------------

    def ask_agents(self) -> None:
        """Ask as many agents for an edit as there is room for."""
        if time.monotonic() < self.no_agents_before:
            return
        free = len(self.free_devices())
        room = min(self.agents, free + (self.agents if self.night.ahead else 0)) - len(self.turns)
        for number in range(room - len(self.idle_edits())):
            seconds = self.hours.to_think(runs=1 if number < free else 2)
            if not seconds or self.is_enough_asked():
                return
            self.start_turn(seconds)

    def is_enough_asked(self) -> bool:
        """Return whether the edits that wait or are made are as many as experiments are left."""
        most = self.night.experiments
        coming = len(self.experiments_under_way()) + len(self.idle_edits()) + len(self.turns)
        return most is not None and self.panel.done + coming >= most

    def start_turn(self, seconds: float) -> None:
        """Start an agent on the trainer that is the best now. Raises as turn.begin_turn."""
        self.complaint = "\n\n".join(self.messages[-MOST_MESSAGES:])
        prompt = self.write_prompt(self.describe_work())
        place = min(set(range(self.agents)) - {one.place for one in self.turns})
        self.turns_begun += 1
        seed = self.night.seed + self.turns_begun  # agents at work at once must not draw the same
        with defer_signals():
            turn = self.start_agent(prompt, repo.head(), seconds, seed, place)
            self.turns.append(AgentAtWork(turn, place))
        self.stamp = ""
        self.messages.clear()
        self.show_phase()

    def describe_work(self) -> str:
        """Return what an agent is told of the last result, and of what is under way."""
        texts = [self.result]
        running = [task.text for task in self.tasks if task.edit]
        waiting = [edit.answer.description for edit in self.idle_edits()]
        if running or waiting:
            texts.append("\n".join([UNDER_WAY, *(f"- {text}" for text in (*running, *waiting))]))
        if self.turns:
            texts.append(OTHERS.format(count=len(self.turns)))
        return "\n\n".join(texts)

    def has_ended(self, turn: Turn) -> bool:
        """Return whether an agent has ended, or must."""
        if turn.child.poll() is not None or time.monotonic() > turn.deadline:
            return True
        return prints_without_end(turn.files)

    def take_edit(self, at_work: AgentAtWork) -> None:
        """Let the edit of an agent wait that has ended. Raises TurnFailed where it made none."""
        self.turns.remove(at_work)
        try:
            self.waiting.add(end_turn(at_work.turn, self.trainer.name))
        finally:
            self.record_turn(at_work.turn)
            self.show_phase()

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
        return replace(super().state(), stamp=" ".join(filter(None, stamps)), head=self.head)

    def finish_interrupted(self) -> None:
        """Finish what a signal interrupted: agents and devices are ended already, their runs get a row."""
        try:
            record_killed_runs()
            self.drop_judged()
        except Exception as error:
            self.panel.note(f"the next loop follows the last verdicts: {first_line(error)}")

    def show_phase(self) -> None:
        """Show how many devices and agents are at work."""
        text = f"{len(self.tasks)} of {len(self.devices)} devices and {len(self.turns)} agents at work"
        if text != self.phase:
            self.phase = text
            record("phase", phase="fleet", text=text)
        self.panel.phase = f"{self.panel.done + 1}{self.panel.of_all()}: {text}"


def compare_rows(runs: Mapping[str, Sequence[Row]], device: str, sigma: float) -> tuple[str, float]:
    """Return how a device compares with the first one: (a line, the difference in standard errors).

    Args:
        runs: of one trainer, by device.
        device: another than the first.
        sigma: of val_bpb over seeds, in bpb.
    """
    first_device, first = next(iter(runs.items()))
    mine = runs[device]
    difference = fmean(row.val_bpb for row in mine) - fmean(row.val_bpb for row in first)
    rates = [fmean(row.tokens_per_second for row in rows) for rows in (mine, first)]
    speed = rates[0] / max(rates[1], 1.0)
    errors = difference / (sigma * (1 / len(mine) + 1 / len(first)) ** 0.5)
    return f"{device} against {first_device}: {difference:+.6f} bpb, {speed:.2f} of its speed", errors


def told_of(row: Row) -> str:
    """Return a result in a few words."""
    score = f" {row.val_bpb:.6f}" if row.scored else ""
    return f"{row.status}{score} {row.description}"


def shown(reason: str) -> str:
    """Return a reason in a line that is not too long."""
    return clip(single_line(reason), LONGEST_REASON)
