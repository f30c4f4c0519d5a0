"""
`autoresearch loop`: the night. A headless coding agent edits the trainer, the loop does everything else.

A turn: the agent gets the program, the ledger and the last result, edits the trainer in a folder of its own
and ends with a line `experiment: what I did`. The edit is checked (it compiles, it survives a dry run of
seconds), tried, and kept or stashed. A turn that fails is recorded, and the next one follows after a pause
that grows. A loop that was cut off goes on when it is started again with the same command. At its end the
branch has the trainer that is believed best. Where an `until` left the time for it, that trainer is tested
against the baseline.
"""

import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from launcher.belief import PRIOR, REPEATS, visible_change
from launcher.box import missing_walls
from launcher.child import Outcome
from launcher.confirm import Contest, confirm, seconds_to_first_look
from launcher.console import say, saying_once
from launcher.device import awake, look_around, require_quiet
from launcher.exit_codes import EXIT_INTERRUPTED
from launcher.harness import source_hash
from launcher.ledger import MOVED, Flag, Row
from launcher.processes import Stopped, defer_signals, end_leftovers, stop_on_signals
from launcher.report import write_report
from launcher.run import Request, dry_run
from launcher.runs import home, ledger, new_run_id, now_utc, record_killed_runs, run_dir
from launcher.verdict import best_since_moved, claim_of, fresh_seed, runs_of, survey_board
from night import repo
from night.agent import TurnFailed, last_words, read_said, save_answer
from night.failures import Failures, kind_of
from night.lab_book import remember_shares
from night.panel import OF_NO_EXPERIMENT, Panel, RunDetail
from night.plan import Hours, Night, find_contest, require_power
from night.program import write_turn
from night.state import Edit, LoopState, read_state, record, state_path, write_state
from night.stop import REASON, announced, rest
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
from night.turn import CHECK, CHECK_SECONDS, RUNNING, Turn, begin_turn, end_turn, not_ready
from night.waiting import WaitingEdits
from prepare import ROOT, UserError, first_line

LONGEST_WAIT = 1800.0  # seconds that a night waits for other processes after a run beside them
NO_VERDICT_TRIES = 3  # runs of an edit without a verdict (another process on the device), then it is stashed
USUAL_EXPERIMENTS = 100  # of a night without a limit: its first line says what so many can show
MOST_NOISE_RUNS = 4  # of a trainer, in pauses
PAGE_SHARE = 0.1  # of the time that writing the page may take: after short experiments it is not written anew
BASELINE = "baseline: the trainer as committed"


def run_night(night: Night, make_loop: Callable[[Night, Panel], "Loop"] | None = None) -> int:
    """Run the night and print what came of it.

    make_loop: makes the loop that takes the turns; Loop if left out

    Returns the exit code: 0 at its end, 1 when it gave up, 130 when it was interrupted.

    Raises:
        UserError: no result of the night would count, the agent is not ready, or as trial.hold_repository.
    """
    if night.is_here:
        night.setting.require_device()
        require_power()
    if night.boxed and missing_walls():
        raise UserError(f"--box: {missing_walls()}", 2)
    panel = Panel(night.experiments, night.until)
    try:
        with hold_repository(), announced() as is_stopping, stop_on_signals(), awake(), saying_once(), panel:
            panel.is_stopping = is_stopping
            if night.is_here:
                look_around(night.setting.platform.device_kind, night.when_busy)
            check_harness(night.setting.trainer.name)
            loop = (make_loop or Loop)(night, panel)
            loop.resume()
            loop.check_agent()
            ended, code = loop.run()
    except Stopped as stop:  # before the first turn
        ended = f"interrupted ({stop})"
        code = EXIT_INTERRUPTED
    panel.print_summary(ended)
    return code


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
        self.is_stopping = panel.is_stopping  # `autoresearch stop` asked this loop to end
        self.setting = night.setting
        self.trainer = night.setting.trainer
        self.hours = Hours(night)
        self.waiting = WaitingEdits(self.trainer.name, self.save_state)
        self.failures = Failures(night.pause)
        self.turn: Turn | None = None  # of the agent at work
        self.stamp = ""  # of that turn, from before the agent is started
        self.result = ""  # of the last experiment, for the agent
        self.complaint = ""  # about the last turn, for the agent
        self.next_page = 0.0  # of time.monotonic(), before which no page is written

    def run(self) -> tuple[str, int]:
        """Run the loop to its end. Returns (why it ended, exit code)."""
        try:
            self.record_begin()
            self.panel.note(self.describe_outlook())
            ended, code = self.take_turns()
            self.end_on_best()
            self.claim()
        except Stopped as stop:
            ended, code = f"interrupted ({stop})", EXIT_INTERRUPTED
            self.finish_interrupted()
        except Exception as error:  # of ours; what came of the night is told all the same
            ended, code = f"a fault of autoresearch: {first_line(error)}", 1
            record("failed", kind="launcher", reason=str(error), traceback=traceback.format_exception(error))
        self.leave_state(is_interrupted=code == EXIT_INTERRUPTED)
        record("end", why=ended, done=self.panel.done, **asdict(self.panel.counts))
        self.tell_end()
        return ended, code

    def tell_end(self) -> None:
        """Bring the page and the last lines up to date: the claim, the best, and that the night is over."""
        with defer_signals():  # it takes seconds, and the night is over
            self.show_best()
            if any(row.scored for row in ledger().rows()):
                self.write_page()
            try:
                branch = repo.branch().removeprefix("refs/heads/") or "no branch"
                self.panel.branch = f"{branch} at {repo.head()[:7]}"
                self.panel.claim = self.panel.claim or self.claim_on_record(find_contest(self.setting))
            except UserError as error:
                self.panel.note(f"not all last lines are known: {first_line(error)}")

    def resume(self) -> None:
        """Go on where an earlier loop was cut off."""
        state = read_state()
        for stamp in state.stamp.split():
            with defer_signals():
                end_leftovers(stamp)  # an agent that outlived it: what it made of its folder is lost
        asked = (self.night.experiments, self.setting.board)
        if state.done and state.experiments and (state.experiments, state.board) == asked:
            self.panel.done = state.done
            self.panel.counts = state.counts
            self.panel.note(f"going on with a loop that was cut off after {state.done} experiments")
        if state.trainer in ("", self.trainer.name):
            self.waiting.change(list(state.edits))
            self.drop_judged()
        else:
            for edit in state.edits:
                ref = repo.save_ref(f"stash/{new_run_id()}", edit.commit)
                self.panel.note(
                    f"«{edit.answer.description}» is an edit of {state.trainer}: it stays as {ref}"
                )
        self.save_state()
        self.show_best()
        runs = [row for row in ledger().rows() if row.decides and row.board == self.setting.board]
        self.result = describe_result(runs[-1]) if runs else "none: nothing was run here yet"

    def drop_judged(self) -> None:
        """Take the edits from the list on which the ledger has a verdict."""
        self.waiting.drop_judged(ledger().rows())

    def check_agent(self) -> None:
        """Ask the agent for a trivial edit: is it installed, logged in, and allowed to edit?

        Raises:
            UserError: it is not. The message says what to do.
        """
        if self.night.agent.is_builtin:
            return
        self.enter("check", f"is {self.night.agent.name} ready?", CHECK_SECONDS)
        prompt = CHECK.format(trainer=self.trainer.name)
        try:
            self.begin_turn(prompt, repo.head(), CHECK_SECONDS)
            self.end_turn()
        except TurnFailed as error:
            raise not_ready(self.night.agent, error) from None
        finally:
            self.end_agent()

    def enter(self, phase: str, text: str, limit: float | None = None) -> None:
        """Begin a phase of the night: shown to the person, and in the log for the report.

        limit: seconds that it may take
        """
        record("phase", phase=phase, text=text, limit=limit)
        self.panel.enter(text, limit, phase not in OF_NO_EXPERIMENT)

    def record_begin(self) -> None:
        record(
            "begin",
            agent=self.night.agent.command,
            experiments=self.night.experiments,
            until=str(self.night.until or ""),
            done=self.panel.done,
            pid=os.getpid(),  # of a loop that was killed, the page says so
            host=platform.node(),
            counts=asdict(self.panel.counts),
        )

    def at_once(self) -> int:
        """Return how many experiments run at once."""
        return 1

    def why_over(self) -> str:
        """Return why no further experiment is begun, "" when one is."""
        why = self.hours.why_over(self.panel.done, self.panel.counts.baselines)
        return why or (REASON if self.is_stopping() else "")

    def take_turns(self) -> tuple[str, int]:
        """Take turns until there is a reason to end. Returns (the reason, exit code)."""
        while True:
            try:
                enough = self.why_over()
                if enough:
                    return enough, 0
                row = self.finish_last_turn()
                if row is None:
                    row = self.take_turn()
                    self.failures.clear()
                self.record_experiment(row)
                self.learn_noise()
            except NightOver as over:
                return str(over), 0
            except Exception as error:
                pause = self.record_failure(error)
                if self.failures.are_too_many:
                    return self.describe_giving_up(error), 1
                self.wait(pause - self.use_pause(pause))

    def describe_giving_up(self, error: Exception) -> str:
        """Return why the night ends after too many failures. error: the last one"""
        count = self.failures.in_a_row
        return f"gave up after {count} turns without an experiment in a row: {first_line(error)}"

    def describe_outlook(self) -> str:
        """Return a line about what this night can find: the noise, and the changes that it can see."""
        night = self.night
        count = night.experiments or USUAL_EXPERIMENTS
        if night.until:
            fitting = self.at_once() * night.seconds_left() / self.hours.of_a_run()
            count = min(count, max(1, int(fitting)))
        believed = survey_board(ledger().rows(), self.setting.board)
        sigma = believed.sigma if believed else PRIOR.sigma
        visible = visible_change(sigma, count)
        whence = (
            f"as believed from {len(believed.trainers)} trainers" if believed else "assumed, none is known"
        )
        return (
            f"noise between seeds {sigma:.6f} ({whence}); a run shows a change of {visible.run:.6f}, "
            f"{count} experiments one of {visible.night:.6f}; more seconds of training, averaged weights and "
            "a device without other work lower the noise"
        )

    def end_on_best(self) -> None:
        """At the end: put the trainer that is believed best on the branch."""
        try:
            head = repo.committed_source(self.trainer.name)
            best = best_since_moved(ledger().rows(), self.setting.board, head)
            if best and best.source != head and put_on_branch(self.trainer.name, best.board, best.source):
                # Data, so that the next night does not take it for a move of a person's.
                ledger().append(replace(best, status=MOVED, build_on=best.source, time=now_utc()))
        except Exception as error:
            self.panel.note(f"the branch stays where it is: {first_line(error)}")

    def claim(self) -> None:
        """At the end: test the best against the baseline, where there is time for it."""
        try:
            self.panel.claim = self.find_claim()
        except Exception as error:
            self.panel.claim = f"none was tested: {first_line(error)}"
        record("claim", claim=self.panel.claim)

    def find_claim(self) -> str:
        """Return what a person may repeat of the night. Raises UserError, OSError, Stopped."""
        night = self.night
        contest = find_contest(self.setting)
        is_asked = night.confirms and night.until and not self.is_stopping()
        if contest is None or not is_asked or self.standing_claim(contest):
            return self.claim_on_record(contest)
        if seconds_to_first_look(contest) > night.seconds_left():
            return "none was tested, the night was too short: autoresearch confirm"
        self.enter("confirm", f"confirming: {contest.best.description}")
        show = partial(RunDetail, self.setting.budget, self.panel)
        return confirm(self.setting, contest, self.has_time, show).sentence

    def has_time(self, seconds: float) -> bool:
        """Return whether there is time for something that takes so many seconds."""
        return seconds < self.night.seconds_left() and not self.is_stopping()

    def claim_on_record(self, contest: Contest | None) -> str:
        """Return what a person may repeat without a test. contest: of find_contest."""
        if contest is None:
            return "none: nothing is believed better than the baseline"
        return self.standing_claim(contest) or "none was tested: autoresearch confirm"

    def standing_claim(self, contest: Contest) -> str:
        """Return the claim about the best that stands on record, with its day; "" without one."""
        known = claim_of(ledger().rows(), self.setting.board, contest.best.source)
        return f"{known.reason} (claimed on {known.time[:10]})" if known else ""

    def record_experiment(self, row: Row) -> None:
        """Tell the person, the agent and the log of an experiment."""
        self.complaint = ""
        self.result = describe_result(row)
        self.panel.count(row)
        self.save_state()
        self.panel.seconds_a_run = self.hours.of_a_run() / self.at_once()
        self.show_best()
        record(
            "experiment",
            run=row.run,
            status=row.status,
            val_bpb=row.val_bpb,
            description=row.description,
            reason=row.reason,
        )
        if time.monotonic() > self.next_page:
            self.write_page()
        self.panel.note(
            f"experiment {self.panel.done}: {row.status} {row.val_bpb:.6f} {row.description} [{row.reason}]"
        )

    def write_page(self) -> None:
        """Write the page of the night. What goes wrong with it does not touch the night."""
        began = time.monotonic()
        try:
            write_report([home() / "results.tsv"], home() / "report", complain=lambda line: None)
        except Exception as error:
            self.panel.note(f"the report is not written: {first_line(error)}")
        now = time.monotonic()
        self.next_page = now + (now - began) / PAGE_SHARE

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
        """Tell the person, the agent and the log of a failed turn. Returns the seconds to pause."""
        kind = kind_of(error)
        pause = self.failures.add(kind)
        self.panel.add("refused" if kind == "edit" else "turns_lost")
        self.complaint = str(error)
        again = f"; again in {pause:.0f} s" if pause else ""
        self.panel.note(f"no experiment: {first_line(error)}{again}")
        said = {"traceback": traceback.format_exception(error)} if kind == "launcher" else {}
        record("failed", kind=kind, reason=str(error), failures=self.failures.in_a_row, pause=pause, **said)
        return pause

    def use_pause(self, seconds: float) -> float:
        """Run the committed trainer once more in a pause for the agent that is long enough: it costs nothing.

        Returns the seconds that it took.
        """
        is_agents = self.failures.kind in ("agent", "edit") and not self.is_stopping()
        if is_agents and self.hours.of_a_run() < min(seconds, self.hours.to_train()):
            return self.run_again("in a pause", MOST_NOISE_RUNS)
        return 0.0

    def wait(self, seconds: float) -> None:
        if seconds > 0:
            self.enter("pause", f"pausing {seconds:.0f} s", seconds)
            rest(min(seconds, self.hours.to_train()), self.is_stopping)

    def learn_noise(self) -> None:
        """Run the committed trainer again while scores differ much and nothing says whether that is noise.

        Two more runs are enough, once on a board. Where scores differ no more than on most boards, there are
        none.
        """
        for _ in range(REPEATS - 1):
            believed = survey_board(ledger().rows(), self.setting.board)
            is_open = believed and believed.noise_is_open
            if not is_open or self.is_stopping() or self.hours.of_a_run() > self.hours.to_train():
                return
            if not self.run_again("is it noise?"):
                return

    def run_again(self, why: str, most: int | None = None) -> float:
        """Run the committed trainer with a fresh seed. The run tells of the noise, and decides nothing.

        most: how many such runs it may have in all; None: no limit

        Returns the seconds that it took, 0 where it could not be run.
        """
        began = time.monotonic()
        try:
            source = repo.content("HEAD", self.trainer.name)
            digest = source_hash(source)
            rows = ledger().rows()
            runs = [row for row in runs_of(rows, self.setting.board, digest) if Flag.NOISE in row.flags]
            if most is not None and len(runs) >= most:
                return 0.0
            seed = fresh_seed(rows, [digest])
            self.enter("noise", f"{why}: the committed trainer once more, seed {seed}")
            request = Request(
                self.setting,
                f"the committed trainer once more: {why}",
                seed,
                flags=(Flag.NOISE,),
                progress=RunDetail(self.setting.budget, self.panel),
            )
            row = run_source(request, source, repo.head())
        except Exception as error:  # it decides nothing: the turns go on, and say what is wrong
            self.panel.note(f"the committed trainer was not run once more: {first_line(error)}")
            return 0.0
        if Flag.INTERRUPTED in row.flags:
            raise Stopped("during a run")
        return time.monotonic() - began

    # --- The end --------------------------------------------------------------------------------------------

    def finish_interrupted(self) -> None:
        """Finish what a signal interrupted: the agent is ended, and a run with a verdict is an experiment."""
        self.end_agent()
        try:
            record_killed_runs()
            row = self.finish_last_turn()
            if row:
                self.record_experiment(row)
        except Exception as error:
            self.panel.note(f"the next command finishes the trial: {first_line(error)}")

    def state(self) -> LoopState:
        """Return what the next loop needs, should this one be killed."""
        board = self.setting.board
        edits = tuple(self.waiting)
        return LoopState(
            self.night.experiments,
            self.panel.done,
            self.stamp,
            self.trainer.name,
            board,
            edits,
            self.panel.counts,
        )

    def save_state(self) -> None:
        write_state(self.state())

    def leave_state(self, is_interrupted: bool) -> None:
        """Leave the edits without a verdict to the next loop, and after an interruption the count."""
        for edit in self.waiting:
            say(f"no verdict yet on «{edit.answer.description}»: the next loop tries it first")
        goes_on = is_interrupted and self.night.experiments is not None and self.panel.done > 0
        state = self.state() if goes_on else replace(self.state(), done=0)
        try:
            if goes_on or state.edits:
                write_state(state)
            else:
                state_path().unlink(missing_ok=True)
        except (UserError, OSError) as error:
            say(f"the state for the next loop could not be written: {first_line(error)}")

    # --- A turn ---------------------------------------------------------------------------------------------

    def finish_last_turn(self) -> Row | None:
        """Finish a turn that an error cut off, its trial too. Returns the row with the verdict."""
        self.end_agent()
        row = finish_trial()
        self.drop_judged()
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
        self.require_harness()  # before an agent is called in vain
        self.waiting.take_from_tree()
        self.waiting.put_on_branch()
        if self.waiting.first is None:
            self.ask_agent()
        edit = self.waiting.first
        assert edit
        enough = self.why_over()  # the agent took its time, and a dry run takes some too
        if enough:
            raise NightOver(enough)
        self.check(edit)
        return self.train(edit)

    def require_harness(self) -> None:
        """Raise TurnFailed where more than the trainer was changed."""
        try:
            check_harness(self.trainer.name)
        except UserError as error:
            raise TurnFailed("harness", str(error)) from None

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
        # The agent is told the shares of its step, and the run finds its code compiled.
        self.dry_run(source, BASELINE)
        request = Request(
            self.setting,
            BASELINE,
            self.night.seed,
            parent=source,
            progress=RunDetail(self.setting.budget, self.panel),
        )
        return self.run_to_verdict(BASELINE, lambda: run_source(request, source, repo.head()))

    def dry_run(self, source: bytes, description: str) -> tuple[Outcome, str]:
        """Do a dry run of a trainer. Returns (outcome, end of the log)."""
        self.enter("dry run", f"dry run: {description}")
        outcome, log_tail = dry_run(self.setting, source, self.night.seed)
        self.hours.dry_seconds = outcome.total_seconds
        if not outcome.status:
            remember_shares(source_hash(source), outcome.step_shares)
        return outcome, log_tail

    def check(self, edit: Edit) -> None:
        """Check an edit before minutes are spent on it: it compiles, is new, and survives a dry run.

        Raises:
            TurnFailed: it does not. The edit is then stashed.
        """
        description = edit.answer.description
        source = self.read_new_source(edit)
        outcome, log_tail = self.dry_run(source, description)
        if not outcome.status:
            return
        row = self.refused_row(edit, outcome.status, outcome.reason, outcome.total_seconds)
        self.waiting.stash(edit, row.run)
        ledger().append(row)
        raise TurnFailed(
            "edit",
            f"«{description}» failed its dry run ({outcome.status}): {outcome.reason}\n{log_tail}",
        )

    def read_new_source(self, edit: Edit) -> bytes:
        """Return the trainer of an edit, which compiles and was not scored before.

        Raises:
            TurnFailed: it does not, or was. The edit is then stashed.
        """
        source = repo.content(edit.commit, self.trainer.name)
        try:
            check_source(self.trainer.name, source)
        except UserError as error:
            raise self.refuse(edit, str(error)) from None
        earlier = scored_before(source, self.setting)
        if earlier:
            found = f"{earlier.val_bpb:.6f}, {earlier.status}"
            raise self.refuse(edit, f"the same source was scored by run {earlier.run}: {found}")
        return source

    def refuse(self, edit: Edit, why: str, ref: str = "") -> TurnFailed:
        """Stash an edit that cannot be tried, and return what to raise. ref: its name, "" for a new one"""
        self.waiting.stash(edit, ref)
        return TurnFailed("edit", f"«{edit.answer.description}»: {why}")

    def refused_row(self, edit: Edit, status: str, reason: str, seconds: float) -> Row:
        """Return the row of an edit that failed its dry run, which took so many seconds."""
        return Row(
            commit=edit.commit[:7],
            status=status,
            description=edit.answer.description,
            run=new_run_id(),
            time=now_utc(),
            platform=self.setting.platform.name,
            track=self.setting.track.name,
            seed=self.night.seed,
            total_seconds=seconds,
            marks=Flag.DRY,
            reason=f"dry run: {reason}",
        )

    def train(self, edit: Edit) -> Row:
        """Try an edit. Returns the row of the verdict.

        Raises:
            TurnFailed: there was no verdict. The edit is then stashed.
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
            self.waiting.stash(edit)
            raise
        self.waiting.drop(edit)
        return row

    def run_to_verdict(self, description: str, attempt: Callable[[], Row]) -> Row:
        """Call `attempt` until its run has a verdict. Returns its row.

        Raises:
            TurnFailed: there was none, time and again.
            NightOver, Stopped: as train.
        """
        for number in range(1, NO_VERDICT_TRIES + 1):
            enough = self.why_over()
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
                patience = min(LONGEST_WAIT, self.hours.to_train())
                kind = self.setting.platform.device_kind
                require_quiet(kind, "wait", patience=patience, is_over=self.is_stopping)
        raise TurnFailed(
            "device",
            f"«{description}» was run {NO_VERDICT_TRIES} times without a verdict: {row.reason}",
        )

    # --- The agent ------------------------------------------------------------------------------------------

    def ask_agent(self) -> None:
        """Let the agent make an edit, which then waits to be tried.

        Raises:
            TurnFailed: it made none.
            NightOver: there is no time left for a turn and its experiment.
        """
        seconds = self.hours.to_think()
        if not seconds:
            raise NightOver("too little time is left for another turn of the agent and its experiment")
        self.enter("agent", "the agent thinks", seconds)
        turn = self.begin_turn(self.write_prompt(self.result), repo.head(), seconds)
        self.panel.words = lambda: last_words(turn.files)
        self.waiting.add(self.end_turn())

    def think_ahead(self, running: Edit) -> None:
        """Let the agent begin with the next edit. What goes wrong with it does not touch the run."""
        night = self.night
        is_last = night.experiments is not None and self.panel.done + 1 >= night.experiments
        if not night.ahead or self.turn or len(self.waiting) > 1 or is_last:
            return
        try:
            seconds = self.hours.to_think(runs=2)
            if seconds:
                result = f"{self.result}\n\n{RUNNING.format(description=running.answer.description)}"
                self.begin_turn(self.write_prompt(result), running.commit, seconds)
        except Exception as error:
            self.end_agent()
            self.panel.note(f"the agent does not think ahead: {first_line(error)}")

    def collect_next_edit(self, row: Row) -> None:
        """Wait for the agent that thinks ahead. Where the run was interrupted, it is ended instead."""
        if self.turn is None:
            return
        self.enter("ahead", "the agent thinks ahead")
        interrupted = Flag.INTERRUPTED in row.flags
        try:
            self.waiting.add(self.end_turn(at_once=interrupted))
        except Exception as error:
            if not interrupted:
                self.panel.note(f"no edit was thought of ahead: {first_line(error)}")

    def write_prompt(self, result: str) -> str:
        """Return what the agent is told. result: of the last experiment. Raises UserError."""
        return write_turn(self.setting, result, self.complaint, self.panel.left())

    def begin_turn(self, prompt: str, base: str, seconds: float) -> Turn:
        """Start the agent on a commit. Raises as turn.begin_turn."""
        with defer_signals():
            self.turn = self.start_agent(prompt, base, seconds, self.night.seed)
        return self.turn

    def start_agent(self, prompt: str, base: str, seconds: float, seed: int, place: int = 0) -> Turn:
        """Start an agent on a commit, and return its turn. See turn.begin_turn, whose place it takes.

        Call it in defer_signals, together with what keeps the turn.

        seed: that the builtin search draws from
        """
        night = self.night
        settings = self.setting.run_settings(seed).to_env()
        if night.agent.is_builtin:
            settings["PYTHONPATH"] = str(ROOT)
        self.stamp = new_run_id()
        self.save_state()
        return begin_turn(night.agent, prompt, base, self.stamp, seconds, settings, night.boxed, place)

    def end_turn(self, at_once: bool = False) -> Edit:
        """Wait for the agent at work, and return its edit. Raises TurnFailed."""
        assert self.turn
        try:
            return end_turn(self.turn, self.trainer.name, at_once)
        finally:
            self.record_turn(self.turn)
            self.end_agent()

    def end_agent(self) -> None:
        """End the agent, where one is at work. What it made of its folder is lost."""
        if self.turn:
            with defer_signals():
                self.turn.child.end()
        self.turn = None
        if self.stamp:
            self.stamp = ""
            self.save_state()

    def record_turn(self, turn: Turn) -> None:
        """Add up and log what a turn took: seconds, and tokens and dollars where the agent prints them."""
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
