"""
The score of saved weights, by two processes that never trained. This one holds the rows and does the sums.

The first process is asked for the losses of all rows, in random order. The second, which shares nothing with
it, is then asked about a sample. There the text behind a cut is another row's, and other rows lie beside it.
The loss is taken here, from logits, with targets that the process was never shown. Its losses must be those
of the first. So a look ahead, a memory of rows, a state, random numbers, rows that see each other and a
changed loss function all show, however they are done.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from backends.protocol import RunDir, RunSettings, last_line
from launcher import compiled, shared_memory
from launcher.box import Policy
from launcher.disk_space import LONGEST_LOG, DiskSpace, size_of
from launcher.processes import defer_signals, remove_tree, scoring_id
from launcher.progress import OnEvent, Scored
from launcher.walls import scorer_policy, start_boxed
from prepare import DocumentTotals, Prepared, bits_per_byte

AUDIT_ROWS = 128  # of the sample, at most
AUDIT_POSITIONS = 64  # of each of its rows, at most
AUDIT_LOGITS = 2**26  # that it takes, at most
LEAST_LOSS = -1e-3  # nats: a loss is not negative, but for rounding
MOST_SHAPES = 2**20  # bytes of what a process says of its model
LOOK_SECONDS = 0.2  # between two looks at what they printed
BIAS_ERRORS = 6.0  # standard errors that the bias may lie from 0,
BIAS_SHARE = 0.05  # and this share of the most that it may be


class NotScored(Exception):
    """The weights have no score. `status` is that of the run: invalid, crash or timeout."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """Whose weights are scored."""

    trainer: Path  # the source that the launcher kept
    run: RunDir
    settings: RunSettings
    policy: Policy  # what it may touch, and whatever trains it
    data: Prepared
    bf16: bool  # the device computes in bfloat16
    disk: DiskSpace  # since the run began


class Difference(NamedTuple):
    """How far the losses of the two processes differ, or may, in nats."""

    worst: float  # at one position
    spread: float  # standard deviation over all positions
    bias: float  # the mean over the hidden positions, the last of each row, without its sign


# The most that rounding makes. In bfloat16 a logit of 15 is rounded to 1/16, and only the first process
# compiles the model. An honest run on a CPU had 0.20, 0.019 and 0.002.
MOST_BF16 = Difference(worst=0.5, spread=0.06, bias=0.02)
MOST_FP32 = Difference(worst=0.02, spread=0.003, bias=0.001)


@dataclass(frozen=True)
class Score:
    """Bits per byte of a set of rows."""

    bpb: float
    stderr: float
    tokens: int
    difference: Difference
    nats: np.ndarray  # float64 [documents]
    num_bytes: np.ndarray  # int64 [documents]


class ScoringProcess:
    """One boxed process that scores. It builds the model while the trainer starts, and waits."""

    def __init__(self, job: Job, name: str, seed: int, compiles: bool) -> None:
        self.job = job
        self.shapes: dict[str, list[int]] = {}
        self.drawn = ""
        self.batch = 0
        self.folder = job.run.path / name
        remove_tree(self.folder)
        self.folder.mkdir()
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours.detach())
        command = [sys.executable, "-m", "backends.scorer", str(job.trainer), str(self.folder)]
        command += [str(theirs.fileno()), *(["--compile"] if compiles else [])]
        settings = replace(job.settings, seed=seed, run_id=scoring_id(job.run.run_id, name))
        policy = scorer_policy(job.policy, self.folder, compiles)
        code = None if compiles else self.folder / "compiled"
        if code:
            compiled.copy_kernels(code)
        with open(job.run.score_log, "ab") as log, theirs:
            self._child = start_boxed(policy, command, settings, self.folder, log, theirs.fileno(), code)

    def wait_until_ready(self, on_event: OnEvent) -> None:
        """Wait until the model is built. Raises NotScored when it cannot be."""
        while not self._channel.poll(0.5):
            on_event(None)
        said = self._receive()
        try:
            self.shapes = {str(name): [int(n) for n in shape] for name, shape in said["weights"].items()}
            self.drawn = str(said["drawn"])
            self.batch = int(said["batch"])
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise NotScored("invalid", "the process that scores does not say what model it built") from None
        if not 2 <= self.batch <= 2**16:
            raise NotScored("invalid", f"EVAL_BATCH_SIZE is {self.batch}: 2 rows at least")

    def load(self, weights: Path) -> None:
        """Have it read the weights."""
        shutil.copyfile(weights, RunDir(self.folder).weights)
        self._send({"do": "load"})
        self._receive()

    def nats(self, rows: np.ndarray) -> np.ndarray:
        """Return the losses of rows, uint16 [B, T + 1], in nats: float32 [B, T]."""
        self._send({"do": "nats", "shape": rows.shape}, rows)
        nats = self._receive_numbers((len(rows), rows.shape[1] - 1))
        if nats.min() < LEAST_LOSS:
            raise NotScored("invalid", f"a loss is {nats.min():.3g} nats: none can be negative")
        return nats

    def logits(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the logits of uint16 [B, T] at int64 [B, K] positions: float32 [B, K, vocab_size]."""
        self._send({"do": "logits", "shape": x.shape, "positions": positions.shape[1]}, x, positions)
        return self._receive_numbers((*positions.shape, self.job.data.vocab_size))

    @property
    def pid(self) -> int:
        """That of its guard."""
        return self._child.pid

    def kill(self) -> None:
        """End the process from another thread: whoever waits for it sees that it is gone."""
        self._child.kill()

    def end(self) -> bool:
        """End the process, with all that it started, and remove its folder. A second call changes nothing.

        Returns whether nothing is left of it.
        """
        with defer_signals():
            gone = self._child.end()
            self._channel.close()
            remove_tree(self.folder)
        return gone

    # --- The channel ----------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any], *numbers: np.ndarray) -> None:
        try:
            self._channel.send_bytes(json.dumps(message).encode())
            for array in numbers:
                self._channel.send_bytes(np.ascontiguousarray(array).tobytes())
        except OSError:
            raise self._ended() from None

    def _receive(self) -> Any:
        """Return what the process says is done. Raises NotScored."""
        try:
            said = json.loads(self._channel.recv_bytes(MOST_SHAPES))
        except (OSError, EOFError):
            raise self._ended() from None
        except (ValueError, RecursionError):
            raise NotScored("invalid", "the process that scores sent something that is no answer") from None
        if isinstance(said, dict) and "broken" in said:
            raise NotScored("invalid", str(said["broken"])[:500].encode("utf-8", "replace").decode())
        if not isinstance(said, dict) or "ok" not in said:
            raise NotScored("invalid", "the process that scores sent something that is no answer")
        return said["ok"]

    def _receive_numbers(self, shape: tuple[int, ...]) -> np.ndarray:
        self._receive()
        size = 4 * math.prod(shape)
        try:
            data = self._channel.recv_bytes(size)
        except (OSError, EOFError):
            raise self._ended() from None
        if len(data) != size:
            raise NotScored("invalid", f"the process that scores sent {len(data)} bytes, not {size}")
        numbers = np.frombuffer(data, np.float32).reshape(shape)
        if not np.isfinite(numbers).all():
            raise NotScored("invalid", "model(x) holds NaN or infinity")
        return numbers

    def _ended(self) -> NotScored:
        """Return what to say of a process that went away."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=5)
        silent = f"it printed nothing (exit code {self._child.returncode})"
        last = last_line(self.job.run.score_log, silent)
        return NotScored("crash", f"the model could not be built and scored in a fresh process: {last}")


class ScoringPair(ExitStack):
    """The two processes of a job, from the start of its training to the score.

    The second answers when the first has ended, with all that it started, and what it wrote is gone: they
    cannot tell each other of the rows.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self._shared_before = shared_memory.files()
        try:
            seed = job.settings.seed
            with defer_signals():
                self.first = ScoringProcess(job, "first", seed, compiles=True)
                self.callback(self.first.end)
                self.second = ScoringProcess(job, "second", seed + 1, compiles=False)
                self.callback(self.second.end)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    @property
    def pids(self) -> tuple[int, int]:
        """The processes from which those that score descend."""
        return self.first.pid, self.second.pid

    def wait_until_ready(self, seconds: float, on_event: OnEvent) -> None:
        """Wait until both have built the model."""
        with self._in_time(seconds, f"the model was not built for scoring within {seconds:.0f} s"):
            for process in (self.first, self.second):
                process.wait_until_ready(on_event)
        if self.first.drawn and self.first.drawn == self.second.drawn:
            raise NotScored(
                "invalid",
                "build_model draws the same weights whatever the seed: the launcher chooses it, "
                "so that runs differ by more than luck",
            )

    def compare_shapes(self, trained: dict[str, list[int]]) -> None:
        """Raise NotScored unless build_model gives a model with the tensors of the trained one."""
        built = self.first.shapes
        for name in sorted({*trained, *built}):
            if trained.get(name) == built.get(name):
                continue
            here = (
                f"{trained[name]} in the model that exp.start was given" if name in trained else "not there"
            )
            there = f"{built[name]} in what build_model returns" if name in built else "not in build_model's"
            raise NotScored(
                "invalid",
                f"build_model does not give the model that is trained: '{name}' is {here}, {there}. "
                "Scoring builds the model anew: put its average, wrapper or ensemble into build_model",
            )

    def score(
        self, weights: Path, num_rows: dict[str, int], seconds: float, on_event: OnEvent
    ) -> list[Score]:
        """Return the scores of weights on the first rows of each split. It can be called once.

        Args:
            weights: of the model, a file.
            num_rows: how many rows of "val" and of "sealed".
            seconds: for all of it.

        Raises:
            NotScored: the two processes disagree, or one of them failed.
        """
        rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))  # unknown to the trainer
        totals = []
        samples = []
        with self._in_time(seconds, f"scoring took over {seconds:.0f} s"):
            began = time.time()
            try:
                self.first.load(weights)
                for split, count in num_rows.items():
                    rows = self.job.data.rows(split)[:count]
                    sums, nats = self._score_all(split, rows, rng, on_event)
                    picked = suspicious_and_random(nats, rng)
                    totals.append(sums)
                    samples.append(Sample.draw(rows[picked], nats[picked], self.job.data.vocab_size, rng))
            finally:
                self._end_first(began)
            self.second.load(weights)
            differences = [self._audit(sample) for sample in samples]
        return [
            self._score_of(sums, count, difference)
            for sums, count, difference in zip(totals, num_rows.values(), differences, strict=True)
        ]

    def _score_of(self, sums: DocumentTotals, num_rows: int, difference: Difference) -> Score:
        bpb, stderr = bits_per_byte(sums.nats, sums.num_bytes)
        if not 0 < bpb < math.inf:
            raise NotScored("invalid", f"the score is {bpb}")
        return Score(bpb, stderr, num_rows * self.job.data.seq_len, difference, sums.nats, sums.num_bytes)

    def _score_all(
        self, split: str, rows: np.ndarray, rng: np.random.Generator, on_event: OnEvent
    ) -> tuple[DocumentTotals, np.ndarray]:
        """Return the sums of all rows, and the first process's losses, float32 [rows, T]."""
        data = self.job.data
        totals = DocumentTotals(rows, data.documents(split), data.bos, data.token_bytes())
        losses = np.zeros((len(rows), data.seq_len), np.float32)
        batch = self.first.batch
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), batch):
            picked = order[start : start + batch]
            asked = rows[np.resize(picked, batch)]  # one shape: nothing is compiled for the last batch
            losses[picked] = self.first.nats(asked)[: len(picked)]
            totals.add(picked, losses[picked])
            on_event(Scored(min(start + batch, len(rows)), len(rows)))
        return totals, losses

    def _audit(self, sample: "Sample") -> Difference:
        """Ask the second process about the sample. Returns how far its losses differ from the first one's.

        Raises:
            NotScored: they differ by more than rounding.
        """
        losses = self._losses(sample.changed, sample)
        differences = losses - sample.first_losses
        found = Difference(
            worst=float(np.abs(differences).max()),
            spread=float(differences.std()),
            bias=abs(float(differences[:, -1].mean())),
        )
        most = MOST_BF16 if self.job.bf16 else MOST_FP32
        error = found.spread / math.sqrt(len(differences))
        most = most._replace(bias=min(most.bias, BIAS_ERRORS * error + BIAS_SHARE * most.bias))
        if all(here <= limit for here, limit in zip(found, most, strict=True)):
            return found
        again = self._losses(sample.changed, sample)
        unchanged = self._losses(sample.rows, sample)
        if np.abs(again - losses).max() > most.worst:
            why = "asked twice, it answers otherwise: it draws random numbers or keeps state"
        elif np.abs(unchanged - sample.first_losses).max() <= most.worst:
            why = "with the text behind a position unchanged they agree: a position sees its future"
        else:
            why = (
                "the model keeps what it has seen, rows of a batch are not independent, "
                "or something that was trained is not among its weights"
            )
        raise NotScored(
            "invalid",
            f"a second process gives other losses, by {found.worst:.2g} nats at a position, "
            f"{found.spread:.2g} in general and {found.bias:.2g} on average (rounding stays below "
            f"{most.worst:.2g}, {most.spread:.2g} and {most.bias:.2g}): {why}",
        )

    def _losses(self, rows: np.ndarray, sample: "Sample") -> np.ndarray:
        """Return the second process's losses at the sample's positions, float64 [R, K], from its logits."""
        batch = self.second.batch
        losses = []
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            logits = self.second.logits(rows[part, :-1], sample.positions[part]).astype(np.float64)
            highest = logits.max(axis=2)
            total = highest + np.log(np.exp(logits - highest[:, :, None]).sum(axis=2))
            hit = np.take_along_axis(logits, sample.targets[part][:, :, None], axis=2)[:, :, 0]
            losses.append(total - hit)
        return np.concatenate(losses)

    def _end_first(self, since: float) -> None:
        """End the first process, and remove what it left, among compiled code what it wrote `since`.

        Raises:
            NotScored: something of it may still run.
        """
        gone = self.first.end()
        with defer_signals():
            shared_memory.remove_new(self._shared_before)
            compiled.remove_since(since)
        if not gone:
            raise NotScored("invalid", "the process that scores, or what it started, could not be ended")

    @contextmanager
    def _in_time(self, seconds: float, message: str) -> Iterator[None]:
        """Kill both processes when the time is up, or when they print or write too much.

        Raises NotScored then: with `message` when the time is up.
        """
        deadline = time.monotonic() + seconds
        is_over = threading.Event()
        causes: list[NotScored] = []

        def watch() -> None:
            while not causes and not is_over.wait(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
                filled = self.job.disk.filled()
                if time.monotonic() >= deadline:
                    causes.append(NotScored("timeout", message))
                elif filled:
                    causes.append(NotScored("crash", filled))
                elif size_of(self.job.run.score_log) > LONGEST_LOG:
                    what = f"the model printed more than {LONGEST_LOG:,} bytes while it was scored"
                    causes.append(NotScored("crash", what))
            if causes:
                for process in (self.first, self.second):
                    process.kill()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        except NotScored as error:
            if causes and error.status != "invalid":  # which rule was broken says more than that it was late
                raise causes[0] from None
            raise
        finally:
            is_over.set()
            watcher.join()


def suspicious_and_random(nats: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of the rows that the second process is asked about, without repeats.

    Half of them are those with the lowest mean loss, since a lie about a few rows must be a large one.
    nats: float [rows, T].
    """
    half = AUDIT_ROWS // 2
    lowest = np.argsort(nats.mean(axis=1))[:half]
    others = np.setdiff1d(np.arange(len(nats)), lowest)
    return np.concatenate([lowest, rng.choice(others, min(half, len(others)), replace=False)])


@dataclass(frozen=True)
class Sample:
    """The rows and positions about which the second process is asked. R rows, K positions of each."""

    rows: np.ndarray  # uint16 [R, T + 1], as they are
    changed: np.ndarray  # the same, with another row's text from a cut on
    positions: np.ndarray  # int64 [R, K], before the cut; the last one just before it
    targets: np.ndarray  # int64 [R, K], the true next tokens
    first_losses: np.ndarray  # float64 [R, K], of the first process

    @classmethod
    def draw(cls, rows: np.ndarray, nats: np.ndarray, vocab_size: int, rng: np.random.Generator) -> Self:
        """Draw cuts and positions. A cut hides the target of the position before it, the last one of the row.

        In every second row all tokens are equally likely to be hidden. In the others a token is more likely
        to be hidden if the first process was sure of it.

        Args:
            rows: uint16 [R, T + 1].
            nats: float [R, T], the losses that the first process gave.
            vocab_size: of the logits, which limits how many positions are asked about.
            rng: unknown to the processes.
        """
        count, T = nats.shape
        K = min(T // 2, AUDIT_POSITIONS, max(4, AUDIT_LOGITS // (count * vocab_size)))
        changed = rows.copy()
        positions = np.zeros((count, K), np.int64)
        for i in range(count):
            sureness = np.exp(-nats[i, K:-1].astype(np.float64)) + 1e-9 if i % 2 else np.ones(T - K - 1)
            last = K + int(rng.choice(T - K - 1, p=sureness / sureness.sum()))
            cut = last + 1
            other = rows[rng.integers(count)]
            changed[i, cut:] = other[cut:]
            if changed[i, cut] == rows[i, cut]:  # the position before the cut would not notice
                changed[i, cut] = rows[i, cut] - 1 if rows[i, cut] else 1
            positions[i, :-1] = np.sort(rng.choice(last, K - 1, replace=False))
            positions[i, -1] = last
        targets = np.take_along_axis(rows[:, 1:], positions, axis=1).astype(np.int64)
        first_losses = np.take_along_axis(nats, positions, axis=1).astype(np.float64)
        return cls(rows, changed, positions, targets, first_losses)
