"""
Run a trainer as a boxed child process, by the launcher's own clock, and have its weights scored.

The clock starts when the child is ready and two processes that score have built its model: it gets the
training rows at that moment, and not before. The clock stops when the child says that its weights are
written: it is killed at that moment, and the weights are scored.
"""

import json
import math
import os
import selectors
import signal
import socket
import stat
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from backends.protocol import (
    EVENT_BYTES,
    ROWS_BYTE,
    Event,
    EventError,
    Failure,
    Invalid,
    Log,
    Result,
    RunDir,
    RunSettings,
    Start,
    Stop,
    last_line,
    parse_event,
    write_json,
)
from launcher import bytecode, compiled, shared_memory
from launcher.box import Policy
from launcher.device import Watch
from launcher.disk_space import LONGEST_LOG, DiskSpace, size_of
from launcher.ledger import BoardKey, Flag, Row, single_line
from launcher.processes import (
    Guarded,
    Stopped,
    defer_signals,
    remove_tree,
    stop_on_signals,
)
from launcher.progress import OnEvent
from launcher.runs import ledger
from launcher.score import Job, NotScored, Score, ScoringPair
from launcher.setting import Setting
from launcher.verdict import board_runs
from launcher.walls import common_policy, start_boxed, trainer_policy

GRACE = 10.0  # seconds beyond the budget after which the child is ended, ...
GRACE_STEPS = 2.0  # ... or so many of its steps, where they take longer
# What a run may take beyond its budget is a sum of three parts.
SLACK = 1.0  # seconds, always
LAST_STEP = 2.0  # seconds at most for the last step, which may take as long as the longest one did
LAST_STEP_SHARE = 0.01  # share of the budget that the last step may take, where that is more,
USUAL_STEPS = 1.5  # or so many usual steps of this machine: see _last_step
WRITING = 200e6  # bytes of weights that are written in a second
MOST_WRITING = 2.0  # seconds at most for writing them
MOST_STARTUP = 8.0  # times startup_seconds that a start may take as long as it compiles
QUIET_SHARE = 0.5  # of startup_seconds without newly compiled code, from which on a late start is ended
SCORING_RATE = 0.25  # tokens scored for each one trained in the same time: a slow machine has longer
MOST_SCORING = 10.0  # times score_seconds, at most
TORN_SECONDS = 30.0  # before a start is broken off, in which compiled code may be written in part
POLL_SECONDS = 0.5  # between looks at the limits
MOST_SHARES = 8  # kinds of work of a step that are listened to
READS = 100  # of the socket, at most, between looks at the limits: a trainer may send without a pause


@dataclass
class Outcome:
    """What the launcher saw of a run."""

    status: str = ""  # "" when it ended well, else crash, timeout or invalid
    reason: str = ""
    training_seconds: float = 0.0  # by the launcher's clock
    total_seconds: float = 0.0
    result: Result | None = None
    # Shares of a step's time by kind of work, where steps were profiled.
    step_shares: dict[str, float] = field(default_factory=dict)
    exit_code: int | None = None
    # What disturbed the start or the scoring, where a limit was missed in it.
    findings: list[tuple[Flag, str]] = field(default_factory=list)

    def fail(self, status: str, reason: str) -> None:
        """Record what went wrong. The first failure counts, but a broken rule counts before a crash."""
        if not self.status or (status == "invalid" and self.status != "invalid"):
            self.status = status
            self.reason = single_line(reason)


def supervise(
    trainer: Path,
    run_dir: RunDir,
    setting: Setting,
    seed: int,
    watch: Watch,
    on_event: OnEvent,
    profiled: bool = False,
) -> Outcome:
    """Run `trainer` in `run_dir` to its end, score its weights, and return what was seen of it.

    profiled: some steps are measured by kind of work, which slows them down

    Raises:
        Stopped: the launcher was asked to end. The child is gone by then.
    """
    settings = replace(setting.boxed_settings(seed, run_dir.run_id), profiled=int(profiled))
    return Supervision(trainer, run_dir, setting, settings, watch, on_event).run()


def scoring_seconds(setting: Setting, rate: float) -> float:
    """Return what the scoring may take: what the platform says, and more on a slower machine.

    rate: tokens that it trained on in a second
    """
    usual = setting.platform.score_seconds
    needed = setting.val_tokens / (SCORING_RATE * rate) if rate > 0 else 0.0
    return min(max(usual, needed), MOST_SCORING * usual)


def first_run(board: BoardKey) -> Row | None:
    """Return the first run of a board that counts, None before there is one."""
    return next(iter(board_runs(ledger().rows(), board)), None)


class Supervision:
    """One child from its start to its score. Start-up, training and scoring have a limit each."""

    def __init__(
        self,
        trainer: Path,
        run_dir: RunDir,
        setting: Setting,
        settings: RunSettings,
        watch: Watch,
        on_event: OnEvent,
    ) -> None:
        self.trainer = trainer
        self.run_dir = run_dir
        self.setting = setting
        self.settings = settings
        self.watch = watch
        self.on_event = on_event
        self.outcome = Outcome()
        self._began = time.monotonic()
        self._start: Start | None = None
        self._stop: Stop | None = None
        self._phase: Literal["start", "training", "scoring"] = "start"
        self._started = 0.0  # on the launcher's clock
        self._last_log = 0.0
        self._has_log = False
        self._longest_step = 0.0  # seconds between two points of the loss curve, by the same clock
        self._longest_gap = 0.0  # the same, the time to the first point left out
        self._rows_given = 0.0  # when it was given the rows, by the wall clock
        self._around = Watch(setting.platform.device_kind)  # what else happens while it starts, or is scored
        self._deadline = math.inf  # of the start-up or of the training
        self._overdue_message = ""  # what the run is told then
        self._buffer = b""
        self._bytes_sent = 0  # by the child, in events
        self._shared_before = shared_memory.files()
        self._disk = DiskSpace(run_dir.path)
        self._child: Guarded | None = None
        self._scoring: ScoringPair | None = None
        self._weights = RunDir(run_dir.box).weights  # where the child writes them

    def run(self) -> Outcome:
        """Start the child, follow it, end it, score it. Returns the outcome."""
        self.run_dir.box.mkdir()
        with ExitStack() as stack:
            events = stack.enter_context(open(self.run_dir.events, "w"))
            stack.enter_context(stop_on_signals())
            stack.callback(self._clean)
            stack.callback(self._flush, events)
            try:
                self._train_and_score(stack, events)
            except Stopped as stop:
                self.outcome.fail("crash", f"interrupted ({stop})")
                raise
            except NotScored as error:
                self.outcome.fail(error.status, error.reason)
        self._around.end()
        if self.outcome.status == "timeout" and self._phase != "training":
            self.outcome.findings = self._around.findings()
        self.outcome.total_seconds = round(time.monotonic() - self._began, 2)
        if self.outcome.result:
            result = replace(self.outcome.result, total_seconds=self.outcome.total_seconds)
            self.outcome.result = result
            write_json(self.run_dir.result, asdict(result))
        return self.outcome

    def _train_and_score(self, stack: ExitStack, events: TextIO) -> None:
        self._channel, theirs = socket.socketpair()
        stack.callback(self._channel.close)
        setting = self.setting
        bytecode.compile_packages()
        startup = setting.platform.startup_seconds
        message = f"no exp.start within {startup:.0f} s: compilation or warm-up takes too long"
        self._set_deadline(startup, message)
        policy = common_policy(self.trainer, setting.track, setting.data)
        try:
            with defer_signals(), theirs:
                self._child = self._start_child(policy, theirs.fileno())
            job = Job(
                self.trainer, self.run_dir, self.settings, policy, setting.data, setting.bf16, self._disk
            )
            with defer_signals():
                self._scoring = stack.enter_context(ScoringPair(job))
            self._around.begin(self._child.pid, *self._scoring.pids)
            self._follow(self._child, events)
        finally:
            self._end()
        if self._stop is None and not self.outcome.status:
            self._judge_exit()
        if self.outcome.status:
            return
        assert self._start and self._stop
        self._take_weights()
        score = self._score()
        self.outcome.result = self._result(self._start, self._stop, score)

    def _start_child(self, policy: Policy, descriptor: int) -> Guarded:
        box = self.run_dir.box
        settings = replace(self.settings, weights=str(self._weights), launcher_fd=descriptor)
        command = [sys.executable, str(self.trainer)]
        with open(self.run_dir.log, "wb") as log:
            return start_boxed(trainer_policy(policy, box), command, settings, box, log, descriptor)

    # --- While it runs --------------------------------------------------------------------------------------

    def _follow(self, child: Guarded, events: TextIO) -> None:
        """Read events until the child has stopped or ended, a deadline has passed, or a line is no event."""
        self._channel.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            try:
                while self._stop is None and not self._overdue():
                    ended = child.poll() is not None  # asked before reading: what it sent last is read too
                    is_open = self._wait_and_read(selector, events, wait=not ended)
                    self.on_event(None)
                    if ended:
                        return
                    if not is_open:
                        self._wait_for_exit(child)
            except EventError as error:
                self.outcome.fail("invalid", f"the trainer sent something that is no event: {error}")

    def _wait_and_read(self, selector: selectors.BaseSelector, events: TextIO, wait: bool) -> bool:
        """Handle what the socket holds. Returns False when the child has closed it. Raises EventError."""
        timeout = POLL_SECONDS if wait else 0.0
        for _ in range(READS):
            if self._stop or not selector.select(timeout):
                break
            timeout = 0.0
            try:
                chunk = self._channel.recv(EVENT_BYTES)
            except ConnectionResetError:
                return False
            if not chunk:
                return False
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            if len(self._buffer) > EVENT_BYTES:
                raise EventError(f"a line of over {EVENT_BYTES} bytes")
            for line in lines:
                now = time.monotonic()  # a line before this one may have begun the training
                event = parse_event(line)
                events.write(json.dumps({"at": round(now - self._began, 3), **asdict(event)}) + "\n")
                self._bytes_sent += len(line)
                self._handle(event, now)
                self.on_event(event)
                if isinstance(event, Start):
                    self._last_log = time.monotonic()  # what others did meanwhile is no step's time
                if self._stop:
                    break
        return True

    def _wait_for_exit(self, child: Guarded) -> None:
        """Wait for the end of a child that sends no more events, or for a deadline."""
        while child.poll() is None and not self._overdue():
            self.on_event(None)
            time.sleep(POLL_SECONDS)

    def _handle(self, event: Event, now: float) -> None:
        if isinstance(event, Start) and self._start is None:
            self._training_begins(event)
        elif isinstance(event, Log) and self._start is not None:
            self._longest_step = max(self._longest_step, now - self._last_log)
            if self._has_log:
                self._longest_gap = max(self._longest_gap, now - self._last_log)
            self._last_log = now
            self._has_log = True
            grace = min(max(GRACE, GRACE_STEPS * self._longest_step), max(GRACE, self.setting.budget))
            self._deadline = self._started + self.setting.budget + grace
        elif isinstance(event, Stop) and self._start is not None:
            self._stop = event
            self.outcome.training_seconds = max(round(now - self._started, 3), 0.001)
            shares = list(event.step_shares.items())[:MOST_SHARES]
            self.outcome.step_shares = {kind[:40]: share for kind, share in shares}
        elif isinstance(event, Invalid):
            self.outcome.fail("invalid", event.message)
        elif isinstance(event, Failure):
            self.outcome.fail("crash", event.message)

    def _training_begins(self, event: Start) -> None:
        """Hand over the training rows, when all is ready: from this moment on the clock runs."""
        assert self._child and self._scoring  # they were made before an event was read
        self._start = event
        taken = time.monotonic() - self._began
        left = self.setting.platform.startup_seconds - taken
        self._scoring.wait_until_ready(max(left, QUIET_SHARE * taken), self.on_event)
        self._scoring.compare_shapes(event.weights)
        compiled.write_back(time.time() - (time.monotonic() - self._began))
        self._around.end()
        self.watch.begin(self._child.pid)
        budget = self.setting.budget
        message = (
            f"training went on past its {budget:g} s: the loop does not end, or a step takes very long "
            "(TOTAL_BATCH_SIZE)"
        )
        self._set_deadline(budget + GRACE, message)
        self._phase = "training"
        with open(self.setting.data.path / "train.bin", "rb") as rows:
            self._rows_given = time.time()
            self._started = self._last_log = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: that is noticed elsewhere
                socket.send_fds(self._channel, [ROWS_BYTE], [rows.fileno()])

    def _set_deadline(self, seconds: float, message: str) -> None:
        self._deadline = time.monotonic() + seconds
        self._overdue_message = message

    def _overdue(self) -> bool:
        """Return whether a limit ends the child. One that said what failed goes on: it prints why."""
        printed = size_of(self.run_dir.log) + size_of(self.run_dir.score_log)
        if printed + self._bytes_sent > LONGEST_LOG:
            self.outcome.fail("crash", f"the trainer and its model printed more than {LONGEST_LOG:,} bytes")
            return True
        filled = self._disk.filled()
        if filled:
            self.outcome.fail("crash", filled)
            return True
        if time.monotonic() <= self._deadline:
            return False
        if self._start is None and self._compiles():
            self._deadline = time.monotonic() + POLL_SECONDS
            return False
        self.outcome.fail("timeout", self._overdue_message)
        return True

    def _compiles(self) -> bool:
        """Return whether a start that is late makes progress: new compiled code is written."""
        startup = self.setting.platform.startup_seconds
        if time.monotonic() - self._began > MOST_STARTUP * startup:
            return False
        return bool(compiled.changed_since(time.time() - QUIET_SHARE * startup))

    # --- The end --------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End the child and all that it started."""
        if self._child is None:
            return
        with defer_signals():
            self.watch.end()
            gone = self._child.end()
        self.outcome.exit_code = self._child.returncode
        if not gone:
            self.outcome.fail("invalid", "the trainer, or what it started, could not be ended")

    def _judge_exit(self) -> None:
        """Say why a trainer ended that sent no word about it."""
        code = self.outcome.exit_code or 0
        if code == 0:
            message = "the trainer exited 0 without a result: it must call exp.finish(model)"
            self.outcome.fail("crash", message)
        elif code == -signal.SIGKILL:
            message = "the trainer was killed: out of memory? Lower DEVICE_BATCH_SIZE or the model's size"
            self.outcome.fail("crash", message)
        elif code < 0:
            self.outcome.fail("crash", f"the trainer died of signal {signal.Signals(-code).name}")
        else:
            self.outcome.fail("crash", f"the trainer exited with code {code}: {last_line(self.run_dir.log)}")

    def _take_weights(self) -> None:
        """Move the weights out of the child's reach. Raises NotScored when there are none, or too late."""
        try:
            found = self._weights.lstat()
        except OSError:
            raise NotScored("invalid", "the trainer said stop and wrote no weights") from None
        if not stat.S_ISREG(found.st_mode):
            raise NotScored("invalid", "the trainer's weights are no file")
        late = self.outcome.training_seconds - self.setting.budget
        allowed = SLACK + self._last_step() + min(512 * found.st_blocks / WRITING, MOST_WRITING)
        if late > allowed:
            excused = self.watch.findings() and late <= SLACK + self._longest_gap + 2 * MOST_WRITING
            raise NotScored(
                "timeout" if excused else "invalid",
                f"training took {self.outcome.training_seconds:.1f} s, {late:.1f} s more than its budget "
                f"({allowed:.1f} s are allowed for the last step and for writing the weights): end the loop "
                "when exp.progress reaches 1, and make steps shorter (TOTAL_BATCH_SIZE)",
            )
        os.replace(self._weights, self.run_dir.weights)

    def _last_step(self) -> float:
        """Return the seconds that the last step may take beyond the budget: as long as the longest one did.

        It is bounded: a step of a trainer that logs rarely looks long. On a slow machine a mean step of the
        board's first run is long too, and bounds it; of the first run itself, its own.
        """
        assert self._stop
        first = first_run(self.setting.board)
        seconds = first.training_seconds if first else self.outcome.training_seconds
        steps = first.num_steps if first else self._stop.num_steps
        usual = min(seconds / max(steps, 1), GRACE)
        most = max(LAST_STEP, LAST_STEP_SHARE * self.setting.budget, USUAL_STEPS * usual)
        return min(self._longest_step, most)

    def _score(self) -> Score:
        assert self._scoring and self._stop
        self._phase = "scoring"
        self._around.begin(*self._scoring.pids)
        rows = {"val": self.setting.val_tokens // self.setting.track.seq_len}
        seconds = scoring_seconds(self.setting, self._stop.tokens / self.outcome.training_seconds)
        return self._scoring.score(self.run_dir.weights, rows, seconds, self.on_event)[0]

    def _result(self, start: Start, stop: Stop, score: Score) -> Result:
        seconds = self.outcome.training_seconds
        rate = stop.tokens / seconds
        peak = start.peak_tflops * 1e12
        data = self.setting.data
        return Result(
            val_bpb=round(score.bpb, 6),
            val_stderr=round(score.stderr, 6) if math.isfinite(score.stderr) else 0.0,
            val_tokens=score.tokens,
            difference_worst=float(f"{score.difference.worst:.3g}"),
            difference_spread=float(f"{score.difference.spread:.3g}"),
            difference_bias=float(f"{score.difference.bias:.3g}"),
            training_seconds=seconds,
            total_seconds=0.0,  # not over yet
            peak_memory_mb=stop.peak_memory_mb,
            tokens_per_second=round(rate),
            mfu_percent=round(100 * rate * start.flops_per_token / peak, 2) if peak else 0.0,
            total_tokens_M=round(stop.tokens / 1e6, 3),
            epochs=round(stop.tokens / (data.num_train_rows * data.seq_len), 2),
            num_steps=stop.num_steps,
            num_params_M=start.num_params_M,
            depth=start.depth,
            flops_per_token=start.flops_per_token,
            peak_tflops=start.peak_tflops,
            dtype=start.dtype,
            platform=self.setting.platform.name,
            device=self.setting.facts.device,
            track=self.setting.track.name,
            seed=self.settings.seed,
        )

    def _clean(self) -> None:
        """Remove what the child wrote. Of compiled code, what it wrote before it had rows stays.

        When a start is broken off, a compiler may have written half a file: every later run would load it.
        """
        with defer_signals():
            remove_tree(self.run_dir.box)
            shared_memory.remove_new(self._shared_before)
            if self._rows_given:
                compiled.remove_since(self._rows_given)
            else:
                compiled.remove_since(time.time() - TORN_SECONDS)

    def _flush(self, events: TextIO) -> None:
        events.flush()
        os.fsync(events.fileno())
