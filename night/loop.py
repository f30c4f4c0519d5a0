"""
`autoresearch loop`: the night. A headless coding agent edits the trainer, the loop does everything else.

A turn: the agent gets the program, the ledger and the last result, edits the trainer and ends with a line
`experiment: what I did`. The edit is checked (only the trainer changed, it compiles, it survives a dry run of
seconds), tried, and kept or reverted. A turn that fails is recorded, and the next one follows after a pause
that grows. A loop that was cut off goes on when it is started again with the same command. At its end the
branch has the trainer that is believed best, and where an `until` left the time for it, that trainer is
tested against the baseline.
"""

import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from backends.platforms import mac_state
from backends.protocol import last_line
from launcher.belief import PRIOR, REPEATS, visible_change
from launcher.confirm import Contest, confirm, seconds_to_first_look
from launcher.console import say
from launcher.device import awake
from launcher.harness import source_hash
from launcher.ledger import EVIDENCE, MOVED, STATUSES, Flag, Row
from launcher.processes import Stopped, ignore_signals, stop_on_signals
from launcher.run import EXIT_INTERRUPTED, POWER_FLAGS, Request, dry_run
from launcher.runs import ledger, new_run_id, now_utc, run_dir
from launcher.setting import Setting
from launcher.verdict import best_since_moved, board_runs, fresh_seed, survey_board
from night import ahead, repo
from night.agent import (
    Answer,
    Turn,
    TurnFailed,
    TurnFiles,
    begin_turn,
    call_agent,
    read_answer,
    save_answer,
    undo_turn,
)
from night.lab_book import remember_shares
from night.panel import Panel, RunDetail
from night.program import write_turn
from night.state import Edit, LoopState, loop_folder, read_state, record, state_path, write_state
from night.trial import (
    check_edit,
    finish_trial,
    hold_repository,
    put_on_branch,
    run_source,
    run_trial,
    scored_before,
)
from prepare import UserError, first_line

GIVE_UP = 20  # failed turns in a row after which the loop ends
LONGEST_PAUSE = 1800.0  # seconds; the pause after a failed turn doubles up to this
FREE_EDITS = 3  # bad edits in a row that go back to the agent without a pause
NO_VERDICT_TRIES = 3  # runs of an edit without a verdict (another process on the device), then it is stashed
LARGEST_RESERVE = 0.25  # of the night, that a claim may take at its end
HUNDRED = 100  # experiments of a night without a limit, for its first line
RUN_SECONDS = 1.3  # of a whole run, for each second of training, before one was seen
BUILTIN = "builtin"  # names the search over the constants in the place of an agent
BUILTIN_MODULE = "night.builtin"
BASELINE = "baseline: the trainer as committed"
UNCOMMITTED = "what lay in the trainer, uncommitted"


@dataclass
class Night:
    """What `autoresearch loop` was asked to do."""

    agent: list[str]  # the command; {prompt} in an argument stands for the prompt
    setting: Setting  # of every experiment
    seed: int = 1
    experiments: int | None = None  # None: no limit
    until: datetime | None = None  # None: no limit
    agent_seconds: float = 900.0  # that an agent has for a turn
    pause: float = 30.0  # seconds after a first failed turn
    confirms: bool = True  # the end of a night with an `until` is for the claim
    ahead: bool = False  # the agent thinks of the next edit while an experiment runs

    @property
    def agent_name(self) -> str:
        """The agent as rows and commits name it."""
        return BUILTIN if self.agent[-1] == BUILTIN_MODULE else Path(self.agent[0]).name

    def seconds_left(self) -> float:
        """Return the seconds until the night ends, infinite without an `until`."""
        if self.until is None:
            return math.inf
        return max(0.0, (self.until - datetime.now()).total_seconds())


def parse_agent(text: str) -> list[str]:
    """Return the agent's command as a list. Raises UserError when there is no such program."""
    if text == BUILTIN:
        return [sys.executable, "-m", BUILTIN_MODULE]
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--agent: {error}: {text}", 2) from None
    if not command:
        raise UserError("--agent: the command is empty: name a program, such as 'claude -p'", 2)
    if not shutil.which(command[0]):
        raise UserError(f"--agent: there is no program {command[0]!r} here", 2)
    return command


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
    require_power()
    panel = Panel(night.experiments, night.until)
    with hold_repository(), stop_on_signals(), awake(), panel:
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
        self.thinking: ahead.Thinking | None = None  # the agent, while an experiment runs
        self.next_edit: ahead.NextEdit | None = None  # that it made meanwhile
        self.result = ""  # of the last experiment, for the agent
        self.complaint = ""  # about the last turn, for the agent
        self.failures = 0  # failed turns in a row
        self.bad_edits = 0  # turns in a row that failed by their edit
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
            with ignore_signals():
                undo_unfinished_turn()
                finish_trial()
        self.leave_state()
        record("end", why=ended, done=self.panel.done, kept=self.panel.kept)
        return ended, code

    def resume(self) -> None:
        """Go on where an earlier loop was cut off."""
        state = read_state()
        undo_unfinished_turn()
        self.edit = state.edit
        if state.done is not None and state.experiments == self.night.experiments:
            self.panel.done = state.done
            self.panel.note(f"going on with a loop that was cut off after {state.done} experiments")
        rows = ledger().rows()
        self.show_best()
        runs = [row for row in rows if row.status in STATUSES and not row.flags & EVIDENCE]
        self.result = describe_result(runs[-1]) if runs else "none: the ledger is empty"

    def record_begin(self) -> None:
        record(
            "begin",
            agent=self.night.agent,
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
            except (TurnFailed, UserError, OSError) as error:
                pause = self.record_failure(error)
                if self.failures >= GIVE_UP:
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
        self.panel.enter(f"confirming: {contest.best.description}")
        return confirm(self.setting, contest, lambda seconds: seconds < night.seconds_left()).sentence

    def record_experiment(self, row: Row) -> None:
        """Take an experiment down: for the person, the agent and the log."""
        self.failures = 0
        self.bad_edits = 0
        self.complaint = ""
        self.edit = None
        self.result = describe_result(row)
        self.longest_run = max(self.longest_run, row.total_seconds)
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
        self.panel.note(
            f"experiment {self.panel.done}: {row.status} {row.val_bpb:.6f} {row.description} [{row.reason}]"
        )

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
        kind = error.kind if isinstance(error, TurnFailed) else "repository"
        self.failures += 1
        self.bad_edits = self.bad_edits + 1 if kind == "edit" else 0
        self.panel.turns_lost += 1
        self.complaint = str(error)
        pause = 0.0
        if kind != "edit" or self.bad_edits >= FREE_EDITS:
            pause = min(LONGEST_PAUSE, self.night.pause * 2 ** (self.failures - 1))
        again = f"; again in {pause:.0f} s" if pause else ""
        self.panel.note(f"no experiment: {first_line(error)}{again}")
        record("failed", kind=kind, reason=str(error), failures=self.failures, pause=pause)
        return pause

    def wait(self, seconds: float) -> None:
        if self.longest_run < min(seconds, self.seconds_to_train()):
            seconds -= self.run_again("in a pause")  # what it tells of the noise is free then
        if seconds > 0:
            self.panel.enter(f"pausing {seconds:.0f} s")
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
        self.panel.enter(f"{why}: the committed trainer once more, seed {seed}")
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

    def save_state(self, turn: Turn | None = None) -> None:
        write_state(LoopState(self.night.experiments, self.panel.done, turn, self.edit))

    def leave_state(self) -> None:
        """Leave to the next loop a turn that could not be undone, or an edit without a verdict."""
        state = read_state()
        if state.turn:
            say("what the agent did could not be undone: the next loop tries it again")
            return
        edit = state.edit
        name = self.trainer.name
        if edit and repo.is_edited(name) and edit.blob == repo.blob(name):
            write_state(LoopState(edit=edit))
            say(
                f"no verdict yet on «{edit.answer.description}»: the edit is still in {name}, "
                "and the next loop tries it first"
            )
        else:
            state_path().unlink(missing_ok=True)

    # --- A turn ---------------------------------------------------------------------------------------------

    def finish_last_turn(self) -> Row | None:
        """Finish what an error left unfinished: the undo of a turn, a trial. Returns the trial's verdict."""
        self.thinking = None
        undo_unfinished_turn()
        row = finish_trial()
        self.save_state()
        return row if row and row.judged else None

    def take_turn(self) -> Row:
        """Make one experiment: of what lies in the trainer already, the baseline, or the agent's idea.

        Returns its row.

        Raises:
            TurnFailed, UserError: no experiment came of it.
            NightOver: there is no time left to train.
            Stopped: the launcher was asked to end.
        """
        if self.needs_baseline():
            return self.run_baseline()
        self.take_next_edit()
        if repo.is_edited(self.trainer.name):
            answer = self.answer_of_edit()
        else:
            # Before an agent is called in vain: did a person change what a run reads?
            check_edit(self.trainer)
            answer = self.ask_agent()
        self.check(answer.description)
        return self.train(answer)

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
        request = replace(self.request(BASELINE), progress=RunDetail(self.setting.budget, self.panel))
        return self.run_to_verdict(
            BASELINE, lambda: run_source(replace(request, parent=source), source, repo.head())
        )

    def measure_step(self, source: bytes) -> None:
        """Do a dry run of a trainer: the agent is told the shares of its step. The run reuses its code."""
        self.panel.enter(f"dry run: {BASELINE}")
        with tempfile.TemporaryDirectory(prefix="dry-") as folder:
            trainer = Path(folder) / self.trainer.name
            trainer.write_bytes(source)
            outcome, _ = dry_run(self.setting, trainer, self.night.seed)
        remember_shares(source_hash(source), outcome.step_shares)

    def answer_of_edit(self) -> Answer:
        """Return what an agent said of the edit that lay in the trainer before the turn, if it made it."""
        if self.edit and self.edit.blob == repo.blob(self.trainer.name):
            return self.edit.answer
        self.edit = None
        return Answer(UNCOMMITTED)

    def ask_agent(self) -> Answer:
        """Let the agent edit the trainer. Returns what it said of it.

        Raises:
            TurnFailed: it made no edit. The working tree is then as before.
        """
        name = self.trainer.name
        turn = begin_turn()
        self.save_state(turn)
        self.panel.enter("the agent thinks")
        try:
            answer = self.call_agent(turn.stamp)
        except (TurnFailed, UserError, OSError):
            undo_unfinished_turn()
            raise
        undo_turn(turn, keep=name)
        if not self.trainer.is_file() or self.trainer.is_symlink():
            undo_unfinished_turn()
            raise TurnFailed("agent", f"the agent left no plain file {name}")
        self.edit = Edit(repo.blob(name), answer)
        self.save_state()
        if not repo.is_edited(name):
            raise TurnFailed("agent", f"the agent changed nothing in {name}")
        return answer

    def call_agent(self, stamp: str) -> Answer:
        """Call the agent and wait for it. Returns its answer.

        Raises:
            TurnFailed: it cannot be started, takes too long, or fails.
        """
        night = self.night
        prompt = self.write_prompt(self.result)
        files = TurnFiles(loop_folder(), stamp)
        # What it thinks of must still be trained in the time that is left.
        seconds = min(night.agent_seconds, max(1.0, self.seconds_to_train() - self.longest_run))
        settings = self.setting.run_settings(night.seed).to_env()
        code = call_agent(night.agent, prompt, seconds, files, settings)
        if code is None:
            raise TurnFailed("agent", f"the agent did not end within {seconds:.0f} s")
        if code != 0:
            raise TurnFailed("agent", f"the agent ended with exit code {code}: {last_line(files.log)}")
        return read_answer(files)

    def write_prompt(self, result: str) -> str:
        return write_turn(self.setting, result, self.complaint, self.panel.left())

    def check(self, description: str) -> None:
        """Check an edit before minutes are spent on it: it compiles, is new, and survives a dry run.

        Raises:
            TurnFailed: it does not. The edit is then stashed.
        """
        try:
            check_edit(self.trainer)
        except UserError as error:
            self.stash(f"stray/{new_run_id()}", description)
            raise TurnFailed("edit", f"«{description}»: {error}") from None
        earlier = scored_before(self.trainer.read_bytes(), self.setting)
        if earlier:
            self.stash(f"stray/{new_run_id()}", description)
            raise TurnFailed(
                "edit",
                f"«{description}»: the same source was scored by run {earlier.run}: "
                f"{earlier.val_bpb:.6f}, {earlier.status}",
            )
        self.panel.enter(f"dry run: {description}")
        outcome, log_tail = dry_run(self.setting, self.trainer, self.night.seed)
        if not outcome.status:
            remember_shares(source_hash(self.trainer.read_bytes()), outcome.step_shares)
            return
        row = self.dry_row(description)
        row.status = outcome.status
        row.reason = f"dry run: {outcome.reason}"
        row.total_seconds = outcome.total_seconds
        row.commit = self.stash(row.run, description)[:7]
        ledger().append(row)
        raise TurnFailed(
            "edit",
            f"«{description}» failed its dry run ({outcome.status}): {outcome.reason}\n{log_tail}",
        )

    def stash(self, name: str, description: str) -> str:
        """Revert the trainer's edit, keep it under a ref, and say which. Returns its commit."""
        stashed = repo.stash_edit(self.trainer.name, name, description)
        self.edit = None
        self.panel.note(f"stashed «{description}»: it stays reachable as {stashed.ref}")
        return stashed.commit

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

    def request(self, description: str) -> Request:
        """Return the request of an experiment."""
        detail = RunDetail(self.setting.budget, self.panel, lambda: self.think_ahead(description))
        return Request(self.setting, description, self.night.seed, progress=detail)

    def train(self, answer: Answer) -> Row:
        """Try the trainer's edit. Returns the row of the verdict.

        Raises:
            TurnFailed: there was no verdict. The edit is then stashed.
            NightOver: there is no time left for it. The edit stays, and the next loop tries it first.
            Stopped: the run was interrupted.
        """
        request = self.request(answer.description)
        if self.edit:
            request = replace(request, agent=self.night.agent_name)

        def attempt() -> Row:
            row = run_trial(request, self.collect_next_edit)
            if self.edit:
                save_answer(row.run, answer)
            return row

        try:
            return self.run_to_verdict(answer.description, attempt)
        except TurnFailed:
            self.stash(f"stray/{new_run_id()}", answer.description)
            raise

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
            self.panel.enter(f"training: {description}")
            row = attempt()
            if Flag.INTERRUPTED in row.flags:
                raise Stopped("during a run")
            if row.judged:
                return row
            if number < NO_VERDICT_TRIES:
                self.panel.note(f"no verdict ({row.reason}): again in {self.night.pause:.0f} s")
                self.wait(self.night.pause)
        raise TurnFailed(
            "repository",
            f"«{description}» was run {NO_VERDICT_TRIES} times without a verdict: {row.reason}",
        )

    # --- The next edit, while an experiment runs ------------------------------------------------------------

    def think_ahead(self, running: str) -> None:
        """Let the agent begin with the next edit. What goes wrong with it does not touch the run."""
        night = self.night
        is_last = night.experiments is not None and self.panel.done + 1 >= night.experiments
        seconds = min(night.agent_seconds, self.seconds_to_train() - 2 * self.longest_run)
        if not night.ahead or self.thinking or self.next_edit or is_last or seconds <= 0:
            return
        result = f"{self.result}\n\n{ahead.RUNNING.format(description=running)}"
        settings = self.setting.run_settings(night.seed).to_env()
        try:
            turn = begin_turn()
            self.save_state(turn)
            prompt = self.write_prompt(result)
            self.thinking = ahead.think(self.trainer, turn, night.agent, prompt, seconds, settings)
        except (TurnFailed, UserError, OSError) as error:
            self.save_state()
            self.panel.note(f"the agent does not think ahead: {first_line(error)}")

    def collect_next_edit(self, row: Row) -> None:
        """Wait for the agent that thinks ahead. The trainer is then as it was when the run began."""
        if self.thinking is None:
            return
        thinking, self.thinking = self.thinking, None
        self.panel.enter("the agent thinks ahead")
        self.next_edit = ahead.collect(thinking, self.trainer, at_once=Flag.INTERRUPTED in row.flags)
        self.save_state()

    def take_next_edit(self) -> None:
        """Put the edit that was thought of ahead on what the branch has now."""
        if self.next_edit is None:
            return
        edit, self.next_edit = self.next_edit, None
        if ahead.rebase(edit, self.trainer):
            self.edit = Edit(repo.blob(self.trainer.name), edit.answer)
            self.save_state()


def undo_unfinished_turn() -> None:
    """Undo what an agent wrote that was cut off in the middle of its turn. It stays reachable under a ref."""
    state = read_state()
    if state.turn:
        undo_turn(state.turn)
        write_state(replace(state, turn=None))


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
