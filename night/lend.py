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
from dataclasses import asdict
from typing import Any

from launcher.harness import harness_hash
from launcher.runs import HOME_VARIABLE, runs_dir
from night.devices import Device, parse_devices, setting_on
from night.tls import make_security
from night.workers import nanny_options, prepare_dask
from prepare import UserError

LENT = "lent"  # the folder in runs/ of what was run for others
LEASE_SECONDS = 30.0  # without a beat, after which the night is taken for gone, and its runs are ended
LOOK_SECONDS = 0.5
CLOSE_SECONDS = 10.0  # that workers have to end


def describe(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what this machine is to a night: see read_answer in night/hosts.py.

    It prepares the track.

    asked: platform, track, budget and devices, as `autoresearch loop` has them; a list of devices is they
        themselves, as JSON has them

    Raises:
        UserError: it cannot take part, or is not asked for a device that it has.
    """
    prepare_dask()
    named = asked["devices"]
    devices = parse_devices(named) if isinstance(named, str) else [Device.from_json(one) for one in named]
    setting = setting_on(devices, asked["platform"], asked["track"], asked["budget"])
    setting.require_device()
    return {
        "error": "",
        "harness": harness_hash(),
        "platform": setting.platform.name,
        "board": setting.board._asdict(),
        "facts": asdict(setting.facts),
        "devices": [asdict(device) for device in devices],
        "clock": time.time(),
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
    scheduler: str,
    devices: Sequence[Device],
    workers: Sequence[dict[str, Any]],
    security: Any,
    beat: Beat | None = None,
) -> str:
    """Lend devices to the night of a scheduler until it is over. Returns why it is.

    Args:
        scheduler: its address.
        devices: of this machine.
        workers: the name of each device, and where SSH forwards ports, the one that its worker listens on
            ("listens") and the one by which it is reached from the scheduler ("reached").
        security: dask's.
        beat: of the night. None: a signal ends it.
    """
    from distributed import Nanny

    scratch = runs_dir() / LENT
    scratch.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        for device, worker in zip(devices, workers, strict=True):
            options = nanny_options(device, worker["name"], str(scratch), security)
            options["env"][HOME_VARIABLE] = str(scratch)
            if "listens" in worker:
                options["worker_port"] = worker["listens"]
                options["host"] = "127.0.0.1"
                options["contact_address"] = f"tls://127.0.0.1:{worker['reached']}"
            await stack.enter_async_context(Nanny(scheduler, name=worker["name"], **options))
        print(f"lending {', '.join(worker['name'] for worker in workers)}", file=sys.stderr, flush=True)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            why = beat.why_over() if beat else ""
            if why:
                break
    return why


def lend_over_ssh() -> None:
    """Lend what the first line of stdin orders, until the night ends."""
    order = json.loads(sys.stdin.readline())
    prepare_dask()
    devices = parse_devices(order["devices"])
    security = make_security(order["certificate"])
    beat = Beat()

    def give_up() -> None:  # a worker that does not end must not keep the machine
        while not beat.why_over():
            time.sleep(LOOK_SECONDS)
        time.sleep(CLOSE_SECONDS)
        os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    why = asyncio.run(lend(order["scheduler"], devices, order["workers"], security, beat))
    print(f"not lending any more: {why}", file=sys.stderr, flush=True)


def lend_by_hand(scheduler: str, name: str, devices: Sequence[Device], security: Any) -> None:
    """Lend devices to a scheduler that exists, until a signal comes. name: of this machine"""
    workers = [{"name": f"{name}/{device.name}"} for device in devices]
    asyncio.run(lend(scheduler, devices, workers, security))


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
