"""
The contract between the launcher and a trainer's process, on one page.

The launcher starts a trainer with RunSettings in its environment. The trainer answers with events, one JSON
object a line, on the socket that `launcher_fd` names; there it receives the training rows when its clock
starts. Both sides know a run's files by the properties of RunDir. Nothing here imports a framework.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from prepare import TIME_BUDGET, UserError

ENV_PREFIX = "AUTORESEARCH_"
RUN_ID_VARIABLE = f"{ENV_PREFIX}RUN_ID"  # every process of a run inherits it, so that a survivor can be found
IN_LOOP_VARIABLE = f"{ENV_PREFIX}LOOP"  # the folder of an agent that the loop called: it starts no experiment
EVENT_BYTES = 2**18  # of one event at most; a longer line is an error
ROWS_BYTE = b"r"  # comes with the file descriptor of the training rows
LOG_BYTES = 2**16  # at the end of a log, which are looked at
LINE_CHARS = 300  # of a line of a log, which are shown


# ---------------------------------------------------------------------------
# Launcher -> trainer: the environment
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSettings:
    """What a trainer is told: each field is the environment variable AUTORESEARCH_<FIELD>.

    A trainer that is started by hand is told nothing: the defaults below are then in force.
    """

    platform: str = ""  # entry of platforms.yaml; empty: the one that fits this machine
    track: str = ""  # empty: the platform's own
    entries: str = ""  # both entries as JSON: in its box a trainer cannot look what files a track has
    data_dir: str = ""  # of the track's prepared data; empty: where prepare.py keeps it
    seed: int = 1
    budget: float = float(TIME_BUDGET)  # seconds of training
    weights: str = ""  # file that takes the weights; empty: they are not written
    launcher_fd: int = -1  # socket to the launcher; -1: there is none, progress goes to the terminal
    run_id: str = ""
    profiled: int = 0  # 1: some steps are profiled, as in a dry run

    def to_env(self) -> dict[str, str]:
        """Return the settings as environment variables."""
        return {ENV_PREFIX + f.name.upper(): str(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "RunSettings":
        """Read the settings back. An absent or empty variable leaves the default.

        Raises:
            UserError: a variable holds something else than its field's type, or a budget that is no time.
        """
        values: dict[str, Any] = {}
        for f in fields(cls):
            name = ENV_PREFIX + f.name.upper()
            text = env.get(name, "")
            if not text:
                continue
            assert isinstance(f.type, type)
            try:
                values[f.name] = f.type(text)
            except ValueError:
                raise UserError(f"{name} is {text!r}: expected {f.type.__name__}", 2) from None
        settings = cls(**values)
        if not (math.isfinite(settings.budget) and settings.budget > 0):
            raise UserError(f"{ENV_PREFIX}BUDGET is {settings.budget}: expected seconds", 2)
        return settings


# ---------------------------------------------------------------------------
# Trainer -> launcher: the events
# ---------------------------------------------------------------------------

NonNegative = Annotated[float, Ge(0), Le(1e18)]
Count = Annotated[int, Ge(0), Le(10**18)]
STRICT = {"strict": True, "allow_inf_nan": False, "extra": "ignore"}  # pydantic's settings for the events


@dataclass(frozen=True)
class Start:
    """The trainer is ready: the clock of the training budget starts when it has the training rows."""

    device: str
    platform: str
    track: str
    seed: int
    budget: Annotated[float, Gt(0)]
    num_params_M: NonNegative
    depth: Count
    flops_per_token: Count
    peak_tflops: NonNegative
    dtype: str  # of the device's matrix products
    startup: NonNegative  # seconds since Experiment() was made
    weights: dict[str, list[Count]]  # shape of each tensor of the model
    laptop: dict[str, bool | Count | str] = field(default_factory=dict)  # platforms.mac_state()
    event: Literal["start"] = "start"
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Log:
    """A point of the loss curve."""

    step: Count
    loss: float  # nats a token, of this step
    smooth: float  # the exponential average
    tokens: Count
    elapsed: NonNegative  # of training
    tokens_per_s: NonNegative
    mfu: float  # percent
    event: Literal["log"] = "log"
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Stop:
    """The training is over and the weights are written. The launcher ends the trainer when it reads this."""

    num_steps: Count
    tokens: Count
    peak_memory_mb: NonNegative
    step_shares: dict[str, float] = field(default_factory=dict)  # of a step's time, by kind of work
    event: Literal["stop"] = "stop"
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Invalid:
    """The run breaks a rule."""

    message: str
    event: Literal["invalid"] = "invalid"
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Failure:
    """The trainer failed: an exception, out of memory, a loss that is not finite."""

    kind: Literal["exception", "oom", "nonfinite"]
    message: str
    event: Literal["error"] = "error"
    __pydantic_config__ = STRICT


Event = Start | Log | Stop | Invalid | Failure


class EventError(ValueError):
    """A line from a trainer is not an event."""


def format_event(event: Event) -> str:
    """Return the event as a line of JSON, newline included."""
    return json.dumps(asdict(event)) + "\n"


def parse_event(line: bytes | str) -> Event:
    """Read an event, its types and ranges checked.

    Raises:
        EventError: the line is torn, hostile, or from another version. The message is one line.
    """
    from pydantic import ValidationError

    if len(line) > EVENT_BYTES:
        raise EventError(f"a line of {len(line)} bytes")
    try:
        return _event_adapter().validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EventError(f"{where}: {first['msg']}".removeprefix(": ")[:200]) from None


@functools.cache
def _event_adapter() -> Any:
    from pydantic import Field, TypeAdapter

    return TypeAdapter(Annotated[Event, Field(discriminator="event")])


# ---------------------------------------------------------------------------
# What the launcher makes of it
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The score, and what it took: the content of result.json, and the last lines that a run prints."""

    val_bpb: Annotated[float, Gt(0)]
    val_stderr: float
    val_tokens: int
    difference_worst: float  # nats between the losses of the two processes that scored, at one position
    difference_spread: float  # its standard deviation over positions
    difference_bias: float  # and its mean, without its sign
    training_seconds: float
    total_seconds: float
    peak_memory_mb: float
    tokens_per_second: int
    mfu_percent: float
    total_tokens_M: float
    epochs: float
    num_steps: int
    num_params_M: float
    depth: int
    flops_per_token: int
    peak_tflops: float
    dtype: str
    platform: str
    device: str
    track: str
    seed: int
    __pydantic_config__ = STRICT


# ---------------------------------------------------------------------------
# Both: the files of a run
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDir:
    """The folder runs/<id>/ of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def record(self) -> Path:
        """What is run, on what, by which process. The launcher writes it before the trainer starts."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """Everything that the trainer prints."""
        return self.path / "train.log"

    @property
    def events(self) -> Path:
        """The events as they came, each with `at`, seconds since the child was started."""
        return self.path / "events.jsonl"

    @property
    def score_log(self) -> Path:
        """Everything that the processes print which score."""
        return self.path / "score.log"

    @property
    def result(self) -> Path:
        """The Result."""
        return self.path / "result.json"

    @property
    def box(self) -> Path:
        """The folder that the trainer may write in. It is removed when the run is over."""
        return self.path / "box"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def keep_weights(self) -> Path:
        """An empty file: the user asked to keep the weights."""
        return self.path / "keep-weights"

    @property
    def row(self) -> Path:
        """The run's row, as the ledger has it. A ledger that was lost is written again from these."""
        return self.path / "row.json"

    def read_record(self) -> dict[str, Any]:
        """Return the content of `record`; {} when it is absent or damaged."""
        return read_json(self.record)

    def trainer(self) -> Path | None:
        """Return the copy of the trainer that was run, None when there is none."""
        name = self.read_record().get("trainer")
        path = self.path / Path(str(name)).name
        return path if name and os.path.isfile(path) else None

    def read_events(self) -> Iterator[tuple[float, Event]]:
        """Yield (seconds since the child was started, event). Lines that are no events are left out."""
        try:
            lines = self.events.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                at = float(json.loads(line)["at"])
                yield at, parse_event(line)
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                continue

    def read_result(self) -> dict[str, Any]:
        """Return the content of `result`; {} when it is absent or damaged."""
        return read_json(self.result)

    def read_score(self) -> Result | None:
        """Return the result, None when it is absent or damaged, or no score."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(Result).validate_json(self.result.read_bytes())
        except (OSError, ValidationError):
            return None

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines of what the trainer printed, "" when it printed nothing."""
        return "\n".join(last_lines(self.log)[-lines:])


def last_lines(log: Path) -> list[str]:
    """Return the lines in the last LOG_BYTES of a file, each cut at LINE_CHARS; [] when there is none."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - LOG_BYTES))
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line[:LINE_CHARS] for line in text.splitlines()]


def last_line(log: Path, otherwise: str = "it printed nothing") -> str:
    """Return the last line of a log with something in it, `otherwise` when there is none."""
    lines = [line.strip() for line in last_lines(log) if line.strip()]
    return lines[-1] if lines else otherwise


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} when there is no file, or something else in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: no UTF-8, no JSON
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w", encoding="utf-8") as f:
        f.write(json.dumps(data, indent=1))
        f.flush()
        os.fsync(f.fileno())
    os.replace(scratch, path)
