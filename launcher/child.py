"""The trainer as a child process: started, watched by the launcher's own clock, ended with everything it started."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import psutil

from prepare import ROOT

GRACE = 10.0            # seconds of training beyond the budget: the last step, and waiting for the device
CLOCK_TOLERANCE = 1.0   # seconds that the child's training clock may differ from the launcher's
EXIT_SECONDS = 30.0     # from the result to the end of the process
WHOLE_SECONDS = 300.0   # of a run beyond its budget: ten minutes in all
TERM_SECONDS = 5.0      # between the request to end and the kill
MARKER = "AUTORESEARCH_RUN_ID"  # in the environment of everything a run starts
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The launcher was asked to end (Ctrl-C, SIGTERM, the terminal went away)."""


@dataclass
class Outcome:
    """What the launcher saw of a run."""

    status: str = ""                # "" when it ended well, else crash, timeout or invalid
    reason: str = ""
    training_seconds: float = 0.0   # by the launcher's clock
    total_seconds: float = 0.0
    result: dict = field(default_factory=dict)
    exit_code: int | None = None


def supervise(trainer, run_dir, settings, platform, budget, watch, show):
    """Run `trainer` in `run_dir` to its end. Returns Outcome; raises Stopped after ending the child.

    settings: AUTORESEARCH_* variables. show: called with every event of the child (a dict), and with None
    about once a second.
    """
    run_id = run_dir.name
    reading, writing = os.pipe()
    environment = {**os.environ, **settings, MARKER: run_id, "AUTORESEARCH_RUN_DIR": str(run_dir), "AUTORESEARCH_EVENTS_FD": str(writing),
                   "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    outcome, began = Outcome(), time.monotonic()
    limits = {
        "startup": (began + platform.startup_seconds, f"no exp.start within {platform.startup_seconds:.0f} s: compilation or warm-up takes too long"),
        "whole": (began + budget + WHOLE_SECONDS, f"the whole run took over {budget + WHOLE_SECONDS:.0f} s"),
    }
    started = stopped = None
    with open(run_dir / "train.log", "wb") as log, open(run_dir / "events.jsonl", "w") as events, stop_on_signals():
        child = subprocess.Popen([sys.executable, str(trainer)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=subprocess.STDOUT, pass_fds=(writing,), start_new_session=True)
        os.close(writing)
        os.set_blocking(reading, False)
        selector = selectors.DefaultSelector()
        selector.register(reading, selectors.EVENT_READ)
        buffer, open_pipe = b"", True
        try:
            while True:
                ready = selector.select(timeout=0.5) if open_pipe else time.sleep(0.05)
                now = time.monotonic()
                if ready:
                    chunk = os.read(reading, 65536)
                    open_pipe = bool(chunk)
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        try:
                            event = json.loads(line)
                            kind = event["event"]
                        except (ValueError, KeyError, TypeError):
                            continue
                        events.write(json.dumps({"at": round(now - began, 3), **event}) + "\n")
                        if kind == "start" and started is None:
                            started = now
                            del limits["startup"]
                            limits["training"] = started + budget + GRACE, f"training went on {GRACE:.0f} s past its {budget:g} s: the loop does not end"
                            watch.begin(child.pid)
                        elif kind == "stop" and started is not None and stopped is None:
                            stopped = now
                            outcome.training_seconds = round(stopped - started, 3)
                            watch.end()
                            limits.pop("training", None)
                            limits["scoring"] = stopped + platform.score_seconds, f"scoring took over {platform.score_seconds:.0f} s"
                            differs = abs(outcome.training_seconds - event.get("training_seconds", 0.0))
                            if differs > CLOCK_TOLERANCE:
                                fail(outcome, "invalid", f"the trainer's clock says {event.get('training_seconds')} s of training, "
                                                         f"the launcher's {outcome.training_seconds:.1f} s")
                        elif kind == "result" and stopped is not None:
                            outcome.result = event
                            limits.pop("scoring", None)
                            limits["exit"] = now + EXIT_SECONDS, f"the process did not end within {EXIT_SECONDS:.0f} s of its result"
                        elif kind == "invalid":
                            fail(outcome, "invalid", event.get("message", ""))
                        elif kind == "error":
                            fail(outcome, "crash", event.get("message", ""))
                        show(event)
                show(None)
                watch.sample()
                if child.poll() is not None and not ready:
                    break
                late = [message for deadline, message in limits.values() if now > deadline]
                if late:
                    fail(outcome, "timeout", late[0])
                    break
        except Stopped as stop:
            fail(outcome, "crash", f"interrupted ({stop})")
            raise
        finally:
            # From here to the last survivor a second Ctrl-C changes nothing.
            with ignore_signals():
                watch.end()
                end_group(child)
                survivors = end_survivors(run_id)
            selector.close()
            os.close(reading)
            outcome.exit_code, outcome.total_seconds = child.returncode, round(time.monotonic() - began, 2)
            events.flush()
            os.fsync(events.fileno())
    if survivors:
        fail(outcome, "invalid", f"the trainer left processes running: {', '.join(survivors)}")
    if not outcome.status:
        judge_exit(outcome, run_dir / "train.log")
    return outcome


def fail(outcome, status, reason):
    """The first thing that goes wrong is the one that counts, but breaking a rule counts before crashing over it."""
    if not outcome.status or (status == "invalid" and outcome.status != "invalid"):
        outcome.status, outcome.reason = status, reason


def judge_exit(outcome, log):
    """The reason of a trainer that ended without a word to the launcher."""
    if outcome.exit_code == 0 and not outcome.result:
        fail(outcome, "crash", "the trainer exited 0 without a result: it must call exp.finish(model, EVAL_BATCH_SIZE)")
    elif outcome.exit_code == -signal.SIGKILL:
        fail(outcome, "crash", "the trainer was killed: out of memory? Lower DEVICE_BATCH_SIZE or the model's size")
    elif outcome.exit_code and outcome.exit_code < 0:
        fail(outcome, "crash", f"the trainer died of signal {signal.Signals(-outcome.exit_code).name}")
    elif outcome.exit_code:
        fail(outcome, "crash", f"the trainer exited with code {outcome.exit_code}: {last_line(log)}")


def last_line(log, most=300):
    """The last line with something in it of what a child printed."""
    return ([line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it printed nothing"])[-1][:most]


def end_group(child):
    """Terminate the child's process group, then kill what is left of it."""
    for sign, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, TERM_SECONDS)):
        try:
            os.killpg(child.pid, sign)
        except (ProcessLookupError, PermissionError):
            pass
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
        if not group_alive(child.pid):
            return


def group_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return any(alive(p) and safe_group(p) == group for p in psutil.process_iter())


def safe_group(process):
    try:
        return os.getpgid(process.pid)
    except OSError:
        return None


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_survivors(run_id):
    """Kill whatever of the run escaped its process group; returns their descriptions. Compile workers get a moment to go."""
    left = marked(run_id)
    psutil.wait_procs(left, timeout=3)
    described = []
    for process in marked(run_id):
        try:
            described.append(f"{process.pid} ({' '.join(process.cmdline()[:3])[:60]})")
            process.kill()
        except psutil.Error:
            pass
    psutil.wait_procs(left, timeout=3)
    return described


def marked(run_id):
    """Processes that carry the run's marker in their environment, however they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARKER) == run_id and alive(process):
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


class stop_on_signals:
    """Turn STOPS into Stopped."""

    def __enter__(self):
        def stop(number, frame):
            raise Stopped(signal.Signals(number).name)
        wanted = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup stays nohup
        self.before = {number: signal.signal(number, stop) for number in wanted}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class ignore_signals(stop_on_signals):
    def __enter__(self):
        self.before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
