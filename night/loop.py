"""
`autoresearch loop`: the night. A headless coding agent edits the trainer, the loop does everything else.

A turn: the agent gets the program, the ledger and the last result, edits the trainer in a folder of its own
and ends with a line `experiment: what I did`. The edit is checked (it compiles, it survives a dry run of
seconds), tried, and kept or dropped. The person's working tree is touched only when it is kept. A turn that
fails is recorded, and the next one follows after a pause that grows. A loop that was cut off goes on when it
is started again with the same command. At its end the branch has the trainer that is believed best, and where
an `until` left the time for it, that trainer is tested against the baseline.
"""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from backends.platforms import mac_state
from launcher.belief import PRIOR, REPEATS, visible_change
from launcher.box import missing_walls
from launcher.confirm import Contest, confirm, seconds_to_first_look
from launcher.console import say
from launcher.device import WhenBusy, awake, look_around, require_quiet
from launcher.harness import source_hash
from launcher.ledger import EVIDENCE, MOVED, STATUSES, Flag, Row
from launcher.processes import Stopped, defer_signals, end_leftovers, stop_on_signals
from launcher.report import write_report
from launcher.run import EXIT_INTERRUPTED, POWER_FLAGS, Request, dry_run
from launcher.runs import home, ledger, new_run_id, now_utc, run_dir
from launcher.setting import Setting
from launcher.verdict import best_since_moved, board_runs, fresh_seed, survey_board
from night import repo
from night.agent import Answer, TurnFailed, last_words, read_said, save_answer
from night.agents import Agent
from night.lab_book import remember_shares
from night.panel import Panel, RunDetail
from night.program import write_turn
from night.state import Edit, LoopState, read_state, record, state_path, write_state
from night.trial import (
    check_harness,
    check_source,
    finish_trial,
    hold_repository,
    put_on_branch,
    run_source,
    run_trial,
    scored_before,
)
from night.turn import RUNNING, Turn, begin_turn, check_agent, end_turn, rebase
from prepare import ROOT, UserError, first_line

GIVE_UP = 20  # failed turns in a row after which the loop ends
GIVE_UP_ALIKE = 3  # in a row that the agent is not to blame for: waiting does not mend them
LONGEST_PAUSE = 1800.0  # seconds; the pause after a failed turn doubles up to this
LONGEST_PAUSE_ALIKE = 15.0
LONGEST_WAIT = 1800.0  # seconds that a night waits for other processes after a run beside them
FREE_EDITS = 3  # bad edits in a row that go back to the agent without a pause
NO_VERDICT_TRIES = 3  # runs of an edit without a verdict (another process on the device), then it is stashed
LARGEST_RESERVE = 0.25  # of the night, that a claim may take at its end
HUNDRED = 100  # experiments of a night without a limit, for its first line
RUN_SECONDS = 1.3  # of a whole run, for each second of training, before one was seen
AGENTS_FAULT = ("agent", "edit")  # kinds of failures that another turn may not have
BASELINE = "baseline: the trainer as committed"
UNCOMMITTED = "what lay in the trainer, uncommitted"


@dataclass
class Night:
    """What `autoresearch loop` was asked to do."""

    agent: Agent
    setting: Setting  # of every experiment
    seed: int = 1
    experiments: int | None = None  # None: no limit
    until: datetime | None = None  # None: no limit
    agent_seconds: float = 900.0  # that an agent has for a turn
    pause: float = 30.0  # seconds after a first failed turn
    confirms: bool = True  # the end of a night with an `until` is for the claim
    when_busy: WhenBusy = "go-on"  # what to do where other processes compute when it begins
    boxed: bool = False  # the agent works in a box
    ahead: bool = False  # the agent thinks of the next edit while an experiment runs

    def seconds_left(self) -> float:
        """Return the seconds until the night ends, infinite without an `until`."""
        if self.until is None:
            return math.inf
        return max(0.0, (self.until - datetime.now()).total_seconds())


def parse_until(text: str) -> datetime:
    """Return the next time at which the clock on the wall shows HH:MM. Raises UserError."""
    try:
        clock = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UserError(f"--until: {text!r} is not a time of day such as 07:30", 2) from None
    now = datetime.now()
    today = datetime.combine(now, clock)
    return today if today > now else today + timedelta(days=1)


def run_night(night: Night) -> int:
    """Run the night and print what came of it.

    Returns the exit code: 0 at its end, 1 when it gave up, 130 when it was interrupted.

    Raises:
        UserError: no result of the night would count, or as trial.hold_repository.
    """
    night.setting.require_device()
    require_power()
    if night.boxed and missing_walls():
        raise UserError(f"--box: {missing_walls()}", 2)
    panel = Panel(night.experiments, night.until)
    with hold_repository(), stop_on_signals(), awake(), panel:
        look_around(night.setting.platform.device_kind, night.when_busy)
        if night.agent.is_known:
            panel.enter(f"is {night.agent.name} ready?")
            check_agent(night.agent, night.setting, night.boxed)
        ended, code = Loop(night, panel).run()
    panel.print_summary(ended)
    return code


def require_power() -> None:
    """Raise UserError on a Mac whose results would not count."""
    laptop = mac_state()
    for key, flag in POWER_FLAGS.items():
        if laptop.get(key):
            raise UserError(
                f"no result of the night would count ({flag}): plug this Mac in and leave low-power mode"
            )


# ---------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------


class NightOver(Exception):
    """The night ends in the middle of a turn. The message says why."""


class Loop:
    """Turn after turn until something ends the night. The repository must be held."""

    def __init__(self, night: Night, panel: Panel) -> None:
        self.night = night
        self.panel = panel
        self.setting = night.setting
        self.trainer = night.setting.trainer
        self.edit: Edit | None = None  # without a verdict: of this loop, or left by an earlier one
        self.turn: Turn | None = None  # of the agent that thinks ahead, while an experiment runs
        self.next_edit: Edit | None = None  # that it made meanwhile
        self.result = ""  # of the last experiment, for the agent
        self.complaint = ""  # about the last turn, for the agent
        self.failures = 0  # failed turns in a row
        self.failed_alike = 0  # of them the last ones, that failed in one way
        self.last_failure = ""  # in which: see TurnFailed.kind
        self.longest_run = RUN_SECONDS * night.setting.budget  # seconds
        self.total_seconds = night.seconds_left()  # of the night
        self.reserve = 0.0  # seconds at the end of the night that are for the claim

    def run(self) -> tuple[str, int]:
        """Run the loop to its end. Returns (why it ended, exit code)."""
        try:
            self.resume()
            self.record_begin()
            self.panel.note(self.describe_outlook())
            ended, code = self.take_turns()
            self.end_on_best()
            self.claim()
        except Stopped as stop:
            ended, code = f"interrupted ({stop})", EXIT_INTERRUPTED
            with defer_signals():
                end_unfinished_turn()
                finish_trial()
        self.leave_state()
        record("end", why=ended, done=self.panel.done, kept=self.panel.kept)
        return ended, code

    def resume(self) -> None:
        """Go on where an earlier loop was cut off."""
        state = read_state()
        end_unfinished_turn()
        self.edit = None if state.edit and has_verdict(state.edit) else state.edit
        if state.done is not None and state.experiments == self.night.experiments:
            self.panel.done = state.done
            self.panel.note(f"going on with a loop that was cut off after {state.done} experiments")
        rows = ledger().rows()
        self.show_best()
        runs = [row for row in rows if row.status in STATUSES and not row.flags & EVIDENCE]
        self.result = describe_result(runs[-1]) if runs else "none: the ledger is empty"

    def enter(self, phase: str, text: str, limit: float | None = None) -> None:
        """Begin a phase of the night: shown to the person, and in the log for the report.

        limit: seconds that it may take
        """
        record("phase", phase=phase, text=text)
        self.panel.enter(text, limit)

    def record_begin(self) -> None:
        record(
            "begin",
            agent=self.night.agent.command,
            experiments=self.night.experiments,
            until=str(self.night.until or ""),
            done=self.panel.done,
        )

    def take_turns(self) -> tuple[str, int]:
        """Take turns until there is a reason to end. Returns (the reason, exit code)."""
        while True:
            try:
                enough = self.find_end()
                if enough:
                    return enough, 0
                row = self.finish_last_turn() or self.take_turn()
            except NightOver as over:
                return str(over), 0
            except Stopped:
                raise
            except Exception as error:
                pause = self.record_failure(error)
                if self.gives_up():
                    reason = first_line(error)
                    return f"gave up after {self.failures} turns without an experiment in a row: {reason}", 1
                self.wait(pause)
            else:
                self.record_experiment(row)
                self.learn_noise()

    def find_end(self) -> str:
        """Return why no further experiment is begun, "" when one is."""
        night = self.night
        if night.experiments and self.panel.done >= night.experiments:
            return f"{night.experiments} experiments were asked for"
        self.reserve = self.find_reserve()
        if night.until and self.longest_run + self.reserve > night.seconds_left():
            claimed = " and leave time to confirm the best" if self.reserve else ""
            return f"another experiment would not end by {night.until:%H:%M}{claimed}"
        return ""

    def find_reserve(self) -> float:
        """Return the seconds at the end of the night that are for the claim: enough for its first look.

        None in a night that is too short for it, or while there is nothing to claim.
        """
        contest = self.contest() if self.night.confirms and self.night.until else None
        if contest is None:
            return 0.0
        seconds = seconds_to_first_look(contest, self.longest_run)
        return seconds if seconds <= LARGEST_RESERVE * self.total_seconds else 0.0

    def seconds_to_train(self) -> float:
        """Return the seconds that are left for experiments."""
        return max(0.0, self.night.seconds_left() - self.reserve)

    def contest(self) -> Contest | None:
        """Return the trainer that is believed best, and the baseline; None while they are the same."""
        rows = ledger().rows()
        board = self.setting.board
        runs = board_runs(rows, board)
        best = best_since_moved(rows, board, repo.committed_source(self.trainer.name))
        if not best or best.source == runs[0].source:
            return None
        return Contest(runs[0], best)

    def describe_outlook(self) -> str:
        """Return a line about what this night can find: the noise, and the changes that it can see."""
        night = self.night
        count = night.experiments or HUNDRED
        if night.until:
            count = min(count, max(1, int(night.seconds_left() / self.longest_run)))
        believed = survey_board(ledger().rows(), self.setting.board)
        sigma = believed.sigma if believed else PRIOR.sigma
        visible = visible_change(sigma, count)
        whence = (
            f"as believed from {len(believed.trainers)} trainers" if believed else "assumed, none is known"
        )
        return (
            f"noise between seeds {sigma:.6f} ({whence}); a run shows a change of {visible.run:.6f}, "
            f"{count} experiments one of {visible.night:.6f}; more seconds of training, averaged weights or "
            "nothing else on the device would lower it"
        )

    def end_on_best(self) -> None:
        """At the end: put the trainer that is believed best on the branch."""
        head = repo.committed_source(self.trainer.name)
        try:
            best = best_since_moved(ledger().rows(), self.setting.board, head)
            if best and best.source != head and put_on_branch(self.trainer.name, best.board, best.source):
                # Data, so that the next night does not take it for a move of a person's.
                ledger().append(replace(best, status=MOVED, build_on=best.source, time=now_utc()))
        except (UserError, OSError) as error:
            self.panel.note(f"the branch stays where it is: {first_line(error)}")

    def claim(self) -> None:
        """At the end: test the best against the baseline, where there is time for it."""
        try:
            self.panel.claim = self.find_claim()
        except (UserError, OSError) as error:
            self.panel.claim = f"none was tested: {first_line(error)}"
        record("claim", claim=self.panel.claim)

    def find_claim(self) -> str:
        """Return what a person may repeat of the night. Raises UserError, OSError, Stopped."""
        night = self.night
        contest = self.contest()
        if contest is None:
            return "none: nothing is believed better than the baseline"
        if not (night.confirms and night.until):
            return "none was tested: autoresearch confirm"
        if seconds_to_first_look(contest, self.longest_run) > night.seconds_left():
            return "none was tested, the night was too short: autoresearch confirm"
        self.enter("confirm", f"confirming: {contest.best.description}")
        return confirm(self.setting, contest, lambda seconds: seconds < night.seconds_left()).sentence

    def record_experiment(self, row: Row) -> None:
        """Take an experiment down: for the person, the agent and the log."""
        self.failures = 0
        self.failed_alike = 0
        self.complaint = ""
        self.result = describe_result(row)
        self.longest_run = max(self.longest_run, row.total_seconds)
        self.panel.seconds_a_run = self.longest_run
        self.panel.count(row)
        self.show_best()
        record(
            "experiment",
            run=row.run,
            status=row.status,
            val_bpb=row.val_bpb,
            description=row.description,
            reason=row.reason,
        )
        self.write_page()
        self.panel.note(
            f"experiment {self.panel.done}: {row.status} {row.val_bpb:.6f} {row.description} [{row.reason}]"
        )

    def write_page(self) -> None:
        """Write the page of the night. What goes wrong with it does not touch the night."""
        try:
            write_report([home() / "results.tsv"], home() / "report", complain=lambda line: None)
        except Exception as error:
            self.panel.note(f"the report is not written: {first_line(error)}")

    def show_best(self) -> None:
        """Show the trainer that is believed best, and what is believed of it."""
        rows = ledger().rows()
        believed = survey_board(rows, self.setting.board)
        try:
            head = repo.committed_source(self.trainer.name)
        except UserError:  # the next turn says what is wrong with git
            return
        best = best_since_moved(rows, self.setting.board, head)
        self.panel.best = best
        self.panel.belief = believed.trainers[best.source] if believed and best else None

    def record_failure(self, error: Exception) -> float:
        """Take a failed turn down. Returns the seconds to pause."""
        kind = kind_of(error)
        self.failures += 1
        self.failed_alike = self.failed_alike + 1 if kind == self.last_failure else 1
        self.last_failure = kind
        self.panel.turns_lost += 1
        self.complaint = str(error)
        pause = 0.0
        if kind != "edit" or self.failed_alike >= FREE_EDITS:
            longest = LONGEST_PAUSE if kind in AGENTS_FAULT else LONGEST_PAUSE_ALIKE
            pause = min(longest, self.night.pause * 2 ** (self.failures - 1))
        again = f"; again in {pause:.0f} s" if pause else ""
        self.panel.note(f"no experiment: {first_line(error)}{again}")
        said = {"traceback": traceback.format_exception(error)} if kind == "launcher" else {}
        record("failed", kind=kind, reason=str(error), failures=self.failures, pause=pause, **said)
        return pause

    def gives_up(self) -> bool:
        """Return whether the turns fail in such a way that the night ends."""
        if self.last_failure == "device":  # three runs were waited for already
            return True
        alike = self.last_failure not in AGENTS_FAULT and self.failed_alike >= GIVE_UP_ALIKE
        return alike or self.failures >= GIVE_UP

    def wait(self, seconds: float) -> None:
        if self.longest_run < min(seconds, self.seconds_to_train()):
            seconds -= self.run_again("in a pause")  # what it tells of the noise is free then
        if seconds > 0:
            self.enter("pause", f"pausing {seconds:.0f} s", seconds)
            time.sleep(min(seconds, self.seconds_to_train()))

    def learn_noise(self) -> None:
        """Run the committed trainer again while scores differ much and nothing says whether that is noise.

        Two more runs of it are enough, once on a board. Where scores differ as on most, there are none.
        """
        for _ in range(REPEATS - 1):
            believed = survey_board(ledger().rows(), self.setting.board)
            if not (believed and believed.noise_is_open) or self.longest_run > self.seconds_to_train():
                return
            if not self.run_again("is it noise?"):
                return

    def run_again(self, why: str) -> float:
        """Run the committed trainer with a fresh seed, as evidence alone.

        Returns the seconds that it took, 0 where it could not be run.
        """
        began = time.monotonic()
        source = repo.content("HEAD", self.trainer.name)
        seed = fresh_seed(ledger().rows(), [source_hash(source)])
        self.enter("noise", f"{why}: the committed trainer once more, seed {seed}")
        request = Request(
            self.setting,
            f"the committed trainer once more: {why}",
            seed,
            flags=(Flag.NOISE,),
            progress=RunDetail(self.setting.budget, self.panel),
        )
        try:
            row = run_source(request, source, repo.head())
        except (UserError, OSError):  # the pause is for what is wrong
            return 0.0
        if Flag.INTERRUPTED in row.flags:
            raise Stopped("during a run")
        return time.monotonic() - began

    def save_state(self, stamp: str = "") -> None:
        """Write what the next loop needs, should this one be killed. stamp: of the turn under way."""
        edit = self.edit or self.next_edit
        if edit:
            repo.set_ref("untried", edit.commit)  # git removes in time what nothing names
        write_state(LoopState(self.night.experiments, self.panel.done, stamp, edit))

    def leave_state(self) -> None:
        """Leave an edit without a verdict to the next loop."""
        edit = self.edit or self.next_edit
        if edit:
            write_state(LoopState(edit=edit))
            say(f"no verdict yet on «{edit.answer.description}»: the next loop tries it first")
        else:
            state_path().unlink(missing_ok=True)

    # --- A turn ---------------------------------------------------------------------------------------------

    def finish_last_turn(self) -> Row | None:
        """Finish a trial that an error left unfinished. Returns its verdict."""
        self.turn = None
        end_unfinished_turn()
        row = finish_trial()
        if row and row.judged:
            self.edit = None
        self.save_state()
        return row if row and row.judged else None

    def take_turn(self) -> Row:
        """Make one experiment: the baseline, what lies in the trainer already, or the agent's idea.

        Returns its row.

        Raises:
            TurnFailed, UserError: no experiment came of it.
            NightOver: there is no time left to train.
            Stopped: the launcher was asked to end.
        """
        if self.needs_baseline():
            return self.run_baseline()
        check_harness(self.trainer.name)  # before an agent is called in vain
        self.edit = self.edit_of_tree() or self.edit_at_hand() or self.ask_agent()
        self.save_state()
        self.check(self.edit)
        return self.train(self.edit)

    def needs_baseline(self) -> bool:
        """Return whether the committed trainer has no run on this board yet: nothing can be said without.

        One that failed is not run again: the agent is told of it, and may mend it.
        """
        source = repo.committed_source(self.trainer.name)
        board = self.setting.board
        tried = [row for row in ledger().rows() if row.source == source and row.board == board and row.judged]
        return source != "" and not tried

    def run_baseline(self) -> Row:
        """Run the committed trainer, whatever lies in the working tree.

        Raises:
            TurnFailed: there was no verdict.
            NightOver, Stopped: as train.
        """
        source = repo.content("HEAD", self.trainer.name)
        self.measure_step(source)
        request = Request(
            self.setting,
            BASELINE,
            self.night.seed,
            parent=source,
            progress=RunDetail(self.setting.budget, self.panel),
        )
        return self.run_to_verdict(BASELINE, lambda: run_source(request, source, repo.head()))

    def measure_step(self, source: bytes) -> None:
        """Do a dry run of a trainer: the agent is told the shares of its step. The run reuses its code."""
        self.enter("dry run", f"dry run: {BASELINE}")
        outcome, _ = dry_run(self.setting, source, self.night.seed)
        remember_shares(source_hash(source), outcome.step_shares)

    def edit_of_tree(self) -> Edit | None:
        """Return the edit that lies in the working tree, None when there is none."""
        name = self.trainer.name
        if not repo.is_edited(name):
            return None
        edit = self.edit
        if edit and (edit.base, repo.committed_blob(name, edit.commit)) == (repo.head(), repo.blob(name)):
            return edit
        if edit:
            self.put_aside(edit, f"stray/{new_run_id()}")
        return Edit(repo.commit_alone(name, UNCOMMITTED), repo.head(), Answer(UNCOMMITTED))

    def edit_at_hand(self) -> Edit | None:
        """Return the edit that has no verdict yet, on what the branch has now. None when there is none."""
        edit = self.edit or self.next_edit
        self.edit = self.next_edit = None
        if edit is None:
            return None
        rebased = rebase(edit, self.trainer.name)
        if rebased is None:
            ref = repo.save_ref(f"stray/{new_run_id()}", edit.commit)
            say(f"«{edit.answer.description}» does not go together with what is there now; it stays as {ref}")
        return rebased

    def ask_agent(self) -> Edit:
        """Let the agent edit the trainer. Returns its edit.

        Raises:
            TurnFailed: it made none.
        """
        # What it thinks of must still be trained in the time that is left.
        seconds = min(self.night.agent_seconds, max(1.0, self.seconds_to_train() - self.longest_run))
        self.enter("agent", "the agent thinks", seconds)
        turn = self.begin_turn(repo.head(), self.result, seconds)
        self.panel.words = lambda: last_words(turn.files)
        try:
            return end_turn(turn, self.trainer.name)
        finally:
            self.record_turn(turn)
            self.save_state()

    def record_turn(self, turn: Turn) -> None:
        """Take down what a turn took: seconds, and tokens and dollars where the agent prints them."""
        said = read_said(turn.agent, turn.files)
        self.panel.tokens += said.tokens
        self.panel.cost += said.cost
        seconds = round(time.monotonic() - turn.began, 1)
        record(
            "turn",
            stamp=turn.files.stamp,
            agent=turn.agent.name,
            seconds=seconds,
            tokens=said.tokens,
            cost=said.cost,
        )

    def begin_turn(self, base: str, result: str, seconds: float) -> Turn:
        """Start the agent on a commit. result: of the last experiment. Raises as turn.begin_turn."""
        night = self.night
        stamp = new_run_id()
        self.save_state(stamp)
        prompt = write_turn(self.setting, result, self.complaint, self.panel.left())
        settings = self.setting.run_settings(night.seed).to_env()
        if night.agent.is_builtin:
            settings["PYTHONPATH"] = str(ROOT)
        return begin_turn(night.agent, prompt, base, stamp, seconds, settings, night.boxed)

    def check(self, edit: Edit) -> None:
        """Check an edit before minutes are spent on it: it compiles, is new, and survives a dry run.

        Raises:
            TurnFailed: it does not. The edit is then put aside.
        """
        description = edit.answer.description
        source = repo.content(edit.commit, self.trainer.name)
        try:
            check_source(self.trainer.name, source)
        except UserError as error:
            self.put_aside(edit, f"stray/{new_run_id()}")
            raise TurnFailed("edit", f"«{description}»: {error}") from None
        earlier = scored_before(source, self.setting)
        if earlier:
            self.put_aside(edit, f"stray/{new_run_id()}")
            raise TurnFailed(
                "edit",
                f"«{description}»: the same source was scored by run {earlier.run}: "
                f"{earlier.val_bpb:.6f}, {earlier.status}",
            )
        self.enter("dry run", f"dry run: {description}")
        outcome, log_tail = dry_run(self.setting, source, self.night.seed)
        if not outcome.status:
            remember_shares(source_hash(source), outcome.step_shares)
            return
        row = self.dry_row(description)
        row.status = outcome.status
        row.reason = f"dry run: {outcome.reason}"
        row.total_seconds = outcome.total_seconds
        row.commit = edit.commit[:7]
        self.put_aside(edit, row.run)
        ledger().append(row)
        raise TurnFailed(
            "edit",
            f"«{description}» failed its dry run ({outcome.status}): {outcome.reason}\n{log_tail}",
        )

    def put_aside(self, edit: Edit, name: str) -> None:
        """Keep an edit under a ref, and say which. Where it lies in the working tree, that is reverted."""
        trainer = self.trainer.name
        ref = repo.save_ref(name, edit.commit)
        repo.follow(trainer, {repo.committed_blob(trainer, edit.commit)})
        self.edit = None
        self.save_state()
        self.panel.note(f"put aside «{edit.answer.description}»: it stays reachable as {ref}")

    def dry_row(self, description: str) -> Row:
        """Return the row of an edit that failed its dry run, without what went wrong."""
        return Row(
            description=description,
            run=new_run_id(),
            time=now_utc(),
            platform=self.setting.platform.name,
            track=self.setting.track.name,
            seed=self.night.seed,
            marks=Flag.DRY,
        )

    def train(self, edit: Edit) -> Row:
        """Try an edit. Returns the row of the verdict.

        Raises:
            TurnFailed: there was no verdict. The edit is then put aside.
            NightOver: there is no time left for it. The next loop tries it first.
            Stopped: the run was interrupted.
        """
        description = edit.answer.description
        detail = RunDetail(self.setting.budget, self.panel, lambda: self.think_ahead(edit))
        request = Request(self.setting, description, self.night.seed, progress=detail, agent=edit.agent)

        def attempt() -> Row:
            row = run_trial(request, edit.commit, self.collect_next_edit)
            if edit.agent:
                save_answer(row.run, edit.answer)
            return row

        try:
            row = self.run_to_verdict(description, attempt)
        except TurnFailed:
            self.put_aside(edit, f"stray/{new_run_id()}")
            raise
        self.edit = None
        return row

    def run_to_verdict(self, description: str, attempt: Callable[[], Row]) -> Row:
        """Call `attempt` until its run has a verdict. Returns its row.

        Raises:
            TurnFailed: there was none, time and again.
            NightOver, Stopped: as train.
        """
        for number in range(1, NO_VERDICT_TRIES + 1):
            enough = self.find_end()
            if enough:
                raise NightOver(enough)
            self.enter("training", f"training: {description}")
            row = attempt()
            if Flag.INTERRUPTED in row.flags:
                raise Stopped("during a run")
            if row.judged:
                return row
            if number < NO_VERDICT_TRIES:
                self.panel.note(f"no verdict ({row.reason}): again in {self.night.pause:.0f} s")
                self.wait(self.night.pause)
                patience = min(LONGEST_WAIT, self.seconds_to_train())
                require_quiet(self.setting.platform.device_kind, "wait", patience=patience)
        raise TurnFailed(
            "device",
            f"«{description}» was run {NO_VERDICT_TRIES} times without a verdict: {row.reason}",
        )

    # --- The next edit, while an experiment runs ------------------------------------------------------------

    def think_ahead(self, running: Edit) -> None:
        """Let the agent begin with the next edit. What goes wrong with it does not touch the run."""
        night = self.night
        is_last = night.experiments is not None and self.panel.done + 1 >= night.experiments
        seconds = min(night.agent_seconds, self.seconds_to_train() - 2 * self.longest_run)
        if not night.ahead or self.turn or self.next_edit or is_last or seconds <= 0:
            return
        result = f"{self.result}\n\n{RUNNING.format(description=running.answer.description)}"
        try:
            self.turn = self.begin_turn(running.commit, result, seconds)
        except (TurnFailed, UserError, OSError) as error:
            self.save_state()
            self.panel.note(f"the agent does not think ahead: {first_line(error)}")

    def collect_next_edit(self, row: Row) -> None:
        """Wait for the agent that thinks ahead. Where the run was interrupted, it is ended instead."""
        if self.turn is None:
            return
        turn, self.turn = self.turn, None
        self.enter("ahead", "the agent thinks ahead")
        interrupted = Flag.INTERRUPTED in row.flags
        try:
            self.next_edit = end_turn(turn, self.trainer.name, at_once=interrupted)
        except (TurnFailed, UserError, OSError) as error:
            if not interrupted:
                self.panel.note(f"no edit was thought of ahead: {first_line(error)}")
        self.record_turn(turn)
        self.save_state()


def has_verdict(edit: Edit) -> bool:
    """Return whether the ledger has a verdict on an edit: then the loop was cut off right after it."""
    return any(row.judged and row.commit and edit.commit.startswith(row.commit) for row in ledger().rows())


def end_unfinished_turn() -> None:
    """End the agent of a turn that was cut off. What it made of its folder is lost."""
    state = read_state()
    if state.stamp:
        with defer_signals():
            end_leftovers(state.stamp)
        write_state(replace(state, stamp=""))


def kind_of(error: Exception) -> str:
    """Return what a turn failed by: see TurnFailed.kind. Beside these, "launcher" is a fault of ours."""
    if isinstance(error, TurnFailed):
        return error.kind
    return "repository" if isinstance(error, UserError | OSError) else "launcher"


def describe_result(row: Row) -> str:
    """Return what the agent is told of an experiment."""
    lines = [row.description, f"status: {row.status}", f"reason: {row.reason}"]
    if row.scored:
        lines.append(f"val_bpb: {row.val_bpb:.6f}")
        lines.append(f"tokens_per_second: {row.tokens_per_second:.0f}")
        lines.append(f"num_steps: {row.num_steps}")
        lines.append(f"memory_gb: {row.memory_gb}")
    else:
        lines.append(run_dir(row.run).log_tail())
    return "\n".join(lines)
