"""`autoresearch verify`: score a saved run in a process that never trained."""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.console import say
from launcher.device import DeviceLock
from launcher.ledger import REFUTED, VERIFIED, Row
from launcher.run import EXIT_CODES
from launcher.runs import find_run, ledger, now_utc, run_dir
from launcher.setting import resolve
from prepare import ROOT, UserError

MATCH_TOLERANCE = 1e-3  # bits per byte: the same weights and rows, but perhaps another kernel


@dataclass(frozen=True)
class Scores:
    """What backends.verify writes."""

    val_bpb: float = 0.0
    val_stderr: float = 0.0
    val_tokens: int = 0
    sealed_bpb: float = 0.0
    sealed_stderr: float = 0.0
    sealed_tokens: int = 0
    fingerprint: str = ""


def verify_run(name: str) -> int:
    """Score a saved run in a fresh process and record the outcome. Returns the exit code."""
    row = find_run(name)
    run = run_dir(row.run)
    trainer = run.trainer()
    if trainer is None or not run.weights.exists():
        raise UserError(
            f"run {row.run} has no weights: those of the best run are kept, and those run with --keep-weights"
        )
    say(f"verifying {row.run} in a fresh process: val, then the sealed set")
    done, scores = score_again(row, trainer, run.weights)
    if scores is None:
        print("\n".join(done.stdout.splitlines()[-15:]))
        raise UserError(f"run {row.run} could not be scored again (exit code {done.returncode}): no verdict")
    if scores.fingerprint != row.fingerprint:
        raise UserError(
            f"the prepared data has fingerprint {scores.fingerprint}, run {row.run} had {row.fingerprint}: "
            "no verdict"
        )
    status, reason = compare(row, scores)
    record(row, status, reason, scores)
    return 0 if status == VERIFIED else EXIT_CODES["invalid"]


def score_again(
    row: Row, trainer: Path, weights: Path
) -> tuple[subprocess.CompletedProcess[str], Scores | None]:
    """Run backends.verify. Returns (its process, its scores or None)."""
    setting = replace(resolve(row.platform, row.track), val_tokens=row.val_tokens)
    kind = setting.platform.device_kind
    with DeviceLock(kind) as lock, tempfile.TemporaryDirectory() as scratch:
        lock.set_holder(f"{row.run} (verify)")
        out = Path(scratch) / "scores.json"
        done = subprocess.run(
            [sys.executable, "-m", "backends.verify", str(trainer), str(weights), str(out)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **setting.run_settings(row.seed).to_env(), "PYTHONPATH": str(ROOT)},
        )
        if done.returncode != 0 or not out.exists():
            return done, None
        return done, Scores(**json.loads(out.read_text()))


def compare(row: Row, scores: Scores) -> tuple[str, str]:
    """Return (status, reason) of a second scoring."""
    moved = abs(scores.val_bpb - row.val_bpb)
    if moved > MATCH_TOLERANCE:
        return (
            REFUTED,
            f"val_bpb is {scores.val_bpb:.6f} in a fresh process, the ledger says {row.val_bpb:.6f}",
        )
    gap = scores.sealed_bpb - scores.val_bpb
    error = math.hypot(scores.val_stderr, scores.sealed_stderr)
    judged = "no sign that val is overfitted"
    if gap >= 2 * error:
        judged = "val looks easier than text that no run was selected on: overfitted, or another mixture"
    return (
        VERIFIED,
        f"val_bpb matches to {moved:.1e}; sealed minus val is {gap:+.4f} +- {error:.4f}: {judged}",
    )


def record(row: Row, status: str, reason: str, scores: Scores) -> None:
    """Add the outcome to the ledger and print it."""
    ledger().append(
        replace(
            row,
            status=status,
            val_bpb=round(scores.val_bpb, 6),
            val_stderr=round(scores.val_stderr, 6),
            sealed_bpb=round(scores.sealed_bpb, 6),
            reason=reason,
            time=now_utc(),
        )
    )
    for key, value in vars(scores).items():
        print(f"{key}: {value:.6f}" if isinstance(value, float) else f"{key}: {value}")
    print(f"run: {row.run}\nstatus: {status}\nreason: {reason}")
