"""Run the trainer as a child process, by the launcher's own clock, and end it with all that it started."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from backends.platforms import Platform
from backends.protocol import (
    EVENT_BYTES,
    Event,
    EventError,
    Failure,
    Invalid,
    Result,
    RunDir,
    RunSettings,
    Start,
    Stop,
    last_lines,
    parse_event,
)
from launcher import compiled
from launcher.console import OnEvent
from launcher.device import Watch
from launcher.ledger import single_line
from launcher.processes import Stopped, end_group, end_leftovers, ignore_signals, stop_on_signals
from prepare import ROOT

GRACE = 10.0  # seconds of training beyond the budget: the last step, and waiting for the device
CLOCK_TOLERANCE = 1.0  # seconds that the child's training clock may differ from the launcher's
EXIT_SECONDS = 30.0  # from the result to the end of the process
WHOLE_SECONDS = 300.0  # of a run beyond its budget: ten minutes in all
POLL_SECONDS = 0.5  # between looks at the limits
READS = 100  # of the pipe, at most, between looks at the limits: a trainer may send without a pause


@dataclass
class Outcome:
    """What the launcher saw of a run."""

    status: str = ""  # "" when it ended well, else crash, timeout or invalid
    reason: str = ""
    training_seconds: float = 0.0  # by the launcher's clock
    total_seconds: float = 0.0
    result: Result | None = None
    exit_code: int | None = None

    def fail(self, status: str, reason: str) -> None:
        """Record what went wrong. The first failure counts, but a broken rule counts before a crash."""
        if not self.status or (status == "invalid" and self.status != "invalid"):
            self.status = status
            self.reason = single_line(reason)


def supervise(
    trainer: Path,
    run_dir: RunDir,
    settings: RunSettings,
    platform: Platform,
    watch: Watch,
    on_event: OnEvent,
) -> Outcome:
    """Run `trainer` in `run_dir` to its end and return what was seen of it.

    Raises:
        Stopped: the launcher was asked to end. The child is gone by then.
    """
    return Supervision(trainer, run_dir, settings, platform, watch, on_event).run()


class Supervision:
    """One child from its start to its end.

    The launcher's clock starts when it reads Start and stops when it reads Stop. Each phase of a run has a
    deadline: start-up, training, scoring, exit, and the whole.
    """

    def __init__(
        self,
        trainer: Path,
        run_dir: RunDir,
        settings: RunSettings,
        platform: Platform,
        watch: Watch,
        on_event: OnEvent,
    ) -> None:
        self.trainer = trainer
        self.run_dir = run_dir
        self.settings = settings
        self.platform = platform
        self.watch = watch
        self.on_event = on_event
        self.outcome = Outcome()
        self._began = time.monotonic()
        self._started: float | None = None
        self._stopped: float | None = None
        self._deadlines: dict[str, tuple[float, str]] = {}  # phase -> (time, what the run is told)
        self._buffer = b""
        self._child_pid = 0

    def run(self) -> Outcome:
        """Start the child, follow it, end it. Returns the outcome."""
        self._set_deadline(
            "startup",
            self.platform.startup_seconds,
            f"no exp.start within {self.platform.startup_seconds:.0f} s: "
            "compilation or warm-up takes too long",
        )
        whole = self.settings.budget + WHOLE_SECONDS
        self._set_deadline("whole", whole, f"the whole run took over {whole:.0f} s")
        with open(self.run_dir.log, "wb") as log, open(self.run_dir.events, "w") as events, stop_on_signals():
            reading, writing = os.pipe()
            child = self._start_child(log.fileno(), writing)
            self._child_pid = child.pid
            os.close(writing)
            try:
                self._follow(child, reading, events)
            except Stopped as stop:
                self.outcome.fail("crash", f"interrupted ({stop})")
                raise
            finally:
                self._end(child)
                os.close(reading)
                events.flush()
                os.fsync(events.fileno())
        if not self.outcome.status:
            self._judge_exit()
        return self.outcome

    def _start_child(self, log_fd: int, events_fd: int) -> subprocess.Popen[bytes]:
        settings = replace(
            self.settings,
            run_dir=str(self.run_dir.path),
            run_id=self.run_dir.run_id,
            events_fd=events_fd,
            launcher_pid=os.getpid(),
        )
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            **compiled.environment(),
            **settings.to_env(),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return subprocess.Popen(
            [sys.executable, str(self.trainer)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=subprocess.STDOUT,
            pass_fds=(events_fd,),
            start_new_session=True,
        )

    # --- While it runs --------------------------------------------------------------------------------------

    def _follow(self, child: subprocess.Popen[bytes], reading: int, events: TextIO) -> None:
        """Read events until the child has ended, a deadline has passed, or a line is not an event."""
        os.set_blocking(reading, False)
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            try:
                while not self._overdue():
                    ended = child.poll() is not None  # asked before reading: what it sent last is read too
                    is_open = self._wait_and_read(selector, reading, events, wait=not ended)
                    self.on_event(None)
                    if ended:
                        return
                    if not is_open:
                        self._wait_for_exit(child)
            except EventError as error:
                self.outcome.fail("invalid", f"the trainer sent something that is no event: {error}")

    def _wait_and_read(
        self, selector: selectors.BaseSelector, reading: int, events: TextIO, wait: bool
    ) -> bool:
        """Handle what the pipe holds. Returns False when the child has closed it. Raises EventError."""
        timeout = POLL_SECONDS if wait else 0.0
        for _ in range(READS):
            if not selector.select(timeout):
                break
            timeout = 0.0
            now = time.monotonic()
            chunk = os.read(reading, EVENT_BYTES)
            if not chunk:
                return False
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            if len(self._buffer) > EVENT_BYTES:
                raise EventError(f"a line of over {EVENT_BYTES} bytes")
            for line in lines:
                event = parse_event(line)
                events.write(json.dumps({"at": round(now - self._began, 3), **asdict(event)}) + "\n")
                self._handle(event, now)
                self.on_event(event)
        return True

    def _wait_for_exit(self, child: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a child that sends no more events, or for a deadline."""
        while child.poll() is None and not self._overdue():
            self.on_event(None)
            time.sleep(POLL_SECONDS)

    def _handle(self, event: Event, now: float) -> None:
        if isinstance(event, Start) and self._started is None:
            self._training_begins(now)
        elif isinstance(event, Stop) and self._started is not None and self._stopped is None:
            self._training_ends(event, now)
        elif isinstance(event, Result) and self._stopped is not None and self.outcome.result is None:
            self.outcome.result = event
            del self._deadlines["scoring"]
            message = f"the process did not end within {EXIT_SECONDS:.0f} s of its result"
            self._set_deadline("exit", EXIT_SECONDS, message)
        elif isinstance(event, Invalid):
            self.outcome.fail("invalid", event.message)
        elif isinstance(event, Failure):
            self.outcome.fail("crash", event.message)

    def _training_begins(self, now: float) -> None:
        self._started = now
        del self._deadlines["startup"]
        budget = self.settings.budget
        message = f"training went on {GRACE:.0f} s past its {budget:g} s: the loop does not end"
        self._set_deadline("training", budget + GRACE, message)
        self.watch.begin(self._child_pid)

    def _training_ends(self, event: Stop, now: float) -> None:
        assert self._started is not None
        self._stopped = now
        self.watch.end()
        del self._deadlines["training"]
        seconds = self.platform.score_seconds
        self._set_deadline("scoring", seconds, f"scoring took over {seconds:.0f} s")
        ours = self.outcome.training_seconds = round(now - self._started, 3)
        if abs(ours - event.training_seconds) > CLOCK_TOLERANCE:
            self.outcome.fail(
                "invalid",
                f"the trainer's clock says {event.training_seconds} s of training, "
                f"the launcher's {ours:.1f} s",
            )

    def _set_deadline(self, phase: str, seconds: float, message: str) -> None:
        self._deadlines[phase] = time.monotonic() + seconds, message

    def _overdue(self) -> bool:
        now = time.monotonic()
        late = [message for deadline, message in self._deadlines.values() if now > deadline]
        if late:
            self.outcome.fail("timeout", late[0])
        return bool(late)

    # --- The end --------------------------------------------------------------------------------------------

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """End the child and all that it started. From here on a second Ctrl-C changes nothing."""
        with ignore_signals():
            self.watch.end()
            end_group(child)
            leftovers = end_leftovers(self.run_dir.run_id)
        self.outcome.exit_code = child.returncode
        self.outcome.total_seconds = round(time.monotonic() - self._began, 2)
        if leftovers:
            self.outcome.fail("invalid", f"the trainer left processes running: {', '.join(leftovers)}")

    def _judge_exit(self) -> None:
        """Say why a trainer ended that sent no word about it."""
        code = self.outcome.exit_code or 0
        if code == 0 and self.outcome.result is None:
            message = "the trainer exited 0 without a result: it must call exp.finish(model, EVAL_BATCH_SIZE)"
            self.outcome.fail("crash", message)
        elif code == -signal.SIGKILL:
            message = "the trainer was killed: out of memory? Lower DEVICE_BATCH_SIZE or the model's size"
            self.outcome.fail("crash", message)
        elif code < 0:
            self.outcome.fail("crash", f"the trainer died of signal {signal.Signals(-code).name}")
        elif code > 0:
            self.outcome.fail("crash", f"the trainer exited with code {code}: {last_line(self.run_dir.log)}")


def last_line(log: Path) -> str:
    """Return the last line with something in it of what a child printed."""
    lines = [line.strip() for line in last_lines(log) if line.strip()]
    return lines[-1] if lines else "it printed nothing"
