"""
What a trainer runs inside: the clock, the batches, the loss curve. One per process.

The base class knows no framework; backends.cuda and backends.mlx name the device. What the launcher tells a
run and what the run answers is backends.protocol. The training rows come from the launcher when the clock
starts: before, there is nothing to learn from. The score is taken by other processes (backends.scorer), after
this one has ended. Alone (`python train_cuda.py`) a trainer reads the rows itself, shows its progress on the
terminal, and is not scored.
"""

import math
import operator
import os
import random
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from backends.device import Device
from backends.platforms import current_entries, facts_for, mac_state, peak_tflops
from backends.protocol import (
    Event,
    Failure,
    Invalid,
    Log,
    RunSettings,
    Start,
    Stop,
    format_event,
)
from prepare import Prepared, UserError, prepare_track

LOG_EVERY = 0.2  # seconds between points of the loss curve
LINE_EVERY = 10.0  # seconds between progress lines when a trainer runs alone and not on a terminal
PROFILE_FROM, PROFILE_STEPS = 2, 3  # steps that are profiled, where it is asked for
LOSS_LAG = 2  # steps that the device may lie behind the host: reading a loss waits for no newer one


class Refused(SystemExit):
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


class Experiment:
    """One run of one trainer.

    Attributes:
        platform: the entry of platforms.yaml that is in force.
        track: the prepared data, prepare.Prepared.
        seed: of the data's order and of the framework.
        budget: seconds of training.
        device_name: as the vendor writes it.

    Raises:
        SystemExit: machine, platform or prepared data do not fit. The message is one line.
    """

    device_class: type[Device]  # of the backend

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._launcher: socket.socket | None = None
        sys.excepthook = self._report_crash
        try:
            settings = RunSettings.from_env()
            self.platform, track = current_entries()
            told = Path(settings.data_dir) if settings.data_dir else None
            self.track = Prepared(track, told) if told else prepare_track(track)
        except UserError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        if settings.launcher_fd >= 0:
            self._launcher = socket.socket(fileno=settings.launcher_fd)
            os.environ.pop("AUTORESEARCH_LAUNCHER_FD")  # no program that we start uses it
        self._weights = Path(settings.weights) if settings.weights else None
        self.seed = settings.seed
        self.budget = settings.budget
        self.device_name = facts_for(self.platform).device

        self._train_rows: np.ndarray | None = None  # uint16 [rows, T + 1], from the start of the clock on
        self._order = RowOrder(self.track.num_train_rows, self.seed)
        self._rows_drawn = 0
        self._next_batch: tuple[int, Any] | None = None  # (rows, the copy under way)
        self._start: float | None = None
        self._stop: float | None = None
        self._shapes: dict[str, list[int]] = {}
        self._steps = 0
        self._tokens = 0
        self._unread: deque[tuple[int, float, int, Callable[[], float]]] = deque()
        self._smooth_loss = math.nan
        self._profiled = bool(settings.profiled)
        self._step_shares: dict[str, float] = {}
        self._last_point = -math.inf
        self._last_line = -math.inf

        random.seed(self.seed)
        np.random.seed(self.seed)
        self._device = self.device_class(self.platform, self.track.vocab_size, self.seed)

    # --- Batches --------------------------------------------------------------------------------------------

    def batch(self, device_batch_size: int) -> tuple[Any, Any]:
        """Return the next (x, y), each [B, T] on the device, with B = device_batch_size rows.

        The batch after it is already being copied. The size may change from call to call: no row is left out
        and none comes twice in an epoch.
        """
        if self._train_rows is None:
            self._refuse("exp.batch was called before exp.start: warm up on exp.dummy_batch()")
        if self._next_batch is None or self._next_batch[0] != device_batch_size:
            self._next_batch = device_batch_size, self._copy_rows(self._rows_drawn, device_batch_size)
        copy = self._next_batch[1]
        self._rows_drawn += device_batch_size
        self._tokens += device_batch_size * self.track.seq_len
        self._next_batch = device_batch_size, self._copy_rows(self._rows_drawn, device_batch_size)
        return self._device.arrived(copy)

    def dummy_batch(self, device_batch_size: int) -> tuple[Any, Any]:
        """Return a batch of random tokens, for compilation and warm-up: nothing can be learned from it."""
        shape = device_batch_size, self.track.seq_len + 1
        tokens = np.random.default_rng(0).integers(0, self.track.vocab_size, shape)
        return self._device.arrived(self._device.copy(tokens))

    def _copy_rows(self, start: int, count: int) -> Any:
        assert self._train_rows is not None
        return self._device.copy(self._train_rows[self._order.indices(start, count)].astype(np.int64))

    def check_memory(self, rows: int) -> None:
        """Call after a pass over one row. End the run if `rows` rows would not fit in memory."""
        message = self._device.too_large(rows)
        if message:
            self._emit(Failure("oom", message))
            raise SystemExit(message)

    # --- The clock ------------------------------------------------------------------------------------------

    def start(self, model: Any, depth: int, flops_per_token: int) -> None:
        """Start the clock, and get the training rows. Compilation and warm-up lie before this.

        Args:
            model: what exp.finish will be given, trained. build_model must give one with the same tensors.
            depth: layers of the model, for the ledger.
            flops_per_token: floating-point operations of a training step per token, for MFU.

        Raises:
            SystemExit: a number makes no sense, or a seed was set before the start.
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
        if self._device.seed_changed():
            self._refuse(
                "the trainer set its own random seed: the launcher chooses it, "
                "so that runs differ by more than luck"
            )
        stated = peak_tflops(self.platform, facts_for(self.platform))
        self._peak_flops = 1e12 * (stated or self._device.measured_tflops())
        self._shapes = self._device.shapes(model)
        self._device.synchronize()
        self._emit(
            Start(
                device=self.device_name,
                platform=self.platform.name,
                track=self.track.name,
                seed=self.seed,
                budget=self.budget,
                num_params_M=round(self._device.num_params(model) / 1e6, 3),
                depth=self._depth,
                flops_per_token=self._flops_per_token,
                peak_tflops=round(self._peak_flops / 1e12, 2),
                dtype="bfloat16" if self._device.bf16 else "float32",
                startup=round(time.monotonic() - self._began, 2),
                weights=self._shapes,
                laptop=mac_state(),
            )
        )
        self._train_rows = self._receive_rows()
        self._start = time.monotonic()

    def _receive_rows(self) -> np.ndarray:
        """Return the training rows, uint16 [rows, T + 1], from the launcher where there is one."""
        if self._launcher is None:
            return self.track.rows("train")
        _, descriptors, _, _ = socket.recv_fds(self._launcher, 1, 1)
        if not descriptors:
            sys.exit("the launcher is gone")
        with os.fdopen(descriptors[0], "rb") as file:
            return np.memmap(file, np.uint16, "r").reshape(-1, self.track.seq_len + 1)

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
        if self._profiled:
            self._profile()
        self._unread.append((step, self.elapsed, self._tokens, self._device.read_later(loss)))
        self._steps += 1
        if len(self._unread) > LOSS_LAG:
            self._read_loss()

    def _profile(self) -> None:
        """Profile a few steps. Without a profiler nothing is said."""
        if self._steps == PROFILE_FROM:
            self._profiled = self._device.begin_profile()
        elif self._steps == PROFILE_FROM + PROFILE_STEPS:
            self._step_shares = self._device.end_profile()
            self._profiled = False

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

    def finish(self, model: Any) -> None:
        """Write the weights and stop the clock. Under a launcher the process ends here: others score.

        The weights are written before the clock stops, so that nothing is learned after it.

        Raises:
            SystemExit: the model is another than exp.start was given.
        """
        if self._start is None:
            sys.exit("exp.finish was called before exp.start(model)")
        self._device.synchronize()
        if self._device.shapes(model) != self._shapes:
            self._refuse(
                "exp.finish was given another model than exp.start: the tensors differ. Give both the model "
                "that build_model returns, with its average, wrapper or ensemble"
            )
        if self._weights:
            self._device.save(model, self._weights)
        self._stop = time.monotonic()
        while self._unread:
            self._read_loss()
        peak_memory_mb = round(self._device.peak_memory_mb(), 1)
        self._emit(Stop(self._steps, self._tokens, peak_memory_mb, self._step_shares))
        if self._launcher is None:
            self._print_summary()
            return
        sys.stdout.flush()
        self._launcher.recv(1)  # the launcher ends this process

    def _print_summary(self) -> None:
        """Print what a trainer that runs alone has to say."""
        rate = self._tokens / self.elapsed
        for name, value in {
            "training_seconds": round(self.elapsed, 2),
            "num_steps": self._steps,
            "total_tokens_M": round(self._tokens / 1e6, 3),
            "tokens_per_second": round(rate),
            "mfu_percent": self._mfu(rate),
            "train_loss": round(self._smooth_loss, 4),
            "peak_memory_mb": round(self._device.peak_memory_mb(), 1),
        }.items():
            print(f"{name}: {value}")
        print("not scored: autoresearch run trains and scores", flush=True)

    # --- Events, and what goes wrong ------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        if self._launcher:
            self._launcher.sendall(format_event(event).encode())
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

    def _refuse(self, reason: str) -> NoReturn:
        """End the run as invalid."""
        self._emit(Invalid(reason))
        raise Refused(f"invalid: {reason}")

    def _report_crash(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        if self._device_is_full(error):
            message = "out of memory: lower DEVICE_BATCH_SIZE (TOTAL_BATCH_SIZE can stay) or the model's size"
            self._emit(Failure("oom", message))
            print(message, file=sys.stderr)
        else:
            message = f"{kind.__name__}: {error}".encode("utf-8", "replace").decode()  # no half surrogates
            self._emit(Failure("exception", message[:500]))

    def _device_is_full(self, error: BaseException) -> bool:
        return hasattr(self, "_device") and self._device.out_of_memory(error)
