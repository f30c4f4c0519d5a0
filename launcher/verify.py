"""`verify`, `noise` and `clean`: is the number real, what is luck, and what lies on the disk."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from launcher import verdict
from launcher.ledger import REFUTED, VERIFIED, warn
from launcher.run import EXIT_CODES, DeviceLock, Options, choose_platform, exit_code, ledger, run_once, runs_dir, say, utc
from prepare import ROOT, TIME_BUDGET, UserError

MATCH_TOLERANCE = 1e-3  # bits per byte: the same weights and rows, but perhaps another kernel


def find_run(name):
    """The ledger row of a run, by its id or an unambiguous beginning of it.

    "last" is the newest run, "best" the lowest val_bpb on the board of the newest ranked run.
    """
    rows = [row for row in ledger().rows(warn) if row.status not in (VERIFIED, REFUTED) and row.run]
    if name == "last" and rows:
        return rows[-1]
    if name == "best":
        ranked = [row for row in rows if row.ranks]
        if ranked:
            return min((row for row in ranked if row.board == ranked[-1].board), key=lambda row: row.val_bpb)
    found = [row for row in rows if row.run.startswith(name)]
    exact = [row for row in found if row.run == name]
    if exact or len(found) == 1:
        return (exact or found)[0]
    if found:
        raise UserError(f"{len(found)} runs begin with '{name}': give more of the id", 2)
    raise UserError(f"the ledger has no run '{name}' (autoresearch leaderboard shows them; 'best' and 'last' work too)", 2)


def verify(name):
    """Score a saved run in a fresh process and record the outcome. Returns the exit code."""
    row = find_run(name)
    run_dir = runs_dir() / row.run
    if not (run_dir / "model.safetensors").exists():
        raise UserError(f"run {row.run} has no weights: those of the best run are kept, and those run with --keep-weights")
    platform, _ = choose_platform(row.platform)
    say(f"verifying {row.run} in a fresh process: val, then the sealed set")
    with DeviceLock(platform.backend), tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "score.json"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTORESEARCH_EVENTS")}
        done = subprocess.run([sys.executable, "-m", "backends.verify", str(run_dir), str(out)], cwd=ROOT, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**environment, "PYTHONPATH": str(ROOT)})
        score = json.loads(out.read_text()) if done.returncode == 0 and out.exists() else None
    if score is None:
        print("\n".join(done.stdout.splitlines()[-15:]))
        status, reason = REFUTED, f"it could not be scored again (exit code {done.returncode})"
        score = {"val_bpb": 0.0, "val_stderr": 0.0, "sealed_bpb": 0.0}
    else:
        status, reason = compare(row, score)
    ledger().append(replace(row, status=status, val_bpb=round(score["val_bpb"], 6), val_stderr=round(score["val_stderr"], 6),
                            sealed_bpb=round(score["sealed_bpb"], 6), reason=reason, time=utc()))
    for key, value in score.items():
        print(f"{key}: {value:.6f}" if isinstance(value, float) else f"{key}: {value}")
    print(f"run: {row.run}\nstatus: {status}\nreason: {reason}")
    return 0 if status == VERIFIED else EXIT_CODES["invalid"]


def compare(row, score):
    """(status, reason) of a second scoring."""
    if score["fingerprint"] != row.fingerprint:
        return REFUTED, f"the prepared data has fingerprint {score['fingerprint']}, the run had {row.fingerprint}"
    moved = score["val_bpb"] - row.val_bpb
    if abs(moved) > MATCH_TOLERANCE:
        return REFUTED, f"val_bpb is {score['val_bpb']:.6f} in a fresh process, the ledger says {row.val_bpb:.6f}"
    gap = score["sealed_bpb"] - score["val_bpb"]
    error = math.hypot(score["val_stderr"], score["sealed_stderr"])
    judged = "no sign that val is overfitted" if gap < 2 * error else "val looks easier than text that nobody selected on: overfitted, or another mixture"
    return VERIFIED, f"val_bpb matches to {abs(moved):.1e}; sealed minus val is {gap:+.4f} +- {error:.4f}: {judged}"


def noise(repeats, platform, track, budget):
    """Run the unchanged trainer with `repeats` seeds and say how large an improvement must be. Returns the exit code."""
    chosen, _ = choose_platform(platform)
    rows = []
    for i in range(repeats):
        say(f"noise: run {i + 1} of {repeats}")
        row = run_once(Options(f"noise: seed {i + 1}", platform, track, budget, seed=i + 1, marks=("noise",)), repetition=True)
        if not row.scored:
            return exit_code(row)
        rows.append(row)
    ranked = [row for row in rows if row.compares]
    if len(ranked) < 2:
        print("noise: fewer than two of the runs count (see their marks): nothing to compare")
        return 1
    values = [row.val_bpb for row in ranked]
    spread = verdict.spread([values])
    print(f"noise_sigma: {spread.sigma:.6f}\nnoise_mean: {mean(values):.6f}\nnoise_runs: {len(values)}\nnoise_margin: {spread.margin():.6f}\n"
          f"an improvement of one run counts from {spread.margin():.6f} (p < 0.01); repeated with a second seed, from {spread.margin(2, 2):.6f}"
          + ("" if budget == TIME_BUDGET else f"\na budget of {budget:g} s is not the rules': this spread counts for runs of the same budget alone"))
    return 0


def clean(apply):
    """Show what runs/ and the cache hold, and free weights that nobody asked to keep and data that no track uses."""
    from prepare import cache_dir, load_tracks, prepared_path

    best = {}
    for row in ledger().rows(warn):
        if row.ranks and row.status == "keep":
            best[row.board] = row.run
    freed, items = 0, []
    for weights in sorted(runs_dir().glob("*/model.safetensors")):
        kept = weights.parent.name in best.values() or (weights.parent / "keep-weights").exists()
        items.append((weights, "kept" if kept else "free", weights.stat().st_size))
    current = {prepared_path(track) for track in load_tracks().values()}
    for folder in sorted(cache_dir().glob("*-????????????")):
        if folder.is_dir():
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            items.append((folder, "kept" if folder in current else "free", size))
    for path, state, size in items:
        print(f"{state}  {size / 2**20:9.1f} MiB  {path}")
        if state == "free":
            freed += size
            if apply:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{'freed' if apply else 'would free (--yes does it)'}: {freed / 2**20:.1f} MiB")
