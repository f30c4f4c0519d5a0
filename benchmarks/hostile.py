"""
Nothing ends a night: real nights in throwaway repositories, under hostile agents, signals and kills.

    uv run python benchmarks/hostile.py [--part acts ...] [--count N] [--seed S] [--only WORDS] [--jobs 2]

A case copies a house: a repository of this project with a person's files in it, prepared data, a home, a
folder for temporary files. It runs the real command there (python -m launcher.entry loop --experiments 2),
ends it or lets it end, looks at what is left, starts the command again, and looks once more. All is real but
the training: trainer, scorer and agent are stand-ins that take a second (stand_ins/). The parts:

    acts      an agent does one of the things of stand_ins/agent.py and acts.sh, and the night goes on
    states    an honest night, started in the middle of a person's work
    kill      kill -9 of the launcher while an agent works, git works, or a trainer runs
    signal    SIGINT, SIGTERM or SIGHUP at any moment
    git       the same and kill -9, aimed at a call of git or at the start of a trainer
    twice     four launchers started together after a killed one
    fleet     kill -9 or a signal for a part of a night over two halves of the CPU
    hosts     the same for a night over three hosts by SSH, which vanish, have a full disk or another time
    long      one night of 30 experiments over three hosts, killed twice and started again
    absolute  acts of an agent that goes into the person's repository by its path; counted by itself

A case fails where
- a night hangs, prints a traceback, or ends with a code that is not documented;
- the same command, started again, does not end with 0 or makes no experiments;
- a process lives on;
- anything of the person's has changed, but for keeps: one commit each, of the trainer alone;
- a lock is left in .git, or git fsck complains;
- a run stands in the ledger twice, or not at all;
- a temporary file is left.

Linux only: it finds processes that hide by being their subreaper. The parts over hosts need root and an sshd,
and are left out elsewhere (lab.py). The last lines are for grep, and the exit code is 1 where a case failed.
"""

import argparse
import json
import multiprocessing
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from house import (
    NIGHT_SECONDS,
    STAND_INS,
    TRAINER,
    Ended,
    House,
    View,
    adopt_orphans,
    build_house,
    copy_house,
    descendants,
    differences,
    end_all,
    ledger_faults,
    look,
    remove_house,
    survivors,
    temporary_faults,
)
from lab import Lab, LabHost, build_lab, why_not
from stand_ins.agent import ACTS, DAEMONIC, HONEST, OVER, PROJECT, SLOW_VARIABLE, THERE
from stand_ins.person import STATES, add_belongings, edit_trainer
from stand_ins.trainer import SLOW

EXPERIMENTS = 2  # of a night
CODES = (0, 1, 2, 130)  # that `loop` documents
SCORED = (0, 3)  # how a run may end that is not disturbed: keep, discard
SIGNALS = ("INT", "TERM", "HUP")
MOMENTS = ("before", "while", "after")  # git works
STARTS = 6  # processes of a run, with those that guard them
PHASES = ("agent", "git", "training")
LONG = "40"  # seconds that an agent thinks and a trainer starts, where they are killed meanwhile
PHASE_SECONDS = 60.0  # until a phase is reached
DELAY_SECONDS = 0.7  # at most, from the beginning of a phase to a kill
PARTS_OF_A_DEVICE = {"worker": "spawn_main", "job": "night.job", "trainer": TRAINER}
PARTS_OF_A_FLEET = {**PARTS_OF_A_DEVICE, "agent": "agent.py"}
FLEET_EXPERIMENTS = 5  # of a night over two devices
HOSTS_EXPERIMENTS = 5  # of a night over three hosts
FLEET_SECONDS = 25.0  # in which it is struck
LONG_EXPERIMENTS = 30  # of the long night, cut off twice,
LONG_SECONDS = 30.0  # each time after these
LONG_PATIENCE = 900.0  # after which it is said to hang
HOSTS_SECONDS = 35.0  # in which a night over hosts is struck
HOSTS_PATIENCE = 300.0  # after which such a night is said to hang
AWAY_SECONDS = 45.0  # that a host is away at most, where it comes back
LEASE_SECONDS = 60.0  # in which a host that was cut off has ended what it did
CLOCKS = (3 * 3600, -3 * 3600, -400 * 86400)  # seconds, by which the hosts' clocks are off
PARTS_OF_A_HOST = {"ssh": "night.lend lend", "lender": "night.lend", **PARTS_OF_A_DEVICE}
HOST_FAULTS = ("loop", *PARTS_OF_A_HOST, "sshd", "gone", "gone and back", "disk", "clock")
TRIES = 0.25  # share of the nights that are `try` instead, where that is the same
SHARED_MEMORY = Path("/dev/shm/hostile-agent")  # acts.sh leaves it
SHOWN = 4  # differences in a row of the table
SHOWN_CHARS = 150  # of a difference, or of what a command says


@dataclass(frozen=True)
class Task:
    """A case that is to be run, in any process."""

    part: str
    name: str
    seed: str
    template: House
    folder: Path
    patience: float  # seconds until a process must be gone
    calls: int  # of git, in a night
    seconds: float  # that a night takes


@dataclass
class Result:
    """What became of a case."""

    part: str
    case: str
    ended: str = ""
    restart: str = ""
    faults: list[str] = field(default_factory=list)

    def add(self, faults: Sequence[str], when: str = "") -> None:
        """Add what is wrong, and was not wrong before. when: it was seen."""
        self.faults += [f"{fault}{when}" for fault in faults if fault not in self.faults]

    def add_end(self, what: str, fault: str) -> None:
        """Add what is wrong with the end of a command, if anything."""
        self.add([f"{what}: {fault}"] if fault else [])


def loop(house: House, act: str = HONEST, experiments: int = EXPERIMENTS, **more: str) -> list[str]:
    """Return the arguments of a night whose agent does an act. more: its options, by name"""
    doing = ACTS[act]
    agent = [sys.executable, str(STAND_INS / "agent.py"), str(house.folder), act, *doing.arguments]
    options = ["--experiments", str(experiments), "--pause", "0", "--agent-seconds", f"{doing.seconds:g}"]
    options += [word for name, value in more.items() for word in (f"--{name}", value)]
    return ["loop", *options, "--agent", shlex.join(agent)]


def check(result: Result, house: House, before: View, patience: float, when: str = "") -> None:
    """Look at what a night left, but for temporary files: a launcher that is killed cannot remove them."""
    result.add(survivors(patience), when)
    result.add(differences(before, house), when)
    result.add(ledger_faults(house), when)


def restart(result: Result, house: House, before: View, patience: float, command: Sequence[str]) -> None:
    """Start a night again, and look at what it leaves. Its agent is honest now."""
    (house.folder / OVER).touch()
    try:
        again = house.call(*command)
    except OSError as error:
        result.restart = str(error)
        result.add_end("restart", str(error))
        return
    result.restart = str(again)
    too_few = f"{again.experiments} experiments" if again.experiments < EXPERIMENTS else ""
    result.add_end("restart", again.fault((0,)) or too_few)
    check(result, house, before, patience, " (restart)")
    result.add(temporary_faults(house))


# ---------------------------------------------------------------------------
# Nights that come to their end
# ---------------------------------------------------------------------------


def run_act(task: Task, house: House, rng: random.Random) -> Result:
    """Run a night whose agent does an act."""
    result = Result(task.part, task.name)
    before = look(house)
    command = loop(house, task.name)
    ended = call_on_terminal(result, house, command) if "terminal" in task.name else house.call(*command)
    result.ended = str(ended)
    fault = ended.fault(CODES)
    if not fault and ended.code != 0 and not ACTS[task.name].always:
        fault = f"one act ends the night: {ended}"
    result.add_end("ended", fault)
    check(result, house, before, task.patience)
    restart(result, house, before, task.patience, command)
    SHARED_MEMORY.unlink(missing_ok=True)
    return result


def call_on_terminal(result: Result, house: House, command: Sequence[str]) -> Ended:
    """Run a night that has a terminal. It must be afterwards as it was."""
    terminal, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    ended = house.wait(house.start(*command, terminal=slave))
    if termios.tcgetattr(slave) != before:
        result.add(["terminal: it is changed"])
    os.close(slave)
    os.close(terminal)
    return ended


def run_state(task: Task, house: House, rng: random.Random) -> Result:
    """Run an honest night in the middle of a person's work."""
    result = Result(task.part, task.name)
    STATES[task.name](house)
    (house.folder / PROJECT).write_text(str(house.project))
    before = look(house)
    ended = house.call(*loop(house))
    result.ended = str(ended)
    result.add_end("ended", ended.fault((0,)))
    check(result, house, before, task.patience)
    restart(result, house, before, task.patience, loop(house))
    return result


# ---------------------------------------------------------------------------
# Nights that are cut off
# ---------------------------------------------------------------------------

Strike = Callable[[Sequence[str]], tuple[Ended, str]]


def cut_off(
    task: Task,
    house: House,
    what: str,
    command: str,
    strike: Strike,
    before_restart: Callable[[], object] = lambda: None,
    **more: Any,
) -> Result:
    """Cut a command off, look at what is left, and run a night after it.

    Args:
        task, house: the case.
        what: is done.
        command: "try", or the act of a night's agent.
        strike: starts the command and ends it. Returns (how it ended, what is wrong with that).
        before_restart: is called before the night after it.
        more: arguments of `loop`, for the nights.
    """
    result = Result(task.part, f"{task.name}: {what}")
    if command == "try":
        edit_trainer(house)
        result.case += ", of try"
    before = look(house)
    ended, fault = strike(["try", "-m", "mine"] if command == "try" else loop(house, command, **more))
    result.ended = str(ended)
    result.add_end("ended", fault)
    check(result, house, before, task.patience)
    result.faults = [fault for fault in result.faults if not mends_itself(fault, house)]
    before_restart()
    restart(result, house, before, task.patience, loop(house, **more))
    return result


def mends_itself(fault: str, house: House) -> bool:
    """Return whether the next command mends what a killed one left. After that, it is looked at once more.

    A killed launcher has written no row. One that was killed while it moved the branch has left a journal,
    and the trainer, or its entry in the index, where it was.
    """
    journal = house.project / ".git" / "autoresearch-trial.json"
    state = house.project / ".git" / "autoresearch-loop.json"
    return fault.endswith("is missing") or (
        fault.startswith("trainer:") and (journal.exists() or state.exists())
    )


def send(process: subprocess.Popen[bytes], name: str, to_group: bool) -> None:
    """Send a signal to a launcher, or to its process group as a terminal does."""
    number = signal.Signals[f"SIG{name}"]
    with suppress(ProcessLookupError):
        if to_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def fault_of_signal(ended: Ended, name: str) -> str:
    """Return what is wrong with the end of a command that got a signal, "" when nothing is."""
    by_signal = ended.code == -signal.Signals[f"SIG{name}"]
    if by_signal and (name == "KILL" or not ended.err):  # before it could do anything
        return ""
    return ended.fault((*SCORED, 130))


def plan_git(house: House, call: int, moment: str, name: str, to_group: bool) -> dict[str, str]:
    """Have the launcher signalled at a call of git. Returns variables of its environment."""
    (house.folder / "calls").touch()
    plan = (str(call), moment, name, "-" if to_group else "+", shutil.which("git") or "git")
    (house.folder / "plan").write_text(" ".join(plan) + "\n")
    return {"PATH": f"{STAND_INS}:{os.environ['PATH']}"}


def processes_with(text: str, process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes of a night that have `text` in their command, but for its launcher."""
    found = []
    for pid in descendants(os.getpid()) - {process.pid}:
        with suppress(psutil.Error):
            if any(text in part for part in psutil.Process(pid).cmdline()):
                found.append(pid)
    return found


def wait_for_command(process: subprocess.Popen[bytes], text: str) -> list[int]:
    """Wait until processes of a night have `text` in their command, and return them.

    [] where the launcher ends before, or none of them comes.
    """
    deadline = time.monotonic() + PHASE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = processes_with(text, process)
        if found:
            return found
        time.sleep(0.005)
    return []


def wait_for_run(house: House, process: subprocess.Popen[bytes], known: set[Path]) -> None:
    """Wait until a run has begun beside those that are known, or the launcher ends."""
    while process.poll() is None and runs_of(house) <= known:
        time.sleep(0.0005)


def runs_of(house: House) -> set[Path]:
    return set((house.project / "runs").glob("*/run.json"))


def run_kill(task: Task, house: House, rng: random.Random) -> Result:
    """Kill the launcher while an agent works, git works, or a trainer starts or runs."""
    phase = PHASES[int(task.name) % len(PHASES)]
    dry = phase == "training" and rng.random() < 0.3  # in the dry run that comes before the run
    command = rng.choice((HONEST, DAEMONIC)) if phase == "agent" else HONEST
    if phase != "agent" and not dry and rng.random() < TRIES:
        command = "try"
    slow = {}
    if phase == "agent" and command == HONEST:
        slow = {SLOW_VARIABLE: LONG}
    if phase == "training":
        slow = {SLOW["1" if dry else "0"]: LONG}

    def strike(arguments: Sequence[str]) -> tuple[Ended, str]:
        known = runs_of(house)
        if phase == "git":
            calls = task.calls // 3 if command == "try" else task.calls
            planned = plan_git(house, rng.randint(1, calls), rng.choice(MOMENTS), "KILL", False)
            process = house.start(*arguments, **planned)
        else:
            process = house.start(*arguments, **slow)
            if phase == "training" and not dry:
                wait_for_run(house, process, known)
            wait_for_command(process, "agent.py" if phase == "agent" else TRAINER)
            time.sleep(rng.uniform(0, DELAY_SECONDS))
            send(process, "KILL", False)
        ended = house.wait(process)
        return ended, fault_of_signal(ended, "KILL")

    return cut_off(task, house, f"{phase}{' (dry)' if dry else ''}", command, strike)


def run_signal(task: Task, house: House, rng: random.Random) -> Result:
    """Signal the launcher, or its process group, at any moment."""
    name = rng.choice(SIGNALS)
    to_group = rng.random() < 0.5
    command = "try" if rng.random() < TRIES else HONEST
    moment = rng.uniform(0, task.seconds * (0.5 if command == "try" else 1.0))

    def strike(arguments: Sequence[str]) -> tuple[Ended, str]:
        process = house.start(*arguments)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        send(process, name, to_group)
        ended = house.wait(process)
        return ended, fault_of_signal(ended, name)

    what = f"SIG{name}{' to the group' if to_group else ''} after {moment:.1f} s"
    return cut_off(task, house, what, command, strike)


def run_git(task: Task, house: House, rng: random.Random) -> Result:
    """Signal the launcher at a call of git, or while it starts the processes of a run."""
    name = rng.choice((*SIGNALS, "KILL"))
    to_group = name != "KILL" and rng.random() < 0.5
    command = "try" if rng.random() < TRIES else HONEST
    at_start = rng.random() < 0.3
    calls = task.calls // 3 if command == "try" else task.calls
    number = rng.randint(1, STARTS if at_start else calls)
    moment = rng.choice(MOMENTS)

    def strike(arguments: Sequence[str]) -> tuple[Ended, str]:
        known = runs_of(house)
        if at_start:
            process = house.start(*arguments)
            wait_for_run(house, process, known)
            there = descendants(os.getpid())
            while process.poll() is None and len(descendants(os.getpid()) - there) < number:
                pass  # a sleep would be longer than what is aimed at
            send(process, name, to_group)
        else:
            process = house.start(*arguments, **plan_git(house, number, moment, name, to_group))
        ended = house.wait(process)
        return ended, fault_of_signal(ended, name)

    where = f"at the start of process {number} of a run" if at_start else f"{moment} call {number} of git"
    return cut_off(task, house, f"SIG{name}{' to the group' if to_group else ''} {where}", command, strike)


def run_twice(task: Task, house: House, rng: random.Random) -> Result:
    """Start four launchers together after a killed one."""
    result = Result(task.part, task.name)
    before = look(house)
    process = house.start("run", **{SLOW["0"]: LONG})
    wait_for_command(process, TRAINER)
    time.sleep(rng.uniform(0, DELAY_SECONDS))
    send(process, "KILL", False)
    result.ended = str(house.wait(process))
    result.add(survivors(task.patience))
    commands = [["run"], ["run"], loop(house, experiments=1), loop(house, experiments=1)]
    rng.shuffle(commands)
    started = [house.start(*command) for command in commands]
    for one in started:
        with suppress(subprocess.TimeoutExpired):
            one.wait(NIGHT_SECONDS)
    fault = house.wait(started[-1]).fault(SCORED)  # what all of them print is in one file
    codes = [one.poll() for one in started]
    result.restart = " ".join(map(str, codes))
    result.add_end("restart", fault or ("" if set(codes) <= set(SCORED) else f"exit codes {codes}"))
    check(result, house, before, task.patience)
    result.add(temporary_faults(house))
    return result


def run_fleet(task: Task, house: House, rng: random.Random) -> Result:
    """Strike a part of a night over two devices: the loop, a worker, a job, a trainer or an agent."""
    victim = rng.choice(("loop", *PARTS_OF_A_FLEET))
    name = rng.choice(("KILL", *SIGNALS)) if victim == "loop" else "KILL"
    moment = rng.uniform(0, FLEET_SECONDS)

    def strike(arguments: Sequence[str]) -> tuple[Ended, str]:
        process = house.start(*arguments)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if victim == "loop":
            send(process, name, False)
        else:
            found = wait_for_command(process, PARTS_OF_A_FLEET[victim])
            if found:
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
        ended = house.wait(process)
        return ended, fault_of_signal(ended, name) if victim == "loop" else ended.fault((0,))

    what = f"SIG{name} for the {victim} after {moment:.1f} s"
    return cut_off(task, house, what, HONEST, strike, experiments=FLEET_EXPERIMENTS, devices="cpu:2")


def run_hosts(task: Task, house: House, rng: random.Random) -> Result:
    """Strike a night over three hosts, or one of the hosts."""
    victim = task.name.rpartition(" ")[0]
    name = rng.choice(("KILL", *SIGNALS)) if victim == "loop" else "KILL"
    moment = rng.uniform(0, HOSTS_SECONDS)
    away = rng.uniform(1, AWAY_SECONDS)
    clocks = CLOCKS if victim == "clock" else ()
    folder = task.folder.with_name(f"{task.folder.name}-hosts")
    with build_lab(house, folder, clocks=clocks) as lab:
        host = rng.choice(lab.hosts)
        if victim == "disk":
            host.limit_disk()

        def strike(arguments: Sequence[str]) -> tuple[Ended, str]:
            process = house.start(*arguments)
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.poll() is None:
                strike_host(victim, name, process, host, rng, away)
            ended = house.wait(process, HOSTS_PATIENCE)
            if victim == "loop":
                return ended, fault_of_signal(ended, name)
            return ended, ended.fault((0,))

        what = f"{name} for the {victim} of {host.name} after {moment:.1f} s"
        patient = replace(task, patience=LEASE_SECONDS if victim.startswith("gone") else task.patience)
        more = {"experiments": HOSTS_EXPERIMENTS, "hosts": str(lab.file)}
        result = cut_off(patient, house, what, HONEST, strike, before_restart=host.heal, **more)
        result.add(faults_of_hosts(lab))
    remove_house(folder)
    return result


def run_long(task: Task, house: House, rng: random.Random) -> Result:
    """Kill a long night over three hosts twice, and let the same command bring it to its end."""
    result = Result(task.part, f"{LONG_EXPERIMENTS} experiments over three hosts, killed twice")
    folder = task.folder.with_name(f"{task.folder.name}-hosts")
    before = look(house)
    with build_lab(house, folder) as lab:
        command = loop(house, experiments=LONG_EXPERIMENTS, hosts=str(lab.file))
        for _ in range(2):
            process = house.start(*command)
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.8, 1.2) * LONG_SECONDS)
            if process.poll() is not None:
                result.faults.append("ended: before it was killed")
            send(process, "KILL", False)
            result.ended += f" {house.wait(process)}"
            result.add(survivors(LEASE_SECONDS))
        ended = house.wait(house.start(*command), LONG_PATIENCE)
        result.restart = f"{ended}, {ended.experiments} experiments"
        too_few = "too few experiments" if ended.experiments < LONG_EXPERIMENTS else ""
        result.add_end("restart", ended.fault((0,)) or too_few)
        check(result, house, before, LEASE_SECONDS, " (restart)")
        result.add(faults_of_hosts(lab))
    remove_house(folder)
    return result


def strike_host(
    victim: str, name: str, process: subprocess.Popen[bytes], host: LabHost, rng: random.Random, away: float
) -> None:
    """Do what a case is about. process: the loop's"""
    if victim == "loop":
        send(process, name, False)
    elif victim == "sshd":
        host.kill_sessions()
    elif victim == "disk":
        host.fill_disk()
    elif victim.startswith("gone"):
        host.cut()
        if victim == "gone and back":
            with suppress(subprocess.TimeoutExpired):
                process.wait(away)
            host.mend()
    elif victim in PARTS_OF_A_HOST:
        found = []
        for pid in wait_for_command(process, PARTS_OF_A_HOST[victim]):
            with suppress(psutil.Error):  # it has ended by itself
                if (psutil.Process(pid).name() == "ssh") == (victim == "ssh"):
                    found.append(pid)
        if found:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)


def faults_of_hosts(lab: Lab) -> list[str]:
    """Return what is wrong with the ledgers that the hosts have of what they ran for the night."""
    found = []
    for host in lab.hosts:
        lent = House(host.house.folder, host.ledger.parent)
        if host.ledger.exists():
            found += [f"{host.name}: {fault}" for fault in ledger_faults(lent)]
    return found


# ---------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Cases of one kind."""

    run: Callable[[Task, House, random.Random], Result]
    names: list[str]


def numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]


PARTS = {
    "acts": Part(run_act, [name for name in ACTS if name != HONEST and not name.startswith(THERE)]),
    "states": Part(run_state, list(STATES)),
    "kill": Part(run_kill, numbered(300)),
    "signal": Part(run_signal, numbered(150)),
    "git": Part(run_git, numbered(100)),
    "twice": Part(run_twice, numbered(100)),
    "fleet": Part(run_fleet, numbered(100)),
    "hosts": Part(run_hosts, [f"{fault} {number}" for number in range(10) for fault in HOST_FAULTS]),
    "long": Part(run_long, ["0"]),
    "absolute": Part(run_act, [name for name in ACTS if name.startswith(THERE)]),
}
APART = "absolute"  # is asked for by name
OVER_HOSTS = ("hosts", "long")


def run_task(task: Task) -> Result:
    """Run a case in a copy of the template."""
    house = copy_house(task.template, task.folder)
    (house.folder / PROJECT).write_text(str(house.project))
    try:
        return PARTS[task.part].run(task, house, random.Random(f"{task.seed} {task.part} {task.name}"))
    except Exception as error:  # of this benchmark: the other cases go on
        traceback.print_exc()
        return Result(task.part, task.name, faults=[f"the benchmark failed: {error!r}"])
    finally:
        end_all()


def build_template(folder: Path) -> House:
    """Build the house that every case begins with a copy of. The baseline has its run there."""
    house = build_house(folder)
    add_belongings(house)
    checked(house.call("prepare"))
    checked(house.call("run"))
    return house


def checked(ended: Ended) -> None:
    """Raise RuntimeError unless a command ended well that no case is about."""
    if ended.code != 0:
        raise RuntimeError(f"no house can be built: {ended.out}{ended.err}")


def measure(template: House, folder: Path) -> tuple[int, float]:
    """Return how often a night calls git, and how many seconds it takes."""
    house = copy_house(template, folder)
    began = time.monotonic()
    done = house.call(*loop(house), **plan_git(house, -1, "after", "INT", False))
    checked(done)
    return (house.folder / "calls").stat().st_size, time.monotonic() - began


def print_result(result: Result) -> None:
    """Print a row of the table."""
    differs = "; ".join(fault[:SHOWN_CHARS] for fault in result.faults[:SHOWN])
    if len(result.faults) > SHOWN:
        differs += f"; and {len(result.faults) - SHOWN} more"
    mark = "FAILED" if result.faults else "ok"
    columns = (
        mark,
        result.part,
        result.case,
        result.ended[:SHOWN_CHARS],
        result.restart[:SHOWN_CHARS],
        differs,
    )
    print(" | ".join(json.dumps(text, ensure_ascii=False)[1:-1] for text in columns), flush=True)


def print_counts(results: Sequence[Result]) -> None:
    """Print how many cases of each part failed, and in what."""
    for part in PARTS:
        mine = [result for result in results if result.part == part]
        if not mine:
            continue
        kinds = Counter(
            kind for result in mine for kind in {fault.partition(":")[0] for fault in result.faults}
        )
        for kind, count in kinds.most_common():
            print(f"{part}: {count} cases with: {kind}")
        failed = sum(bool(result.faults) for result in mine)
        print(f"failed_{part}: {failed} of {len(mine)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name in PARTS if name != APART and not (name in OVER_HOSTS and why_not())]
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=usual, help=f"all but {APART} if left out"
    )
    parser.add_argument("--count", type=int, help="cases of each part, drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds until processes must be gone")
    parser.add_argument("--keep", type=Path, help="a new folder for the houses, which stay")
    return parser.parse_args()


def choose(asked: argparse.Namespace, template: House, folder: Path) -> Iterator[Task]:
    """Yield the cases that were asked for."""
    aimed = {"kill", "signal", "git"} & set(asked.part)
    calls, seconds = measure(template, folder / "measured") if aimed else (0, 0.0)
    for part in asked.part:
        names = [name for name in PARTS[part].names if asked.only in name]
        if asked.count is not None and asked.count < len(names):
            rng = random.Random(f"{asked.seed} {part}")
            names = [names[index] for index in sorted(rng.sample(range(len(names)), asked.count))]
        for number, name in enumerate(names):
            place = folder / f"{part}-{number}"
            yield Task(part, name, str(asked.seed), template, place, asked.patience, calls, seconds)


def main() -> None:
    """Run the cases, and print the table."""
    asked = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.keep:
        asked.keep.mkdir(parents=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        folder = (asked.keep or Path(scratch)).resolve()
        tasks = list(choose(asked, build_template(folder / "template"), folder))
        print("result | part | case | ended | restart | what differs", flush=True)
        for task, result in run_tasks(tasks, asked.jobs):
            results.append(result)
            print_result(result)
            if not asked.keep:
                remove_house(task.folder)
    print_counts(results)
    sys.exit(any(result.faults for result in results if result.part != APART))


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Result]]:
    """Run cases in processes of their own, and yield each with its result."""
    # A run removes what is new in shared memory: spawned workers would lose their semaphores to another's.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context, initializer=adopt_orphans) as pool:
        try:
            futures = {pool.submit(run_task, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


if __name__ == "__main__":
    main()
