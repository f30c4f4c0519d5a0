"""
What a trainer runs inside: the clock, the batches, the loss curve, the score. One per process.

The base class knows no framework; backends.cuda and backends.mlx add the device. Under the launcher a run's
settings come in AUTORESEARCH_* variables and its events go back through a pipe, which the launcher stamps
with its own clock; alone (`python train_cuda.py`) the same lines go to the terminal.
"""

import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np

from backends import checks
from backends.platforms import current_platform, current_track, mac_state, machine_facts, peak_tflops
from prepare import TIME_BUDGET, UserError, bits_per_byte, prepare, row_totals

LOG_EVERY = 0.2         # seconds between points of the loss curve
LINE_EVERY = 10         # seconds between progress lines when a trainer runs alone and not on a terminal
LOSS_LAG = 2            # steps that the device may lie behind the host: reading a loss waits for no newer one


class Invalid(SystemExit):
    """The run breaks a rule. The message says which."""


class Experiment:
    """One run of one trainer.

    platform: backends.platforms.Platform. track: prepare.Prepared. seed: int. budget: seconds of training.
    device: its name. bf16: the device computes in bfloat16. Raises SystemExit with one line when the
    machine, the platform or the prepared data do not fit.
    """

    def __init__(self):
        self._began = time.monotonic()
        self.run_dir = os.environ.get("AUTORESEARCH_RUN_DIR")
        fd = os.environ.pop("AUTORESEARCH_EVENTS_FD", None)
        self._events = os.fdopen(int(fd), "w", buffering=1) if fd else None
        self._start = self._stop = None
        self._steps = self._tokens = 0
        self._pending, self._last_line, self._last_point = deque(), 0.0, -1.0
        self._loss, self._peeked, self._scoring, self._warm_batch_size = math.nan, None, False, 4
        sys.excepthook = self._crashed
        try:
            self.platform = current_platform()
            track, self.val_tokens = current_track(self.platform)
            self.track = prepare(track)
        except UserError as e:
            sys.exit(f"{Path(sys.argv[0]).name}: {e}")
        self.seed = int(os.environ.get("AUTORESEARCH_SEED", "1"))
        self.budget = float(os.environ.get("AUTORESEARCH_BUDGET", TIME_BUDGET))
        self.device = machine_facts().device
        self.bf16 = machine_facts().bf16
        self._train = self.track.rows("train")
        self._order, self._epoch, self._cursor = None, 0, 0
        self._watch_validation_rows()
        self._end_with_the_launcher()
        random.seed(self.seed)
        np.random.seed(self.seed)
        self._open_device()

    # --- the device: what backends.cuda and backends.mlx define ---------------------------------------------

    def _open_device(self): raise NotImplementedError                 # set the seed, find the device, limit its memory
    def _to_device(self, rows): raise NotImplementedError             # int64 [B, T + 1] -> (x, y), the copy under way
    def _arrived(self, batch): raise NotImplementedError              # make (x, y) usable by the next operation
    def _read_later(self, loss): raise NotImplementedError            # start the copy of a scalar; returns a function that gives it
    def _nats(self, model, x, y): raise NotImplementedError           # int64 numpy [B, T] each -> float32 numpy [B, T]
    def _num_params(self, model): raise NotImplementedError
    def _save(self, model, path): raise NotImplementedError           # weights as safetensors
    def _load(self, model, path): raise NotImplementedError
    def _synchronize(self): raise NotImplementedError
    def _peak_memory_mb(self): raise NotImplementedError
    def _seed_changed(self): raise NotImplementedError                # the framework's generator was seeded by the trainer
    def _measured_tflops(self): raise NotImplementedError             # of a large matrix product
    def _out_of_memory(self, error): raise NotImplementedError

    # --- batches --------------------------------------------------------------------------------------------

    def batch(self, device_batch_size):
        """The next (x, y), each [B, T] on the device. The one after it is already being copied.

        Rows come in an order drawn from the seed, each once an epoch.
        """
        ahead = getattr(self, "_ahead", None)
        if ahead is None or ahead[0] != device_batch_size:
            if ahead:
                self._cursor -= ahead[0]
            ahead = device_batch_size, self._to_device(self._next_rows(device_batch_size))
        self._ahead = device_batch_size, self._to_device(self._next_rows(device_batch_size))
        self._tokens += device_batch_size * self.track.seq_len
        return self._arrived(ahead[1])

    def dummy_batch(self, device_batch_size):
        """A batch of random tokens, for compilation and warm-up: nothing can be learned from it."""
        self._warm_batch_size = device_batch_size
        shape = device_batch_size, self.track.seq_len + 1
        return self._arrived(self._to_device(np.random.default_rng(0).integers(0, self.track.vocab_size, shape)))

    def _next_rows(self, count):
        picked = []
        while len(picked) < count:
            if self._order is None or self._cursor >= len(self._order):
                self._order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._train))
                self._epoch, self._cursor = self._epoch + 1, 0
            take = self._order[self._cursor : self._cursor + count - len(picked)]
            picked.extend(take)
            self._cursor += len(take)
        return self._train[np.asarray(picked)].astype(np.int64)

    # --- the clock ------------------------------------------------------------------------------------------

    def start(self, model, depth, flops_per_token):
        """Start the clock. The model must be untrained; compilation and warm-up lie before this.

        flops_per_token: floating-point operations of a training step per token, for MFU.
        """
        self._num_params_M = self._num_params(model) / 1e6
        self._depth, self._flops_per_token = depth, flops_per_token
        rows = np.resize(self._train[: self._warm_batch_size].astype(np.int64), (self._warm_batch_size, self.track.seq_len + 1))
        self._refuse(checks.untrained(float(np.mean(self._nats(model, rows[:, :-1], rows[:, 1:]))), self.track.vocab_size))
        if self._seed_changed():
            self._refuse("the trainer set its own random seed: the launcher chooses it, so that runs differ by more than luck")
        self._peak_flops = 1e12 * (peak_tflops(self.platform, machine_facts()) or self._measured_tflops())
        if getattr(self, "_ahead", None):
            self._refuse("exp.batch was called before exp.start: warm up on exp.dummy_batch()")
        self._synchronize()
        self._emit("start", device=self.device, platform=self.platform.name, track=self.track.name, seed=self.seed,
                   budget=self.budget, num_params_M=round(self._num_params_M, 3), startup=self._since_began(), **mac_state())
        time.sleep(0.01)  # the launcher's clock starts when it reads that: before ours, or it would count less than the budget
        self._start = time.monotonic()

    @property
    def elapsed(self):
        """Seconds of training so far."""
        if self._start is None:
            sys.exit("exp.progress was read before exp.start(model)")
        return (self._stop or time.monotonic()) - self._start

    @property
    def progress(self):
        """Share of the time budget used, from 0. Training ends when it reaches 1."""
        return self.elapsed / self.budget

    def log(self, step, loss):
        """Record a step. loss: a scalar on the device; it is read a step or two later, so nothing waits for it.

        A loss that is not finite ends the run.
        """
        self._pending.append((step, self.elapsed, self._tokens, self._read_later(loss)))
        self._steps += 1
        if len(self._pending) > LOSS_LAG:
            self._read_loss()

    def _read_loss(self):
        step, at, tokens, read = self._pending.popleft()
        loss = read()
        if not math.isfinite(loss):
            self._emit("error", kind="nonfinite", message=f"the loss is {loss} at step {step}")
            sys.exit(f"the loss is {loss} at step {step}: lower the learning rates or look for a division by zero")
        self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        if at - self._last_point >= LOG_EVERY or not self._pending:
            self._last_point = at
            rate = tokens / at if at > 0 else 0.0
            self._emit("log", step=step, loss=round(loss, 5), smooth=round(self._loss, 5), tokens=tokens, elapsed=round(at, 3),
                       tokens_per_s=round(rate), mfu=round(100 * rate * self._flops_per_token / self._peak_flops, 2))

    # --- the end --------------------------------------------------------------------------------------------

    def finish(self, model, eval_batch_size):
        """Stop the clock, check the model, score it on the validation rows, save it, write and print the result."""
        self._synchronize()
        self._stop = time.monotonic()
        self._emit("stop", training_seconds=round(self.elapsed, 3), num_steps=self._steps, tokens=self._tokens)
        while self._pending:
            self._read_loss()
        peak_memory = self._peak_memory_mb()
        if self._peeked:
            self._refuse(f"the trainer opened {self._peeked} before its training ended: validation rows are for scoring only")
        self._refuse(checks.harness_intact(self))
        bpb, stderr, scored = self.score(model, eval_batch_size)
        if self.run_dir:
            self._save(model, Path(self.run_dir) / "model.safetensors")
        rate = self._tokens / self.elapsed
        result = {
            "val_bpb": round(bpb, 6), "val_stderr": round(stderr, 6), "val_tokens": scored,
            "training_seconds": round(self.elapsed, 2), "total_seconds": self._since_began(),
            "peak_memory_mb": round(peak_memory, 1), "tokens_per_second": round(rate),
            "mfu_percent": round(100 * rate * self._flops_per_token / self._peak_flops, 2),
            "total_tokens_M": round(self._tokens / 1e6, 3), "epochs": round(self._tokens / self._train[:, 1:].size, 2),
            "num_steps": self._steps, "num_params_M": round(self._num_params_M, 3), "depth": self._depth,
            "flops_per_token": self._flops_per_token, "peak_tflops": round(self._peak_flops / 1e12, 2),
            "platform": self.platform.name, "device": self.device, "track": self.track.name, "seed": self.seed,
        }
        if self.run_dir:
            path = Path(self.run_dir) / "result.json"
            path.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
            os.replace(path.with_suffix(".tmp"), path)
        self._emit("result", **result)
        for key, value in result.items():
            print(f"{key}: {value}", flush=True)

    def score(self, model, eval_batch_size, split="val"):
        """(bits per byte, standard error, tokens scored) of the model, after the checks that make it a fair number.

        Rows are scored in file order, so that a platform that scores fewer scores a prefix.
        """
        self._scoring = True
        count = -(-self.val_tokens // self.track.seq_len)
        rows = self.track.rows(split)[:count]
        shape = eval_batch_size, self.track.seq_len + 1  # one shape throughout: nothing is compiled for the last batch
        nats_of = lambda x, y: self._nats(model, x, y)
        tolerance = checks.BF16_TOLERANCE if self.bf16 else checks.FP32_TOLERANCE
        rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))  # unknown to the trainer
        picked = np.resize(rng.permutation(len(rows))[:eval_batch_size], eval_batch_size)
        self._refuse(checks.causal(nats_of, rows[picked].astype(np.int64), self.track.vocab_size, tolerance, rng))

        token_bytes, row_nats, row_bytes, opening = self.track.token_bytes(), [], [], None
        began = shown = time.monotonic()
        for i in range(0, len(rows), eval_batch_size):
            batch = np.resize(rows[i : i + eval_batch_size].astype(np.int64), shape)
            count = min(eval_batch_size, len(rows) - i)
            nats = nats_of(batch[:, :-1], batch[:, 1:])[:count]
            if opening is None:
                opening = batch, nats
            for totals, part in zip((row_nats, row_bytes), row_totals(nats, batch[:count, 1:], token_bytes)):
                totals.append(part)
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                self._emit("score", done=i + count, rows=len(rows), seconds=round(shown - began, 1))
        batch, nats = opening
        self._refuse(checks.same_score(nats, nats_of(batch[:, :-1], batch[:, 1:])[: len(nats)]))
        bpb, stderr = bits_per_byte(np.concatenate(row_nats), np.concatenate(row_bytes))
        if not math.isfinite(bpb):
            self._refuse("the score is not finite")
        return bpb, stderr, len(rows) * self.track.seq_len

    # --- events, and what goes wrong ------------------------------------------------------------------------

    def _since_began(self):
        return round(time.monotonic() - self._began, 2)

    def _emit(self, event, **values):
        if self._events:
            self._events.write(json.dumps({"event": event, **values}) + "\n")
        elif event == "log":
            terminal = sys.stderr.isatty()
            if terminal or time.monotonic() - self._last_line > LINE_EVERY:
                self._last_line = time.monotonic()
                line = (f"step {values['step']:5d} | loss {values['smooth']:.4f} | {values['tokens_per_s']:,} tok/s | mfu {values['mfu']:.1f}% "
                        f"| {max(0, self.budget - values['elapsed']):.0f} s left")
                print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        elif event == "stop" and sys.stderr.isatty():
            print(file=sys.stderr)

    def _refuse(self, reason):
        """End the run as invalid when there is a reason."""
        if reason:
            self._emit("invalid", message=reason)
            raise Invalid(f"invalid: {reason}")

    def _crashed(self, kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        if self._out_of_memory(error):
            message = "out of memory: lower DEVICE_BATCH_SIZE (TOTAL_BATCH_SIZE can stay) or the model's size"
            self._emit("error", kind="oom", message=message)
            print(message, file=sys.stderr)
        else:
            self._emit("error", kind="exception", message=f"{kind.__name__}: {error}"[:500])

    def _end_with_the_launcher(self):
        """End this process group when the launcher is gone: nobody would stop it, and it holds the device."""
        launcher = os.getppid()
        if not self._events:
            return

        def watch():
            while os.getppid() == launcher:
                time.sleep(1)
            os.killpg(os.getpgid(0), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()

    def _watch_validation_rows(self):
        """Remember whether anything opens the held-out rows before they are scored. An audit hook cannot be removed."""
        held_out = ("val.bin", "sealed.bin")

        def hook(event, arguments):
            if self._scoring or event not in ("open", "os.link", "os.symlink", "os.rename", "shutil.copyfile"):
                return
            for argument in arguments[:2]:
                name = os.fsdecode(argument) if isinstance(argument, (str, bytes, os.PathLike)) else ""
                if name.endswith(held_out) and not self._peeked:
                    self._peeked = Path(name).name

        sys.addaudithook(hook)
