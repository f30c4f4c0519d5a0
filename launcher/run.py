"""One experiment: prepare, lock, run, judge, write the line."""

import importlib.metadata
import importlib.util
import json
import os
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from backends.platforms import current_track, describe, load_platforms, mac_state, machine_facts, match_platform
from launcher import verdict
from launcher.child import Stopped, alive, supervise
from launcher.ledger import CUT_OFF, INTERRUPTED, REPEAT, Ledger, Row
from launcher.repo import digest, git, harness_hash, harness_modified
from launcher.watch import Awake, Watch
from prepare import ROOT, RULES, TIME_BUDGET, UserError, cache_dir, config_path, prepare

EXIT_CODES = {"keep": 0, "discard": 3, "crash": 1, "timeout": 4, "invalid": 5}
EXIT_NO_VERDICT, EXIT_INTERRUPTED = 6, 130
DRY_BUDGET = 3.0        # seconds of training in a dry run
LINE_EVERY = 30         # seconds between progress lines when there is no terminal
LOG_TAIL = 25           # lines of train.log shown after a crash


@dataclass
class Options:
    """What `autoresearch run` was asked to do."""

    description: str = ""
    platform: str | None = None
    track: str | None = None
    budget: float = TIME_BUDGET
    seed: int = 1
    trainer: Path | None = None
    keep_weights: bool = False
    marks: tuple = ()
    commit: str | None = None   # the trial's, where `try` made one
    show: object = None         # takes the child's events; a line on the terminal if left out
    quiet: bool = False         # print no result: the caller does


def home():
    """Where results.tsv and runs/ lie: the repository, or $AUTORESEARCH_HOME."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or ROOT)


def ledger():
    return Ledger(home() / "results.tsv")


def runs_dir():
    return home() / "runs"


def choose_platform(name=None):
    """(Platform, why): the named one, or this machine's."""
    platforms = load_platforms()
    if name is None:
        return match_platform(machine_facts(), platforms)
    if name not in platforms:
        raise UserError(f"unknown platform '{name}': {config_path().name} has {', '.join(platforms)}", 2)
    return platforms[name], "named with --platform"


def require_packages(platform):
    """Raises UserError when what the platform's trainer imports is not installed."""
    package = "mlx" if platform.backend.startswith("mlx") else "torch"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"platform {platform.name} needs the package {package}, which is not installed: uv sync, or choose another --platform"
                        + (" (for an Intel Mac there is neither MLX nor a current PyTorch)" if sys.platform == "darwin" else ""))


# ---------------------------------------------------------------------------
# One device, one experiment
# ---------------------------------------------------------------------------

def acquire(lock, why):
    """Take a file lock. Waits while another process has it, and says for what: why() tells."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting: {why()}")
        lock.acquire()


class DeviceLock:
    """Only one experiment on a device at a time, whoever starts it. Waits, and says for what."""

    def __init__(self, backend):
        folder = cache_dir() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        device = "cpu" if backend.endswith("-cpu") else "gpu" + os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.lock, self.holder = FileLock(folder / f"{device}.lock"), folder / f"{device}.json"

    def __enter__(self):
        acquire(self.lock, lambda: f"another experiment holds the device ({self.holder_text()})")
        return self

    def name(self, run_id):
        self.holder.write_text(json.dumps({"run": run_id, "pid": os.getpid()}))

    def holder_text(self):
        try:
            data = json.loads(self.holder.read_text())
            return f"run {data['run']}, launcher process {data['pid']}"
        except (OSError, ValueError, KeyError):
            return "just starting"

    def __exit__(self, *_):
        self.lock.release()


# ---------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------

def say(message):
    print(message, file=sys.stderr, flush=True)


class Progress:
    """One live line on a terminal, a line every LINE_EVERY seconds elsewhere."""

    def __init__(self, budget):
        self.budget, self.began, self.last, self.text = budget, time.monotonic(), time.monotonic(), "starting: imports, compilation, warm-up"
        self.live = sys.stderr.isatty()

    def __call__(self, event):
        kind = event and event["event"]
        if kind == "start":
            self.text = f"training on {event['device']} ({event['platform']}), track {event['track']}, seed {event['seed']}"
            self.show(always=True)
        elif kind == "log":
            left = max(0.0, self.budget - event["elapsed"])
            self.text = (f"step {event['step']} | loss {event['smooth']:.4f} | {event['tokens_per_s']:,} tok/s | "
                         f"mfu {event['mfu']:.1f}% | {left:.0f} s left")
        elif kind == "stop":
            self.text = "checking and scoring"
        elif kind == "score":
            self.text = f"scoring {event['done']}/{event['rows']} rows"
        if event is None or kind in ("log", "score"):
            self.show()

    def show(self, always=False):
        now = time.monotonic()
        if self.live:
            print(f"\r{self.text} [{now - self.began:.0f} s]\x1b[K", end="", file=sys.stderr, flush=True)
        elif always or now - self.last >= LINE_EVERY:
            self.last = now
            say(f"{now - self.began:4.0f} s  {self.text}")

    def close(self):
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------

def run(options):
    """Run one experiment, and its repetition with a second seed when the first result lies within the noise.

    Prints the result and returns the exit code. Every path through here leaves a complete ledger line.
    """
    return exit_code(experiment(options))


def experiment(options):
    """`run` as the ledger row that decides."""
    recover()
    row = run_once(options)
    if row.reason.startswith(REPEAT):
        say(row.reason)
        again = replace(options, seed=options.seed + 1, trainer=trainer_of(row))  # as it was: somebody may edit it meanwhile
        row = run_once(again, repetition=True)
    return row


def exit_code(row):
    if row.reason == INTERRUPTED:
        return EXIT_INTERRUPTED
    return EXIT_NO_VERDICT if row.scored and not row.compares else EXIT_CODES[row.status]


def settings_of(platform, track, seed, budget):
    """What a trainer's process is told, in its environment."""
    return {"AUTORESEARCH_PLATFORM": platform.name, "AUTORESEARCH_TRACK": track.name, "AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_BUDGET": str(budget)}


def run_once(options, repetition=False):
    """One run of the trainer. repetition: it repeats a trainer with another seed. Returns its ledger row."""
    platform, why = choose_platform(options.platform)
    require_packages(platform)
    trainer = Path(options.trainer or ROOT / platform.trainer).resolve()
    try:
        source = trainer.read_bytes()  # before any waiting: what runs is what lay there when it was asked for
    except OSError as e:
        raise UserError(f"there is no trainer {trainer} ({e.strerror})", 2) from None
    track, val_tokens = current_track(platform, options.track or platform.track)
    settings, prepared = settings_of(platform, track, options.seed, options.budget), prepare(track)
    facts = machine_facts()
    marks = list(options.marks) + (["short"] if options.budget != TIME_BUDGET else [])
    if harness_modified():
        say("warning: the harness (prepare.py, backends/, launcher/, platforms.yaml) differs from the last commit; the row is marked")
        marks.append("harness-modified")
    if track.fingerprint and prepared.fingerprint != track.fingerprint:
        marks.append("other-corpus")
    laptop = mac_state()
    for key, mark in (("on_battery", "battery"), ("low_power_mode", "low-power")):
        if laptop.get(key):
            say(f"warning: {mark}: the result does not compare with others and will not rank")
            marks.append(mark)

    with DeviceLock(platform.backend) as lock, Awake():
        run_id = new_id()
        run_dir = runs_dir() / run_id
        run_dir.mkdir(parents=True)
        lock.name(run_id)
        copy = run_dir / trainer.name
        copy.write_bytes(source)
        row = Row(commit=options.commit or git("rev-parse", "--short=7", "HEAD") or "none", description=options.description or "no description",
                  run=run_id, time=utc(), platform=platform.name, device=facts.device,
                  track=track.name, seed=options.seed, rules=RULES, fingerprint=prepared.fingerprint, harness=harness_hash(),
                  budget=options.budget, val_tokens=val_tokens, source=digest(source))
        write_json(run_dir / "run.json", {"row": {k: getattr(row, k) for k in row.__slots__}, "pid": os.getpid(), "why": why, "facts": describe(facts),
                                          "laptop": laptop, "python": sys.version.split()[0], "packages": versions(), "trainer": trainer.name})
        watch, progress, interrupted = Watch(platform.backend), options.show or Progress(options.budget), None
        try:
            say(f"run {run_id}: {platform.name} ({why}), track {track.name}, {options.budget:g} s of training, seed {options.seed}")
            outcome = supervise(copy, run_dir, settings, platform, options.budget, watch, progress)
        except Stopped as stop:
            interrupted = stop
        finally:
            progress.close()
        if interrupted:
            row.status, row.reason, row.marks = "crash", INTERRUPTED, ",".join(marks)
            ledger().append(row)
            (run_dir / "model.safetensors").unlink(missing_ok=True)
            say(f"interrupted ({interrupted}): run {run_id} was ended and recorded")
            return row

        found, notes = watch.verdict()
        for mark, text in zip(found, notes):
            say(f"warning: {mark}: {text}; the row does not rank")
        row.marks = ",".join(dict.fromkeys(marks + found))
        fill(row, outcome, prepared, watch)
        judge(row, repetition, notes)
        ledger().append(row)
        settle_weights(row, run_dir, options.keep_weights)
    if not options.quiet:
        report(row, run_dir, outcome)
    return row


def fill(row, outcome, prepared, watch):
    """Numbers of the result into the row, and the checks that only the launcher can make."""
    result = outcome.result
    row.training_seconds, row.total_seconds, row.energy_kj = outcome.training_seconds, outcome.total_seconds, round(watch.energy_j / 1000, 3)
    if not outcome.status:
        if harness_hash() != row.harness:
            outcome.status, outcome.reason = "invalid", "the harness changed on disk during the run"
        elif prepared.current_fingerprint() != row.fingerprint:
            outcome.status, outcome.reason = "invalid", "tokenizer or rows changed on disk during the run: autoresearch prepare --force"
        elif result.get("val_tokens") != row.val_tokens:
            outcome.status, outcome.reason = "invalid", f"{result.get('val_tokens')} tokens were scored, not {row.val_tokens}"
        elif (result.get("track"), result.get("platform"), result.get("seed")) != (row.track, row.platform, row.seed):
            outcome.status, outcome.reason = "invalid", "the result names another track, platform or seed than the run was given"
    if outcome.status:
        row.status, row.reason = outcome.status, outcome.reason
        return
    row.val_bpb, row.val_stderr = result["val_bpb"], result["val_stderr"]
    row.memory_gb = round(result["peak_memory_mb"] / 1024, 2)
    row.tokens_M, row.num_steps, row.num_params_M = result["total_tokens_M"], result["num_steps"], result["num_params_M"]
    row.depth, row.mfu_percent = result["depth"], result["mfu_percent"]
    row.tokens_per_second = round(1e6 * row.tokens_M / row.training_seconds) if row.training_seconds else 0.0
    row.petaflops = round(1e6 * row.tokens_M * result["flops_per_token"] / 1e15, 3)


def judge(row, repetition, notes):
    """The verdict of a scored row: keep or discard, and why. A row that cannot rank gets none."""
    if row.status:
        return
    row.status = "discard"
    if not row.compares:
        row.reason = "no verdict: " + "; ".join(notes + [mark for mark in row.mark_list if mark in ("battery", "low-power")])
        return
    rows = ledger().rows()
    best = verdict.champion(rows, row.board)
    if best and best[0].source == row.source:
        row.status, row.reason = "keep", "the best trainer so far, once more" if repetition else "unchanged: this trainer is the best so far"
        return
    same = [r.val_bpb for r in rows if r.compares and r.board == row.board and r.source == row.source and r.seed != row.seed] if repetition else []
    decision, reason = verdict.decide([*same, row.val_bpb], [r.val_bpb for r in best], verdict.noise_of(rows, row.board))
    if decision == "repeat":
        decision, reason = "discard", f"{REPEAT} {reason}; once more with seed {row.seed + 1}"
    row.status, row.reason = decision, reason + (f"; a budget of {row.budget:g} s never ranks" if "short" in row.mark_list else "")


def settle_weights(row, run_dir, asked_for):
    """Keep the weights of the best run of a board and those asked for; drop the others."""
    weights = run_dir / "model.safetensors"
    if asked_for and weights.exists():
        (run_dir / "keep-weights").touch()
        return
    if row.status != "keep" or not row.ranks:
        weights.unlink(missing_ok=True)
        return
    for other in ledger().rows():
        if other.run != row.run and other.board == row.board and other.run:
            folder = runs_dir() / other.run
            if not (folder / "keep-weights").exists():
                (folder / "model.safetensors").unlink(missing_ok=True)


def report(row, run_dir, outcome):
    """The last lines of a run, greppable, on stdout; a crash shows the end of its log."""
    if row.status == "crash" and outcome.exit_code != 0:
        print(log_tail(run_dir))
    for key, value in outcome.result.items():
        if key != "event" and row.scored:
            print(f"{key}: {value}")
    print(f"run: {row.run}\nstatus: {row.status}\nreason: {row.reason}" + (f"\nmarks: {row.marks}" if row.marks else ""), flush=True)


def log_tail(run_dir):
    """The last lines of what the trainer printed."""
    try:
        return "\n".join((run_dir / "train.log").read_text(errors="replace").splitlines()[-LOG_TAIL:])
    except OSError:
        return ""


def trainer_of(row):
    """The source that made a run, or None."""
    try:
        path = runs_dir() / row.run / json.loads((runs_dir() / row.run / "run.json").read_text())["trainer"]
        return path if path.is_file() else None
    except (OSError, ValueError, KeyError):
        return None


def recover():
    """Runs whose launcher was killed get their line: nothing that was started is missing from the ledger."""
    if not runs_dir().is_dir():
        return
    import psutil

    known = None
    for path in sorted(runs_dir().glob("*/run.json")):
        if (path.parent / "recorded").exists():
            continue
        known = {row.run for row in ledger().rows()} if known is None else known
        if path.parent.name not in known:
            try:
                data = json.loads(path.read_text())
                owner = psutil.Process(data["pid"]) if psutil.pid_exists(data["pid"]) else None
                if owner and alive(owner) and owner.create_time() < path.stat().st_mtime:
                    continue  # still running
                row = Row(**{k: v for k, v in data["row"].items()})
            except (ValueError, KeyError, TypeError, psutil.Error):
                continue
            row.status, row.reason = "crash", CUT_OFF
            ledger().append(row)
            (path.parent / "model.safetensors").unlink(missing_ok=True)
            say(f"run {row.run} was cut off when its launcher was killed; it is recorded as a crash")
        (path.parent / "recorded").touch()


def dry_run(trainer, platform, track=None, seed=1):
    """A few seconds of training and a sliver of scoring, on the device: does the edit run at all? Returns (Outcome, end of its log).

    Nothing is recorded, and nothing of it stays.
    """
    platform, _ = choose_platform(platform)
    track, _ = current_track(platform, track or platform.track)
    prepare(track)
    settings = {**settings_of(platform, track, seed, DRY_BUDGET), "AUTORESEARCH_VAL_TOKENS": "1"}  # a row, scored as a batch of the usual shape
    with DeviceLock(platform.backend) as lock, tempfile.TemporaryDirectory(prefix="dry-") as scratch:
        lock.name("dry run")
        copy = Path(scratch) / Path(trainer).name
        copy.write_bytes(Path(trainer).read_bytes())
        outcome = supervise(copy, Path(scratch), settings, platform, DRY_BUDGET, Watch(platform.backend), lambda event: None)
        return outcome, log_tail(Path(scratch))


def versions():
    """Versions of what computes."""
    found = {}
    for package in ("torch", "triton", "mlx", "numpy", "tiktoken", "flash-attn-4", "quack-kernels", "kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def utc():
    """Now, as the ledger writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stamp():
    """Now (UTC), as ids of runs begin: they sort by time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def new_id():
    return f"{stamp()}-{secrets.token_hex(2)}"


def write_json(path, data):
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(data, indent=1))
    os.replace(scratch, path)
