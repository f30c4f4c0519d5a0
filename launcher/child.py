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
from typing import TextIO

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
from launcher import compiled, shared_memory
from launcher.box import Policy
from launcher.console import OnEvent
from launcher.device import Watch
from launcher.ledger import single_line
from launcher.processes import (
    Guarded,
    Stopped,
    defer_signals,
    remove_tree,
    stop_on_signals,
)
from launcher.score import Job, NotScored, Score, ScoringPair
from launcher.setting import Setting
from launcher.walls import common_policy, start_boxed, trainer_policy

GRACE = 10.0  # seconds beyond the budget after which the child is ended
# What a run may take beyond its budget is a sum of three parts.
SLACK = 1.0  # seconds, always
LAST_STEP = 2.0  # seconds at most for the last step, which may take as long as the longest one did
LAST_STEP_SHARE = 0.01  # share of the budget that the last step may take, where that is more
WRITING = 200e6  # bytes of weights that are written in a second
MOST_WRITING = 2.0  # seconds at most for writing them
POLL_SECONDS = 0.5  # between looks at the limits
LONGEST_LOG = 2**28  # bytes that a trainer may print and send
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
        self._started = 0.0  # on the launcher's clock
        self._last_log = 0.0
        self._longest_step = 0.0  # seconds between two points of the loss curve, by the same clock
        self._rows_given = 0.0  # the same moment by the wall clock
        self._deadline = math.inf  # of the start-up or of the training
        self._overdue_message = ""  # what the run is told then
        self._buffer = b""
        self._bytes_sent = 0  # by the child, in events
        self._shared_before = shared_memory.files()
        self._child: Guarded | None = None
        self._scoring: ScoringPair | None = None
        self._weights = RunDir(run_dir.box).weights  # where the child writes them

    def run(self) -> Outcome:
        """Start the child, follow it, end it, score it. Returns the outcome."""
        startup = self.setting.platform.startup_seconds
        message = f"no exp.start within {startup:.0f} s: compilation or warm-up takes too long"
        self._set_deadline(startup, message)
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
        policy = common_policy(self.trainer, setting.track, setting.data)
        try:
            with defer_signals(), theirs:
                self._child = self._start_child(policy, theirs.fileno())
            job = Job(self.trainer, self.run_dir, self.settings, policy, setting.data, setting.bf16)
            with defer_signals():
                self._scoring = stack.enter_context(ScoringPair(job))
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
            self._last_log = now
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
        self._scoring.wait_until_ready(self._deadline - time.monotonic(), self.on_event)
        self._scoring.compare_shapes(event.weights)
        compiled.write_back(time.time() - (time.monotonic() - self._began))
        self.watch.begin(self._child.pid)
        budget = self.setting.budget
        message = f"training went on {GRACE:.0f} s past its {budget:g} s: the loop does not end"
        self._set_deadline(budget + GRACE, message)
        with open(self.setting.data.path / "train.bin", "rb") as rows:
            self._rows_given = time.time()
            self._started = self._last_log = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: that is noticed elsewhere
                socket.send_fds(self._channel, [ROWS_BYTE], [rows.fileno()])

    def _set_deadline(self, seconds: float, message: str) -> None:
        self._deadline = time.monotonic() + seconds
        self._overdue_message = message

    def _overdue(self) -> bool:
        if time.monotonic() > self._deadline:
            self.outcome.fail("timeout", self._overdue_message)
            return True
        if self.run_dir.log.stat().st_size + self._bytes_sent > LONGEST_LOG:
            self.outcome.fail("crash", f"the trainer printed more than {LONGEST_LOG:,} bytes")
            return True
        return False

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
        step = min(self._longest_step, max(LAST_STEP, LAST_STEP_SHARE * self.setting.budget))
        allowed = SLACK + step + min(512 * found.st_blocks / WRITING, MOST_WRITING)
        if late > allowed:
            raise NotScored(
                "invalid",
                f"training took {self.outcome.training_seconds:.1f} s, {late:.1f} s more than its budget "
                f"({allowed:.1f} s are allowed for the last step and for writing the weights): end the loop "
                "when exp.progress reaches 1, and make steps shorter (TOTAL_BATCH_SIZE)",
            )
        os.replace(self._weights, self.run_dir.weights)

    def _score(self) -> Score:
        assert self._scoring
        rows = {"val": self.setting.val_tokens // self.setting.track.seq_len}
        seconds = self.setting.platform.score_seconds
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
        """Remove what the child wrote. Of compiled code, what it wrote before it had rows stays."""
        with defer_signals():
            remove_tree(self.run_dir.box)
            shared_memory.remove_new(self._shared_before)
            if self._rows_given:
                compiled.remove_since(self._rows_given)

    def _flush(self, events: TextIO) -> None:
        events.flush()
        os.fsync(events.fileno())
