"""The night as a time line: when the agent thought, and what the device did, for each device."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launcher.report.data import Run, Series, finite
from launcher.report.files import Entry, Folder, loop_lives
from launcher.report.text import clock

HOUR = 3600.0
MOST_HOURS = 36  # the newest of a device that are drawn
LONGEST = 7 * 24 * HOUR  # a span that is longer is a mistake in the record
# In the order of an experiment.
AGENT, DRY_RUN, START_UP, TRAINING, SCORING, WAITING = KINDS = (
    "agent",
    "dry run",
    "start-up",
    "training",
    "scoring",
    "waiting",
)
PHASES = {"dry run": DRY_RUN, "pause": WAITING}  # of the log; the other ones are told by turns and rows


@dataclass(frozen=True)
class Span:
    """A stretch of time in which one thing was done."""

    kind: str
    start: float  # Unix seconds
    end: float
    text: str
    run: str = ""  # id of the run that it belongs to

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Lane:
    """What was done for one device, in time order."""

    device: str
    agent: list[Span] = field(default_factory=list)  # beside it: an agent may think while the device trains
    spans: list[Span] = field(default_factory=list)

    def seconds(self, kind: str) -> float:
        return sum(span.seconds for span in [*self.agent, *self.spans] if span.kind == kind)


class Piece(NamedTuple):
    """The part of a span that lies in one hour."""

    start: float  # seconds from the hour's beginning
    end: float
    span: Span


def make_lanes(series: Sequence[Series], folders: Mapping[str, Folder], log: Sequence[Entry]) -> list[Lane]:
    """Return a lane for each device with times on record. log: of the loop on this machine."""
    lanes: dict[str, Lane] = {}
    device_of: dict[str, str] = {}
    for one in series:
        for run in one.runs:
            device_of[run.id] = one.device
            lane = lanes.setdefault(one.device, Lane(one.device))
            lane.spans += spans_of_run(run, folders.get(run.id, Folder()))
    here = device_of_log(log, device_of)
    if here:
        lanes[here].spans += spans_of_phases(log)
        lanes[here].agent += spans_of_turns(log)
    for lane in lanes.values():
        lane.spans.sort(key=lambda span: span.start)
    return [lane for lane in lanes.values() if lane.spans]


def spans_of_run(run: Run, folder: Folder) -> list[Span]:
    """Return start-up, training and scoring of a run. Without its events, start-up stands for scoring too."""
    total = finite(run.row.total_seconds)
    if run.start is None or not 0 < total <= LONGEST:
        return []
    trained = min(max(0.0, finite(run.row.training_seconds)), total)
    began = folder.trace.started
    if began is None or not 0 <= began <= total:
        began = total - trained
    stopped = folder.trace.stopped
    if stopped is None or not began <= stopped <= total:
        stopped = min(began + trained, total)
    moments = (0.0, began, stopped, total)
    text = run.row.description
    return [
        Span(kind, run.start + begin, run.start + end, text, run.id)
        for kind, begin, end in zip((START_UP, TRAINING, SCORING), moments, moments[1:], strict=False)
        if end > begin
    ]


def spans_of_phases(log: Sequence[Entry]) -> list[Span]:
    """Return the dry runs and the pauses of the log.

    A phase ends with the next line. A phase that is followed by the begin of a loop was cut off: its end is
    not on record.
    """
    spans = []
    for entry, after in zip(log, log[1:], strict=False):
        kind = PHASES.get(str(entry.data.get("phase"))) if entry.event == "phase" else None
        if kind and after.event != "begin" and 0 < after.time - entry.time <= LONGEST:
            spans.append(Span(kind, entry.time, after.time, str(entry.data.get("text") or kind)))
    return spans


def spans_of_turns(log: Iterable[Entry]) -> list[Span]:
    """Return the turns of the agent. Their line is written when they end."""
    spans = []
    for entry in log:
        seconds = entry.number("seconds")
        if entry.event == "turn" and 0 < seconds <= LONGEST:
            text = f"{entry.data.get('agent') or 'the agent'} thinks"
            spans.append(Span(AGENT, entry.time - seconds, entry.time, text))
    return spans


def device_of_log(log: Iterable[Entry], device_of: Mapping[str, str]) -> str:
    """Return the device of the log's last known experiment, "" when the ledgers have none of them."""
    found = ""
    for entry in log:
        if entry.event == "experiment":
            found = device_of.get(str(entry.data.get("run")), found)
    return found


def by_hour(spans: Iterable[Span], offset: float) -> dict[int, list[Piece]]:
    """Return {hour: pieces of the spans that lie in it}. offset: of the local time, seconds east of UTC."""
    hours: dict[int, list[Piece]] = {}
    for span in spans:
        for hour, piece in split(span, offset):
            hours.setdefault(hour, []).append(piece)
    return hours


def split(span: Span, offset: float) -> Iterator[tuple[int, Piece]]:
    """Yield (hour, piece) for each hour that a span touches."""
    start = span.start + offset
    end = span.end + offset
    for hour in range(math.floor(start / HOUR), math.ceil(end / HOUR)):
        begin = max(start - hour * HOUR, 0.0)
        yield hour, Piece(begin, min(end - hour * HOUR, HOUR), span)


@dataclass(frozen=True)
class AgentUse:
    """What the agents of this machine's loops took, as far as they print it."""

    turns: int
    tokens: int
    dollars: float


def agent_use(log: Iterable[Entry]) -> AgentUse:
    """Return what the turns of the log took."""
    turns = [entry for entry in log if entry.event == "turn"]
    return AgentUse(
        turns=len(turns),
        tokens=int(sum(entry.number("tokens") for entry in turns)),
        dollars=sum(entry.number("cost") for entry in turns),
    )


def current_phase(log: Sequence[Entry]) -> Entry | None:
    """Return the phase that a loop is in, None when no loop is in one."""
    for entry in reversed(log):
        if entry.event == "end":
            return None
        if entry.event == "phase":
            return entry
    return None


@dataclass(frozen=True)
class DeviceNow:
    """What a device of a night does."""

    name: str
    doing: str  # "" for nothing
    since: float  # Unix seconds
    last: str  # what came of what it did before, "" for nothing

    def told(self, doing: str) -> str:
        """Return it in a line, without the name.

        doing: in words, with the time since when; not used where it does nothing
        """
        return (doing if self.doing else "free") + (f"; last: {self.last}" if self.last else "")


def devices_now(log: Sequence[Entry]) -> list[DeviceNow]:
    """Return what each device of the loop that runs does; none where none runs, or one without --devices."""
    newest: dict[str, Entry] = {}
    for entry in reversed(log):
        if entry.event == "end":
            return []
        if entry.event == "begin":
            break
        if entry.event == "device":
            newest.setdefault(str(entry.data.get("device")), entry)
    return [
        DeviceNow(name, str(entry.data.get("doing") or ""), entry.time, str(entry.data.get("last") or ""))
        for name, entry in sorted(newest.items(), key=lambda item: (len(item[0]), item[0]))  # gpu2, gpu10
    ]


# ---------------------------------------------------------------------------
# The last night
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Night:
    """The last night of the loop on this machine, from its first begin to its end."""

    entries: Sequence[Entry]  # of the log
    lives: bool | None  # the loop's process does; None: that is not known

    @property
    def start(self) -> float:
        return self.entries[0].time

    @property
    def last(self) -> Entry:
        return self.entries[-1]

    @property
    def has_ended(self) -> bool:
        """Return whether it ended in order."""
        return self.last.event == "end"

    @property
    def is_cut_off(self) -> bool:
        """Return whether its process is gone without a word: it was killed, or the power was cut."""
        return not self.has_ended and self.lives is False

    @property
    def runs(self) -> set[str]:
        """Return the ids of its experiments."""
        return {str(entry.data.get("run")) for entry in self.entries if entry.event == "experiment"}

    def holds(self, time: float | None) -> bool:
        """Return whether a run that began at a time is one of the night's."""
        end = self.last.time if self.has_ended else math.inf
        return time is not None and self.start <= time <= end

    def title(self, offset: float) -> str:
        """Return when the night was, and how it ended. offset: of the local time, seconds east of UTC."""
        begin = clock(self.start, offset)
        if self.has_ended:
            why = str(self.last.data.get("why") or "no reason on record")
            return f"The last night, {begin} to {self._end(offset)} ({why})"
        if self.is_cut_off:
            return f"The last night, from {begin}, cut off after {self._end(offset)}"
        return f"The night so far, from {begin}"

    def _end(self, offset: float) -> str:
        """Return when its last line was written, with the day where the night is a long one."""
        is_long = self.last.time - self.start > 12 * HOUR
        return clock(self.last.time, offset, "%b %d %H:%M" if is_long else "%H:%M")


def last_night(log: Sequence[Entry]) -> Night | None:
    """Return the last night of a log, None where none began.

    A loop that goes on where another one was cut off belongs to the same night.
    """
    begins = [number for number, entry in enumerate(log) if entry.event == "begin"]
    if not begins:
        return None
    first = last = begins.pop()
    while begins and log[first].number("done") > 0:
        first = begins.pop()
    return Night(log[first:], loop_lives(log[last]))
