"""The devices of a night: which there are, and how a process is bound to one."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from backends.platforms import DeviceKind, output_of
from launcher.device import usable_cores
from prepare import UserError

CORES_VARIABLE = "AUTORESEARCH_CORES"  # the numbers of the cores that a job keeps to, separated by commas
CPUS = re.compile(r"cpu(?::([1-9]\d*))?")


@dataclass(frozen=True)
class Device:
    """One that runs one experiment at a time."""

    name: str  # gpu0, cpu1
    kind: DeviceKind
    uuid: str = ""  # of a GPU
    cores: tuple[int, ...] = ()  # of a part of a CPU; (): all

    def environment(self) -> dict[str, str]:
        """Return the variables that bind a process to the device."""
        if self.kind == "gpu":
            return {"CUDA_VISIBLE_DEVICES": self.uuid} if self.uuid else {}
        return {CORES_VARIABLE: ",".join(map(str, self.cores))} if self.cores else {}


def see_only(device: Device) -> None:
    """Let this process, and what it starts, see one GPU alone. It must come before the machine's facts."""
    if device.kind == "gpu":
        os.environ.update(device.environment())


def keep_to_cores(environment: Mapping[str, str] = os.environ) -> None:
    """Bind this process, and what it starts, to the cores that an environment names (Device.environment)."""
    cores = environment.get(CORES_VARIABLE, "")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))


class Gpu(NamedTuple):
    """A GPU as nvidia-smi knows it."""

    number: str
    uuid: str
    model: str


def find_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs of this machine: of those that CUDA_VISIBLE_DEVICES names, where it is set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    chosen = [f"--id={visible}"] if visible else []
    csv = output_of("nvidia-smi", *chosen, "--query-gpu=index,uuid,name", "--format=csv,noheader")
    cells = [[cell.strip() for cell in line.split(",", 2)] for line in csv.splitlines()]
    return [Gpu(*each) for each in cells if len(each) == 3]


def parse_devices(text: str) -> list[Device]:
    """Return the devices that --devices names.

    text: "all" for every GPU, or the CPU where there is none; "0,1" for GPUs; "cpu:2" for the halves of a CPU

    Raises:
        UserError: there is no such device, or they are of several kinds.
    """
    cpus = CPUS.fullmatch(text)
    if cpus:
        return share_cores(int(cpus[1] or 1))
    gpus = find_gpus()
    if text == "all":
        if not gpus:
            return [Device("gpu0" if is_mac() else "cpu0", "gpu" if is_mac() else "cpu")]
    else:
        gpus = choose_gpus(text, gpus)
    models = sorted({gpu.model for gpu in gpus})
    if len(models) > 1:
        raise UserError(
            f"--devices: a night is on one kind of device, and these are {', '.join(models)}: name some", 2
        )
    return [Device(f"gpu{gpu.number}", "gpu", gpu.uuid) for gpu in gpus]


def parse_list(text: str) -> list[Device]:
    """Return devices that may be of several kinds: those of parse_devices, separated by commas. See there."""
    if text == "all":
        gpus = [Device(f"gpu{gpu.number}", "gpu", gpu.uuid) for gpu in find_gpus()]
        return gpus or parse_devices("all")
    found = [device for part in text.split(",") for device in parse_devices(part.strip())]
    return list(dict.fromkeys(found))


def choose_gpus(text: str, gpus: list[Gpu]) -> list[Gpu]:
    """Return the GPUs of a list of numbers. Raises UserError."""
    by_number = {gpu.number: gpu for gpu in gpus}
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for number in wanted:
        if number not in by_number:
            known = ", ".join(by_number) or "none"
            raise UserError(f"--devices: there is no GPU {number!r}; this machine has: {known} (or cpu:N)", 2)
    return [by_number[number] for number in wanted]


def share_cores(parts: int) -> list[Device]:
    """Return so many parts of the CPU, each with as many cores as the others: some may be left over.

    Raises:
        UserError: there are fewer cores, or this system binds no process to a core.
    """
    if parts == 1:
        return [Device("cpu0", "cpu")]
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--devices: this system binds no process to a core: cpu, without a number", 2)
    cores = usable_cores()
    size = len(cores) // parts
    if not size:
        raise UserError(f"--devices: {parts} parts of a CPU with {len(cores)} cores", 2)
    return [Device(f"cpu{n}", "cpu", cores=tuple(cores[n * size : (n + 1) * size])) for n in range(parts)]


def is_mac() -> bool:
    return os.uname().sysname == "Darwin"
