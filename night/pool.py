"""Which devices a night or a comparison has, here and on other machines, and the setting of its runs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.platforms import Facts, StartSizes
from launcher.console import warn_once
from launcher.setting import Setting, resolve
from night.devices import Device, parse_devices, setting_on
from night.hosts import Host, LentDevices, Unreachable, ask_host, read_hosts, require_same_board
from night.workers import Pool, ask_scheduler, prepare_dask, security_for
from prepare import TIME_BUDGET, UserError


def find_lent(
    here: Sequence[Device], hosts: Path | None, scheduler: str, is_open: bool, asked: dict[str, Any]
) -> Pool:
    """Return devices of this machine, and what other machines lend.

    Args:
        here: of this machine.
        hosts: a file of hosts.
        scheduler: the address of one that exists, "" for none.
        is_open: the scheduler may be without encryption.
        asked: platform, track and budget, as lend.describe takes them.

    Raises:
        UserError: a machine is not as this one.
    """
    prepare_dask()
    if scheduler:
        security = security_for(scheduler, is_open)
        return Pool(scheduler=scheduler, joined=ask_scheduler(scheduler, security, asked))
    if hosts is None:
        return Pool(here)
    named = read_hosts(hosts)
    with ThreadPoolExecutor(len(named)) as threads:
        answers = list(threads.map(lambda host: try_to_ask(host, asked), named))
    found = [(host, lent) for host, lent in zip(named, answers, strict=True) if lent]
    if not found and not here:
        raise UserError(f"none of the hosts in {hosts} can be reached")
    return Pool(here, found)


def try_to_ask(host: Host, asked: dict[str, Any]) -> LentDevices | None:
    """Return what a host says of itself, None where it cannot be reached: others go on without it."""
    try:
        return ask_host(host, asked)
    except Unreachable as error:
        warn_once(f"{error}; it is left out")
        return None


def find_pool(
    devices: str,
    hosts: Path | None,
    scheduler: str,
    is_open: bool,
    platform: str,
    track: str,
    budget: float | None,
) -> tuple[Pool, Setting]:
    """Return the devices of a night, all of one kind, and the setting of its runs.

    Args:
        devices: of this machine, as parse_devices takes them; "" for none.
        hosts, scheduler, is_open: as find_lent takes them.
        platform, track: as setting.resolve takes them; without a platform it is that of this machine's
            devices, or of the first machine that lends some.
        budget: seconds of training, that of the rules if left out.

    Raises:
        UserError: there is no such device, or the runs on it would not stand on one board.
    """
    budget = budget or float(TIME_BUDGET)
    here: list[Device] = parse_devices(devices) if devices else []
    setting = setting_on(here, platform, track, budget) if here else None
    asked = {
        "platform": setting.platform.name if setting else platform,
        "track": setting.track.name if setting else track,
        "budget": budget,
    }
    pool = find_lent(here, hosts, scheduler, is_open, asked)
    if setting is None:
        first = pool.lent[0]
        resolved = resolve(first.platform, track, budget)
        sized = replace(resolved.platform, start=StartSizes(**first.start))
        setting = replace(resolved, platform=sized, facts=Facts(**first.facts), boxed=first.board.boxed)
    for lent in pool.lent:
        require_same_board(lent, setting.board, setting.platform.start)
    return pool, setting
