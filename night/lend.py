"""
What lends the devices of a machine to a night elsewhere: a worker for each, which joins its scheduler.

    python -m night.lend describe    # what this machine is, as JSON; the question comes on stdin, as JSON
    python -m night.lend lend        # over SSH (night/hosts.py): the order comes on stdin, and then a beat
    autoresearch lend ADDRESS        # by hand, for a scheduler that exists

What it runs has a ledger of its own, in runs/lent: the night's ledger is where the night is.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

from launcher.console import say
from launcher.device import awake
from launcher.harness import harness_hash
from launcher.runs import HOME_VARIABLE, runs_dir
from night.devices import Device, parse_devices, setting_on
from night.hosts import NAME_RULE, is_name, night_hash
from night.plan import require_power
from night.tls import make_security
from night.workers import nanny_options, prepare_dask
from prepare import UserError, first_line

LENT = "lent"  # the folder in runs/ of what was run for others
LEASE_SECONDS = 30.0  # without a beat, after which the night is taken for gone, and its runs are ended
LOOK_SECONDS = 0.5
CLOSE_SECONDS = 10.0  # that workers have to end


def describe(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what this machine is to a night: see read_answer in night/hosts.py.

    It prepares the track.

    asked: platform, track, budget and devices, as `autoresearch loop` has them. The devices may also be a
        list, each one as JSON has it.

    Raises:
        UserError: it cannot take part, or is not asked for a device that it has.
    """
    prepare_dask()
    named = asked["devices"]
    devices = parse_devices(named) if isinstance(named, str) else [Device.from_json(one) for one in named]
    setting = setting_on(devices, asked["platform"], asked["track"], asked["budget"])
    setting.require_device()
    require_power()
    return {
        "error": "",
        "harness": harness_hash(),
        "night": night_hash(),
        "platform": setting.platform.name,
        "start": asdict(setting.platform.start),
        "board": setting.board._asdict(),
        "facts": asdict(setting.facts),
        "devices": [asdict(device) for device in devices],
    }


class Beat:
    """Whether the night goes on: lines come on stdin while it does."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.has_ended = False
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        """Read lines until there are no more."""
        with suppress(OSError, ValueError):
            for _ in sys.stdin:
                self.last = time.monotonic()
        self.has_ended = True

    def why_over(self) -> str:
        """Return why nothing more is lent, "" while the night goes on."""
        if self.has_ended:
            return "the night ended, or the connection"
        if time.monotonic() > self.last + LEASE_SECONDS:
            return f"no word of the night for {LEASE_SECONDS:.0f} s"
        return ""


async def lend(
    scheduler: str, workers: Sequence[dict[str, Any]], security: Any, beat: Beat | None = None
) -> str:
    """Lend devices to the night of a scheduler until it is over. Returns why it is.

    Args:
        scheduler: its address.
        workers: for each device of this machine: "device", as JSON has it, with the name that it has in the
            night. Where SSH forwards ports also the one that its worker listens on ("port_there") and the one
            by which it is reached from the scheduler ("port_here").
        security: dask's.
        beat: of the night. None: a signal ends it.

    Raises:
        OSError, RuntimeError, ValueError, TimeoutError: a worker does not join the scheduler.
    """
    from distributed import Nanny
    from distributed.core import Status

    scratch = runs_dir() / LENT
    scratch.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        nannies = {}
        for worker in workers:
            device = Device.from_json(worker["device"])
            options = nanny_options(device, str(scratch), security)
            options["env"][HOME_VARIABLE] = str(scratch)
            if "port_there" in worker:
                options["worker_port"] = worker["port_there"]
                options["host"] = "127.0.0.1"
                options["contact_address"] = f"tls://127.0.0.1:{worker['port_here']}"
            nanny = Nanny(scheduler, name=device.name, **options)
            nannies[device.name] = await stack.enter_async_context(nanny)
        say(f"lending {', '.join(nannies)}")
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for name, nanny in nannies.items():
                if nanny.status in (Status.closed, Status.failed):
                    return f"the worker of {name} has ended"
            if beat and beat.why_over():
                return beat.why_over()


def lend_over_ssh() -> None:
    """Lend what the first line of stdin orders, until the night ends."""
    order = json.loads(sys.stdin.readline())
    prepare_dask()
    security = make_security(order["certificate"])
    beat = Beat()

    def give_up() -> None:  # a worker that does not end must not keep the machine
        while not beat.why_over():
            time.sleep(LOOK_SECONDS)
        time.sleep(CLOSE_SECONDS)
        os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    with awake():
        try:
            why = asyncio.run(lend(order["scheduler"], order["workers"], security, beat))
        except Exception as error:  # the last line is what the night shows
            why = f"{type(error).__name__}: {error}"
    say(f"not lending any more: {why}")


def lend_by_hand(scheduler: str, name: str, devices: Sequence[Device], security: Any) -> None:
    """Lend devices to a scheduler that exists, until a signal comes.

    name: of this machine

    Raises:
        UserError: the scheduler does not take them, or has ended.
    """
    if not is_name(name):
        raise UserError(f"--name {name!r}: {NAME_RULE}", 2)
    workers = [{"device": asdict(replace(device, name=f"{name}/{device.name}"))} for device in devices]
    try:
        with awake():
            why = asyncio.run(lend(scheduler, workers, security))
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        why = first_line(error)
    raise UserError(f"nothing is lent to {scheduler}: {why}")


def main() -> None:
    """Do what the first argument says."""
    if sys.argv[1:] == ["lend"]:
        lend_over_ssh()
        return
    try:
        answer = describe(json.load(sys.stdin))
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
