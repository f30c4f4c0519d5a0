"""
What a trainer runs inside: the clock, the batches, the loss curve, the score. One per process.

The base class knows no framework; backends.cuda and backends.mlx add the device. What the launcher tells a
run and what the run answers is backends.protocol. Alone (`python train_cuda.py`) the progress goes to the
terminal.
"""

import math
import operator
import os
import random
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from backends import checks
from backends.platforms import (
    choose_platform,
    facts_for,
    mac_state,
    peak_tflops,
    scored_tokens,
)
from backends.protocol import (
    Event,
    Failure,
    Invalid,
    Log,
    Result,
    RunDir,
    RunSettings,
    Score,
    Start,
    Stop,
    format_event,
    write_json,
)
from prepare import UserError, bits_per_byte, load_track, prepare_track, row_totals

LOG_EVERY = 0.2  # seconds between points of the loss curve
LINE_EVERY = 10.0  # seconds between progress lines when a trainer runs alone and not on a terminal
LOSS_LAG = 2  # steps that the device may lie behind the host: reading a loss waits for no newer one


class BrokenRule(SystemExit):
    """The run breaks a rule. The message says which."""


class RowOrder:
    """The order in which training rows are drawn: each once an epoch, shuffled by the seed."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._epoch = -1
        self._shuffled = np.empty(0, np.int64)

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the rows drawn from `start` on, counted from the beginning of training: int64 [count]."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_rows)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        return self._shuffled


class Experiment(ABC):
    """One run of one trainer.

    Attributes:
        platform: the entry of platforms.yaml that is in force.
        track: the prepared data, prepare.Prepared.
        seed: of the data's order and of the framework.
        budget: seconds of training.
        device: its name.
        bf16: the device computes in bfloat16.

    Raises:
        SystemExit: machine, platform or prepared data do not fit. The message is one line.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._events: TextIO | None = None
        sys.excepthook = self._report_crash
        try:
            settings = RunSettings.from_env()
            self.platform, _ = choose_platform(settings.platform)
            track = load_track(settings.track or self.platform.track)
            self.track = prepare_track(track)
        except UserError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        self._run_dir = RunDir(Path(settings.run_dir)) if settings.run_dir else None
        if settings.events_fd >= 0:
            self._events = os.fdopen(settings.events_fd, "w", buffering=1)
            os.environ.pop("AUTORESEARCH_EVENTS_FD")  # the pipe is ours alone, not a child's
        self.seed = settings.seed
        self.budget = settings.budget
        self.val_tokens = settings.val_tokens or scored_tokens(self.platform, track)
        facts = facts_for(self.platform)
        self.device = facts.device
        self.bf16 = facts.bf16

        self._train_rows = self.track.rows("train")
        self._order = RowOrder(len(self._train_rows), self.seed)
        self._rows_drawn = 0
        self._next_batch: tuple[int, Any] | None = None  # (rows, the copy under way)
        self._start: float | None = None
        self._stop: float | None = None
        self._steps = 0
        self._tokens = 0
        self._unread: deque[tuple[int, float, int, Callable[[], float]]] = deque()
        self._smooth_loss = math.nan
        self._last_point = -math.inf
        self._last_line = -math.inf
        self._warm_up_rows = 4
        self._scoring = False
        self._peeked = ""

        self._watch_held_out_rows()
        if settings.launcher_pid:
            self._end_with_the_launcher(settings.launcher_pid)
        random.seed(self.seed)
        np.random.seed(self.seed)
        self._open_device()

    # --- The device: what backends.cuda and backends.mlx define ---------------------------------------------

    @abstractmethod
    def _open_device(self) -> None:
        """Find the device, limit its memory, seed the framework."""

    @abstractmethod
    def _seed_changed(self) -> bool:
        """Return whether the trainer seeded the framework's generator itself."""

    @abstractmethod
    def _to_device(self, rows: np.ndarray) -> Any:
        """Start the copy of rows, int64 [B, T + 1], to the device. Returns what _arrived takes."""

    @abstractmethod
    def _arrived(self, copy: Any) -> tuple[Any, Any]:
        """Return (x, y), each [B, T] on the device, when the copy is usable by the next operation."""

    @abstractmethod
    def _read_later(self, loss: Any) -> Callable[[], float]:
        """Start the copy of a scalar to the host. Returns a function that waits for it and gives it."""

    @abstractmethod
    def _nats(self, model: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the model's losses in nats, float32 [B, T]. x, y: int64 [B, T]."""

    @abstractmethod
    def _num_params(self, model: Any) -> int:
        """Return the number of the model's parameters."""

    @abstractmethod
    def _save(self, model: Any, path: Path) -> None:
        """Write the weights as safetensors."""

    @abstractmethod
    def _load(self, model: Any, path: Path) -> None:
        """Read weights that _save wrote into the model."""

    @abstractmethod
    def _synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    @abstractmethod
    def _peak_memory_mb(self) -> float:
        """Return the most memory that the run held, in MiB."""

    @abstractmethod
    def _measured_tflops(self) -> float:
        """Return the TFLOP/s of a large matrix product in the compute dtype."""

    @abstractmethod
    def _out_of_memory(self, error: BaseException) -> bool:
        """Return whether the error says that memory ran out."""

    # --- Batches --------------------------------------------------------------------------------------------

    def batch(self, device_batch_size: int) -> tuple[Any, Any]:
        """Return the next (x, y), each [B, T] on the device, with B = device_batch_size rows.

        The batch after it is already being copied. The size may change from call to call: no row is left out
        and none comes twice in an epoch.
        """
        if self._next_batch is None or self._next_batch[0] != device_batch_size:
            self._next_batch = device_batch_size, self._copy_rows(self._rows_drawn, device_batch_size)
        copy = self._next_batch[1]
        self._rows_drawn += device_batch_size
        self._tokens += device_batch_size * self.track.seq_len
        self._next_batch = device_batch_size, self._copy_rows(self._rows_drawn, device_batch_size)
        return self._arrived(copy)

    def dummy_batch(self, device_batch_size: int) -> tuple[Any, Any]:
        """Return a batch of random tokens, for compilation and warm-up: nothing can be learned from it."""
        self._warm_up_rows = device_batch_size
        shape = device_batch_size, self.track.seq_len + 1
        tokens = np.random.default_rng(0).integers(0, self.track.vocab_size, shape)
        return self._arrived(self._to_device(tokens))

    def _copy_rows(self, start: int, count: int) -> Any:
        return self._to_device(self._train_rows[self._order.indices(start, count)].astype(np.int64))

    def check_memory(self, rows: int) -> None:  # noqa: B027  a device need not be able to tell
        """Call after a pass over one row. End the run if `rows` rows would not fit in memory."""

    # --- The clock ------------------------------------------------------------------------------------------

    def start(self, model: Any, depth: int, flops_per_token: int) -> None:
        """Start the clock. The model must be untrained; compilation and warm-up lie before this.

        Args:
            depth: layers of the model, for the ledger.
            flops_per_token: floating-point operations of a training step per token, for MFU.

        Raises:
            SystemExit: the model is trained, a batch was drawn, or a seed was set before the start.
        """
        try:
            self._depth = operator.index(depth)
            self._flops_per_token = round(flops_per_token)
        except (TypeError, ValueError, OverflowError):
            self._depth = self._flops_per_token = 0
        if not (0 < self._depth < 10**6 and 0 < self._flops_per_token < 10**15):
            self._refuse(
                f"exp.start: depth {depth!r:.40} and flops_per_token {flops_per_token!r:.40} "
                "must be positive whole numbers"
            )
        self._num_params_M = round(self._num_params(model) / 1e6, 3)
        self._refuse(checks.untrained(self._first_loss(model), self.track.vocab_size))
        if self._seed_changed():
            self._refuse(
                "the trainer set its own random seed: the launcher chooses it, "
                "so that runs differ by more than luck"
            )
        stated = peak_tflops(self.platform, facts_for(self.platform))
        self._peak_flops = 1e12 * (stated or self._measured_tflops())
        if self._next_batch is not None:
            self._refuse("exp.batch was called before exp.start: warm up on exp.dummy_batch()")
        self._synchronize()
        self._emit(
            Start(
                device=self.device,
                platform=self.platform.name,
                track=self.track.name,
                seed=self.seed,
                budget=self.budget,
                num_params_M=self._num_params_M,
                startup=self._age(),
                laptop=mac_state(),
            )
        )
        self._start = time.monotonic()

    def _first_loss(self, model: Any) -> float:
        """Return the mean loss on a few training rows, in a shape that the warm-up compiled."""
        shape = self._warm_up_rows, self.track.seq_len + 1
        rows = np.resize(self._train_rows[: self._warm_up_rows].astype(np.int64), shape)
        return float(np.mean(self._nats(model, rows[:, :-1], rows[:, 1:])))

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        if self._start is None:
            sys.exit("exp.progress was read before exp.start(model)")
        return (self._stop or time.monotonic()) - self._start

    @property
    def progress(self) -> float:
        """Share of the time budget used, from 0. Training ends when it reaches 1."""
        return self.elapsed / self.budget

    def log(self, step: int, loss: Any) -> None:
        """Record a step. The loss, a scalar on the device, is read LOSS_LAG steps late: nothing waits for it.

        Raises:
            SystemExit: a loss is not finite.
        """
        self._unread.append((step, self.elapsed, self._tokens, self._read_later(loss)))
        self._steps += 1
        if len(self._unread) > LOSS_LAG:
            self._read_loss()

    def _read_loss(self) -> None:
        step, at, tokens, read = self._unread.popleft()
        loss = read()
        if not math.isfinite(loss):
            message = f"the loss is {loss} at step {step}"
            self._emit(Failure("nonfinite", message))
            sys.exit(f"{message}: lower the learning rates or look for a division by zero")
        first = math.isnan(self._smooth_loss)
        self._smooth_loss = loss if first else 0.9 * self._smooth_loss + 0.1 * loss
        if at - self._last_point < LOG_EVERY and self._unread:
            return
        self._last_point = at
        rate = tokens / at if at > 0 else 0.0
        self._emit(
            Log(
                step=step,
                loss=round(loss, 5),
                smooth=round(self._smooth_loss, 5),
                tokens=tokens,
                elapsed=round(at, 3),
                tokens_per_s=round(rate),
                mfu=self._mfu(rate),
            )
        )

    def _mfu(self, tokens_per_second: float) -> float:
        """Return the model FLOPs utilisation in percent."""
        return round(100 * tokens_per_second * self._flops_per_token / self._peak_flops, 2)

    # --- The end --------------------------------------------------------------------------------------------

    def finish(self, model: Any, eval_batch_size: int) -> None:
        """Stop the clock, check and score the model, save its weights, write and print the result."""
        self._synchronize()
        self._stop = time.monotonic()
        self._emit(Stop(round(self.elapsed, 3), self._steps, self._tokens))
        while self._unread:
            self._read_loss()
        peak_memory_mb = self._peak_memory_mb()
        if self._peeked:
            self._refuse(
                f"the trainer opened {self._peeked} before its training ended: "
                "validation rows are for scoring only"
            )
        self._refuse(checks.harness_intact(self))
        bpb, stderr, scored = self.score(model, eval_batch_size)
        if self._run_dir:
            self._save(model, self._run_dir.weights)
        result = self._result(bpb, stderr, scored, peak_memory_mb)
        if self._run_dir:
            write_json(self._run_dir.result, result.printed())
        self._emit(result)
        for key, value in result.printed().items():
            print(f"{key}: {value}", flush=True)

    def _result(self, bpb: float, stderr: float, scored: int, peak_memory_mb: float) -> Result:
        rate = self._tokens / self.elapsed
        return Result(
            val_bpb=round(bpb, 6),
            val_stderr=round(stderr, 6),
            val_tokens=scored,
            training_seconds=round(self.elapsed, 2),
            total_seconds=self._age(),
            peak_memory_mb=round(peak_memory_mb, 1),
            tokens_per_second=round(rate),
            mfu_percent=self._mfu(rate),
            total_tokens_M=round(self._tokens / 1e6, 3),
            epochs=round(self._tokens / self._train_rows[:, 1:].size, 2),
            num_steps=self._steps,
            num_params_M=self._num_params_M,
            depth=self._depth,
            flops_per_token=self._flops_per_token,
            peak_tflops=round(self._peak_flops / 1e12, 2),
            platform=self.platform.name,
            device=self.device,
            track=self.track.name,
            seed=self.seed,
        )

    def score(self, model: Any, eval_batch_size: int, split: str = "val") -> tuple[float, float, int]:
        """Return (bits per byte, standard error, tokens scored), after the checks that make it a fair number.

        Rows are scored in file order, so that a platform that scores fewer scores a prefix.
        """
        self._scoring = True
        num_rows = -(-self.val_tokens // self.track.seq_len)
        rows = self.track.rows(split)[:num_rows]

        def nats_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return self._nats(model, x, y)

        rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))  # unknown to the trainer
        picked = np.resize(rng.permutation(len(rows))[:eval_batch_size], eval_batch_size)
        tolerance = checks.BF16_TOLERANCE if self.bf16 else checks.FP32_TOLERANCE
        sample = rows[picked].astype(np.int64)
        self._refuse(checks.causal(nats_of, sample, self.track.vocab_size, tolerance, rng))

        row_nats, row_bytes = self._score_rows(nats_of, rows, eval_batch_size)
        bpb, stderr = bits_per_byte(row_nats, row_bytes)
        if not math.isfinite(bpb):
            self._refuse("the score is not finite")
        return bpb, stderr, len(rows) * self.track.seq_len

    def _score_rows(
        self, nats_of: checks.NatsOf, rows: np.ndarray, eval_batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (nats float64 [rows], bytes int64 [rows]). The first batch is scored again at the end."""
        shape = eval_batch_size, self.track.seq_len + 1  # one shape: nothing is compiled for the last batch
        token_bytes = self.track.token_bytes()
        row_nats = []
        row_bytes = []

        def score_batch(i: int) -> tuple[np.ndarray, np.ndarray]:
            batch = np.resize(rows[i : i + eval_batch_size].astype(np.int64), shape)
            return nats_of(batch[:, :-1], batch[:, 1:]), batch

        began = shown = time.monotonic()
        for i in range(0, len(rows), eval_batch_size):
            count = min(eval_batch_size, len(rows) - i)
            nats, batch = score_batch(i)
            nats = nats[:count]
            if i == 0:
                first_nats = nats
            batch_nats, batch_bytes = row_totals(nats, batch[:count, 1:], token_bytes)
            row_nats.append(batch_nats)
            row_bytes.append(batch_bytes)
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                self._emit(Score(i + count, len(rows), round(shown - began, 1)))
        again, _ = score_batch(0)
        self._refuse(checks.same_score(first_nats, again[: len(first_nats)]))
        return np.concatenate(row_nats), np.concatenate(row_bytes)

    # --- Events, and what goes wrong ------------------------------------------------------------------------

    def _age(self) -> float:
        """Return the seconds since the process began its experiment."""
        return round(time.monotonic() - self._began, 2)

    def _emit(self, event: Event) -> None:
        if self._events:
            self._events.write(format_event(event))
        elif isinstance(event, Log):
            self._print_progress(event)
        elif isinstance(event, Stop) and sys.stderr.isatty():
            print(file=sys.stderr)

    def _print_progress(self, event: Log) -> None:
        terminal = sys.stderr.isatty()
        if not terminal and time.monotonic() - self._last_line < LINE_EVERY:
            return
        self._last_line = time.monotonic()
        line = (
            f"step {event.step:5d} | loss {event.smooth:.4f} | {event.tokens_per_s:,} tok/s "
            f"| mfu {event.mfu:.1f}% | {max(0, self.budget - event.elapsed):.0f} s left"
        )
        if terminal:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _refuse(self, reason: str | None) -> None:
        """End the run as invalid when there is a reason."""
        if reason:
            self._emit(Invalid(reason))
            raise BrokenRule(f"invalid: {reason}")

    def _report_crash(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        if self._out_of_memory(error):
            message = "out of memory: lower DEVICE_BATCH_SIZE (TOTAL_BATCH_SIZE can stay) or the model's size"
            self._emit(Failure("oom", message))
            print(message, file=sys.stderr)
        else:
            message = f"{kind.__name__}: {error}".encode("utf-8", "replace").decode()  # no half surrogates
            self._emit(Failure("exception", message[:500]))

    def _end_with_the_launcher(self, launcher_pid: int) -> None:
        """End this process group when the launcher is gone.

        It holds the device, and nothing else would stop it.
        """

        def watch() -> None:
            while os.getppid() == launcher_pid:
                time.sleep(1)
            os.killpg(os.getpgid(0), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()

    def _watch_held_out_rows(self) -> None:
        """Remember whether the held-out rows are opened before scoring. An audit hook cannot be removed."""
        held_out = ("val.bin", "sealed.bin")
        watched = ("open", "os.link", "os.symlink", "os.rename", "shutil.copyfile")

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if self._scoring or event not in watched:
                return
            for argument in arguments[:2]:
                name = os.fsdecode(argument) if isinstance(argument, str | bytes | os.PathLike) else ""
                if name.endswith(held_out) and not self._peeked:
                    self._peeked = Path(name).name

        sys.addaudithook(hook)
