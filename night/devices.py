"""The devices of a night: which there are, and how a process is bound to one."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backends.platforms import DeviceKind, cpu_facts, output_of, usable_cores
from launcher.setting import Setting, resolve
from prepare import UserError

CORES_VARIABLE = "AUTORESEARCH_CORES"  # the numbers of the cores that a job keeps to, separated by commas
CPUS = re.compile(r"cpu(?::([1-9]\d*))?")


@dataclass(frozen=True)
class Device:
    """One that runs one experiment at a time."""

    name: str  # gpu0, cpu1
    kind: DeviceKind
    uuid: str = ""  # of an NVIDIA GPU
    model: str = ""  # likewise
    cores: tuple[int, ...] = ()  # of a part of a CPU; (): all
    host: str = ""  # that lends it; "": this machine

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Device":
        """Return a device as asdict and JSON made it."""
        return cls(**{**data, "cores": tuple(data["cores"])})

    def environment(self) -> dict[str, str]:
        """Return the variables that bind a process of its machine to the device."""
        if self.kind == "gpu":
            return {"CUDA_VISIBLE_DEVICES": self.uuid} if self.uuid else {}
        return {CORES_VARIABLE: ",".join(map(str, self.cores))} if self.cores else {}


def see_only(device: Device) -> None:
    """Let this process, and what it starts, see one GPU alone. It must come before the machine's facts."""
    if device.kind == "gpu":
        os.environ.update(device.environment())


def setting_on(devices: Sequence[Device], platform: str, track: str, budget: float) -> Setting:
    """Return the setting of the runs on devices of this machine, which are of one kind.

    From here on this process sees the first of them alone, where they are GPUs.

    Raises:
        UserError: the platform is for other devices, or as setting.resolve.
    """
    see_only(devices[0])
    on_cpu = "cpu" if devices[0].kind == "cpu" else ""
    setting = resolve(platform or on_cpu, track, budget)
    kind = setting.platform.device_kind
    if devices[0].kind != kind:
        raise UserError(f"--devices: platform {setting.platform.name} runs on a {kind} (--platform)", 2)
    if devices[0].cores:  # a run sees so many cores, and is ranked with such runs
        setting = replace(setting, facts=cpu_facts(len(devices[0].cores)))
    return setting


def keep_to_cores(environment: Mapping[str, str] = os.environ) -> None:
    """Bind this process, and what it starts, to the cores that an environment names (Device.environment)."""
    cores = environment.get(CORES_VARIABLE, "")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))


def find_gpus() -> list[Device]:
    """Return the NVIDIA GPUs of this machine: of those that CUDA_VISIBLE_DEVICES names, where it is set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    chosen = [f"--id={visible}"] if visible else []
    csv = output_of("nvidia-smi", *chosen, "--query-gpu=index,uuid,name", "--format=csv,noheader")
    cells = [[cell.strip() for cell in line.split(",", 2)] for line in csv.splitlines()]
    return [Device(f"gpu{each[0]}", "gpu", uuid=each[1], model=each[2]) for each in cells if len(each) == 3]


def parse_devices(text: str) -> list[Device]:
    """Return the devices of a night: those of parse_list, which must be of one kind.

    Raises:
        UserError: they are not, or there is no such device.
    """
    devices = parse_list(text)
    models = sorted({device.model or device.kind for device in devices})
    if len(models) > 1:
        raise UserError(
            f"--devices: a night is on one kind of device, and these are {', '.join(models)}: name some", 2
        )
    return devices


def parse_list(text: str) -> list[Device]:
    """Return the devices that a text names, which may be of several kinds.

    text: "all" for every GPU, or the CPU where there is none; else, separated by commas: the numbers of GPUs,
        "cpu", and "cpu:2" for the halves of a CPU

    Raises:
        UserError: there is no such device.
    """
    if text == "all":
        return find_gpus() or [Device("gpu0", "gpu") if is_mac() else Device("cpu0", "cpu")]
    found: list[Device] = []
    gpus: dict[str, Device] | None = None
    for part in map(str.strip, text.split(",")):
        cpus = CPUS.fullmatch(part)
        if cpus:
            found += share_cores(int(cpus[1] or 1))
            continue
        if gpus is None:
            gpus = {gpu.name.removeprefix("gpu"): gpu for gpu in find_gpus()}
        if part not in gpus:
            known = ", ".join(gpus) or "none"
            raise UserError(f"--devices: there is no GPU {part!r}; this machine has: {known} (or cpu:N)", 2)
        found.append(gpus[part])
    devices = list(dict.fromkeys(found))
    names = [device.name for device in devices]
    if len(names) != len(set(names)):
        raise UserError(f"--devices {text}: parts of the CPU that overlap", 2)
    return devices


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
