"""
`autoresearch loop`: the night. A headless coding agent edits the trainer, the loop does everything else.

A turn: the agent gets the program, the ledger and the last result, edits the trainer and ends with a line
`experiment: what I did`. The edit is checked (only the trainer, it compiles, a dry run of seconds), tried, and
kept or taken back. Whatever goes wrong with an agent is recorded and retried after a pause that grows; what
it writes outside the trainer is taken back and stays reachable under a ref. A loop that was cut off is started
again with the same command and goes on.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from backends.platforms import mac_state
from launcher import repo
from launcher.child import MARKER, Stopped, end_group, end_survivors, ignore_signals, last_line, stop_on_signals
from launcher.ledger import INTERRUPTED, Row
from launcher.program import program
from launcher.run import Options, Progress, choose_platform, dry_run, ledger, log_tail, new_id, runs_dir, say, utc, write_json
from launcher.trial import IN_LOOP, check_edit, scored_before, settle, the_repository, trial
from launcher.watch import Awake
from prepare import ROOT, UserError

GIVE_UP = 20            # failures in a row after which the loop ends
PAUSE_MOST = 1800.0     # seconds; the pause after a failure doubles up to this
FREE_EDITS = 3          # bad edits in a row that are returned to the agent without a pause
NO_VERDICT_TRIES = 3    # runs of an edit that end without a verdict (another process on the device) before it is put aside
LISTED = 60             # experiments that the prompt lists
TURN = """
## This turn

`autoresearch loop` called you, and it runs the loop: have one idea, edit {trainer}, and end. Start no experiment, commit
nothing, touch no other file: what you change elsewhere is taken back. An edit that does not compile, that was already
scored, or that fails a dry run of a few seconds comes back to you. End your answer with one line that says what you changed:

experiment: <the idea in a line>

## Last result

{result}
"""


class Failed(Exception):
    """A turn that leads to no experiment. kind: agent (it failed, hung or changed nothing), edit, or repository."""

    def __init__(self, kind, reason):
        super().__init__(reason)
        self.kind = kind


@dataclass
class Night:
    """What `autoresearch loop` was asked to do."""

    agent: list                     # the command; {prompt} in an argument stands for the prompt
    options: Options                # platform, track, budget and seed of every experiment
    experiments: int | None = None  # None: no limit
    until: datetime | None = None
    agent_seconds: float = 900.0
    pause: float = 30.0             # seconds after a first failure

    def left(self):
        """Seconds until the night ends; infinite without an `until`."""
        return max(0.0, (self.until - datetime.now()).total_seconds()) if self.until else math.inf


def parse_agent(text):
    """The agent's command as a list. Raises UserError (2) when there is no such program."""
    try:
        command = shlex.split(text)
    except ValueError as e:
        raise UserError(f"--agent: {e}: {text}", 2) from None
    if not command or not shutil.which(command[0]):
        raise UserError(f"--agent: there is no program {command[0] if command else 'named'!r} here", 2)
    return command


def parse_until(text):
    """The next time at which the clock on the wall shows HH:MM. Raises UserError (2)."""
    try:
        at = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise UserError(f"--until: {text!r} is not a time of day such as 07:30", 2) from None
    today = datetime.now()
    then = today.replace(hour=at.hour, minute=at.minute, second=0, microsecond=0)
    return then if then > today else then + timedelta(days=1)


# ---------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------

class Status:
    """A live panel on a terminal, a line a phase elsewhere; and the counts of the night."""

    def __init__(self, night):
        self.night, self.console = night, Console(stderr=True)
        self.done = self.kept = self.discarded = self.failed = self.turns_lost = 0
        self.best, self.phase, self.detail, self.longest = None, "starting", "", 1.3 * night.options.budget
        self.live = Live(get_renderable=self.panel, console=self.console, refresh_per_second=2, transient=True) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def enter(self, phase):
        self.phase, self.detail = phase, ""
        if not self.live:
            self.note(phase)

    def note(self, text):
        say(f"{time.strftime('%H:%M:%S')} {text}")

    def panel(self):
        table = Table.grid(padding=(0, 2))
        limit = f" of {self.night.experiments}" if self.night.experiments else ""
        for name, value in (("experiment", f"{self.done + 1}{limit}: {self.phase}"), ("", self.detail),
                            ("best", f"{self.best.val_bpb:.6f}  {self.best.description}" if self.best else "none yet"),
                            ("so far", f"{self.kept} kept, {self.discarded} discarded, {self.failed} failed, {self.turns_lost} turns without an experiment"),
                            ("left", self.left())):
            table.add_row(name, Text(value))  # an agent's brackets are no markup
        return table

    def left(self):
        parts = [f"{timedelta(seconds=int(self.night.left()))} until {self.night.until:%H:%M}"] if self.night.until else []
        parts += [f"{self.night.experiments - self.done} experiments"] if self.night.experiments else []
        return ", ".join(parts) or "until Ctrl-C"

    def count(self, row):
        self.done += 1
        self.kept += row.status == "keep"
        self.discarded += row.status == "discard"
        self.failed += not row.scored
        self.longest = max(self.longest, row.total_seconds)
        if row.status == "keep" and (self.best is None or row.val_bpb < self.best.val_bpb):
            self.best = row


class Detail(Progress):
    """The progress of a run as a line of the panel; silent where there is none."""

    def __init__(self, budget, status):
        super().__init__(budget)
        self.status = status

    def show(self, always=False):
        self.status.detail = self.text

    def close(self):
        self.status.detail = ""


# ---------------------------------------------------------------------------
# The agent's turn
# ---------------------------------------------------------------------------

def loop_folder():
    return runs_dir() / "loop"


def record(event, **values):
    """A line in runs/loop/loop.jsonl."""
    loop_folder().mkdir(parents=True, exist_ok=True)
    with open(loop_folder() / "loop.jsonl", "a") as f:
        f.write(json.dumps({"time": utc(), "event": event, **values}) + "\n")


def state_path():
    return repo.git_path("autoresearch-loop.json")


def load_state():
    """Of a loop that did not end by itself: {"experiments", "done", "turn", "edit"}; {} without. An interrupted one leaves "edit" alone."""
    try:
        return json.loads(state_path().read_text())
    except (OSError, ValueError):
        return {}


def save_state(night, status, turn=None, edit=None):
    """turn: what an agent began from, while it works. edit: {"blob", "description"} of what it wrote, until there is a verdict."""
    write_json(state_path(), {"experiments": night.experiments, "done": status.done, "turn": turn, "edit": edit})


def agent_turn(night, status, trainer, result):
    """Call the agent. Returns its line about what it did. Raises Failed; then the working tree is as before."""
    stamp = new_id()
    folder = loop_folder()
    folder.mkdir(parents=True, exist_ok=True)
    prompt = program(night.options.platform, night.options.track, LISTED) + TURN.format(trainer=trainer, result=result)
    (folder / f"{stamp}.prompt.md").write_text(prompt)
    turn = {"tree": repo.snapshot(), "head": repo.head(), "branch": repo.branch(), "stamp": stamp}
    save_state(night, status, turn)
    status.enter("the agent thinks")
    seconds = min(night.agent_seconds, max(1.0, night.left()))
    code = call_agent(night.agent, prompt, folder / stamp, seconds, stamp)
    if code != 0:
        undo_turn(turn, None)
        raise Failed("agent", f"the agent did not end within {seconds:.0f} s" if code is None else
                     f"the agent ended with exit code {code}: {last_line(folder / f'{stamp}.log')}")
    undo_turn(turn, trainer)
    if not (ROOT / trainer).is_file():
        repo.put_back(trainer)
        raise Failed("agent", f"the agent deleted {trainer}")
    if not repo.edited(trainer):
        raise Failed("agent", f"the agent changed nothing in {trainer}")
    description = what_it_did((folder / f"{stamp}.log").read_text(errors="replace"))
    save_state(night, status, edit={"blob": repo.blob(trainer), "description": description})
    return description


def what_it_did(said):
    """The last `experiment:` line of an answer, else its last line."""
    lines = [line.strip(" `*#>") for line in said.splitlines() if line.strip(" `*#>")]
    named = [line[len("experiment:"):].strip(" `*") for line in lines if line.lower().startswith("experiment:")]
    return ((named or lines or ["the agent did not say"])[-1] or "the agent did not say")[:200]


def call_agent(command, prompt, base, seconds, stamp):
    """Run the agent, prompt on standard input or in place of {prompt}; all it prints goes to <base>.log.

    Returns its exit code, None when it had to be ended. Nothing that it started outlives the call.
    """
    takes_argument = any("{prompt}" in part for part in command)
    arguments = [part.replace("{prompt}", prompt) for part in command]
    with open(f"{base}.log", "wb") as log, open(os.devnull if takes_argument else f"{base}.prompt.md", "rb") as given:
        try:
            child = subprocess.Popen(arguments, cwd=ROOT, stdin=given, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                     env={**os.environ, IN_LOOP: "1", MARKER: stamp})
        except OSError as e:
            raise Failed("agent", f"{command[0]} cannot be started: {e.strerror}") from None
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with ignore_signals():
                end_group(child)
                end_survivors(stamp)


def undo_turn(turn, trainer):
    """Take back what an agent did outside the trainer (None: all that it did). Nothing is lost: it stays under a ref."""
    if (repo.head(), repo.branch()) != (turn["head"], turn["branch"]):
        repo.remember(f"stray/{turn['stamp']}-head", repo.head())  # its own commits
        if turn["branch"]:
            repo.change("symbolic-ref", "HEAD", turn["branch"])
            repo.change("update-ref", "HEAD", turn["head"])
        else:
            repo.change("update-ref", "--no-deref", "HEAD", turn["head"])
        repo.change("reset", "-q")
        say(f"the agent moved the branch; it is back, and what it committed is {repo.REFS}/stray/{turn['stamp']}-head")
    after = repo.snapshot()
    stray = [path for path in repo.differing(turn["tree"], after) if path != trainer]
    if stray:
        repo.remember(f"stray/{turn['stamp']}", repo.commit_tree(after, turn["head"], "what an agent left"))
        repo.bring_back(stray, turn["tree"])
        say(f"taken back: the agent's {', '.join(stray[:5])}{' and more' * (len(stray) > 5)}; it stays reachable as {repo.REFS}/stray/{turn['stamp']}")


# ---------------------------------------------------------------------------
# The check before five minutes are spent
# ---------------------------------------------------------------------------

def check(night, status, trainer, description):
    """Compiles, not scored before, survives a dry run. Raises Failed after putting the edit aside."""
    try:
        check_edit(trainer)
    except UserError as e:
        put_aside(trainer, f"stray/{new_id()}", description)
        raise Failed("edit", f"«{description}»: {e}") from None
    earlier = scored_before((ROOT / trainer).read_bytes(), night.options)
    if earlier:
        put_aside(trainer, f"stray/{new_id()}", description)
        raise Failed("edit", f"«{description}»: the same source was scored by run {earlier.run}: {earlier.val_bpb:.6f}, {earlier.status}")
    status.enter(f"dry run: {description}")
    outcome, tail = dry_run(ROOT / trainer, night.options.platform, night.options.track, night.options.seed)
    if outcome.status:
        run_id = new_id()
        commit = put_aside(trainer, run_id, description)
        platform, _ = choose_platform(night.options.platform)
        ledger().append(Row(commit=commit[:7], status=outcome.status, description=description, run=run_id, time=utc(),
                            platform=platform.name, track=night.options.track or platform.track, seed=night.options.seed, marks="dry",
                            total_seconds=outcome.total_seconds, reason=f"dry run: {outcome.reason}"))
        raise Failed("edit", f"«{description}» failed its dry run ({outcome.status}): {outcome.reason}\n{tail}")


def put_aside(trainer, name, description):
    """Take an edit back before it was tried; it stays under a ref. Returns its commit."""
    commit = repo.commit_alone(trainer, description)
    repo.remember(name, commit)
    repo.put_back(trainer)
    return commit


# ---------------------------------------------------------------------------
# The night
# ---------------------------------------------------------------------------

def loop(night):
    """Run the night. Returns the exit code: 0 at its end, 1 when it gave up, 130 when it was interrupted."""
    platform, _ = choose_platform(night.options.platform)
    laptop = mac_state()
    weak = [name for name in ("on_battery", "low_power_mode") if laptop.get(name)]
    if weak:
        raise UserError(f"this Mac is {weak[0].replace('_', ' ')}: no result of the night would count; plug it in and leave low-power mode")
    with the_repository(), stop_on_signals(), Awake(), Status(night) as status:
        resume(night, status)
        record("begin", agent=night.agent, experiments=night.experiments, until=str(night.until or ""), done=status.done)
        try:
            ended, code = turns(night, status, platform.trainer)
        except Stopped as stop:
            ended, code = f"interrupted ({stop})", 130
            with ignore_signals():
                end_turn()
                settle()
        edit = load_state().get("edit")
        if edit and repo.edited(platform.trainer) and edit["blob"] == repo.blob(platform.trainer):  # interrupted before its verdict: the next loop tries it first
            write_json(state_path(), {"edit": edit})
            say(f"no verdict yet on «{edit['description']}»: the edit is still in {platform.trainer}, and the next loop tries it first")
        else:
            state_path().unlink(missing_ok=True)
        record("end", why=ended, done=status.done, kept=status.kept)
    print(f"experiments: {status.done}\nkept: {status.kept}\ndiscarded: {status.discarded}\nfailed: {status.failed}\nturns_lost: {status.turns_lost}")
    if status.best:
        print(f"best_val_bpb: {status.best.val_bpb:.6f}\nbest_run: {status.best.run}\nbest: {status.best.description}")
    print(f"ended: {ended}")
    return code


def resume(night, status):
    """Go on where a loop was cut off."""
    state = load_state()
    end_turn()
    if "done" in state and state["experiments"] == night.experiments:
        status.done = state["done"]
        status.note(f"going on with a loop that was cut off after {status.done} experiments")
    platform, options = choose_platform(night.options.platform)[0], night.options
    kept = [row for row in ledger().rows() if row.compares and row.status == "keep" and row.budget == options.budget
            and (row.platform, row.track) == (platform.name, options.track or platform.track)]
    status.best = min(kept, key=lambda row: row.val_bpb, default=None)


def end_turn():
    """An agent was cut off in the middle of its turn: what it wrote is taken back and stays under a ref."""
    turn = load_state().get("turn")
    if turn:
        undo_turn(turn, None)


def turns(night, status, trainer):
    """Turn after turn until something ends the night. Returns (why, exit code)."""
    failures, bad_edits, complaint, result, edit = 0, 0, "", last_result(), load_state().get("edit")
    while True:
        save_state(night, status, edit=edit)
        if night.experiments and status.done >= night.experiments:
            return f"{night.experiments} experiments were asked for", 0
        if status.longest > night.left():
            return f"another experiment would not end by {night.until:%H:%M}", 0
        try:
            row = turn(night, status, trainer, complaint + result, edit)
        except (Failed, UserError, OSError) as e:
            kind, reason = getattr(e, "kind", "repository"), str(e)
            failures, bad_edits, status.turns_lost = failures + 1, bad_edits + 1 if kind == "edit" else 0, status.turns_lost + 1
            complaint = f"No experiment came of the last turn: {reason}\n\nThe experiment before it: "
            pause = 0.0 if kind == "edit" and bad_edits < FREE_EDITS else min(PAUSE_MOST, night.pause * 2 ** (failures - 1))
            status.note(f"no experiment: {reason.splitlines()[0]}" + (f"; again in {pause:.0f} s" if pause else ""))
            record("failed", kind=kind, reason=reason, failures=failures, pause=pause)
            if failures >= GIVE_UP:
                return f"gave up after {failures} turns without an experiment in a row: {reason.splitlines()[0]}", 1
            if pause:
                status.enter(f"pausing {pause:.0f} s")
                time.sleep(min(pause, night.left()))
            continue
        failures, bad_edits, complaint, edit = 0, 0, "", None
        status.count(row)
        result = result_of(row)
        record("experiment", run=row.run, status=row.status, val_bpb=row.val_bpb, description=row.description, reason=row.reason)
        status.note(f"experiment {status.done}: {row.status} {row.val_bpb:.6f} {row.description} [{row.reason}]")


def turn(night, status, trainer, result, edit):
    """One experiment: what lies in the trainer already, the baseline, or the agent's idea. Returns its row.

    edit: what an earlier loop knew of the trainer when it was interrupted.
    """
    edited = repo.edited(trainer)
    if edited:
        known = edit and edit["blob"] == repo.blob(trainer)
        description = edit["description"] if known else "what lay in the trainer, uncommitted"
    elif scored_before((ROOT / trainer).read_bytes(), night.options) is None:
        description = "baseline: the trainer as committed"
    else:
        check_edit(trainer)  # before an agent is called in vain: did somebody change what a run reads?
        description, edited = agent_turn(night, status, trainer, result), True
    if edited:
        check(night, status, trainer, description)
    options = replace(night.options, description=description, show=Detail(night.options.budget, status), quiet=True)
    for _ in range(NO_VERDICT_TRIES):
        status.enter(f"training: {description}")
        row = trial(options)
        if row.reason == INTERRUPTED:
            raise Stopped("during a run")
        if row.decided:
            return row
        status.note(f"no verdict ({row.reason}): again in {night.pause:.0f} s")
        time.sleep(night.pause)
    if edited:
        put_aside(trainer, row.run, description)
    raise Failed("repository", f"«{description}» was run {NO_VERDICT_TRIES} times without a verdict: {row.reason}")


def result_of(row):
    """What the agent is told of an experiment."""
    text = f"{row.description}\nstatus: {row.status}\nreason: {row.reason}"
    if row.scored:
        return text + f"\nval_bpb: {row.val_bpb:.6f}\ntokens_per_second: {row.tokens_per_second:.0f}\nnum_steps: {row.num_steps}\nmemory_gb: {row.memory_gb}"
    return f"{text}\n{log_tail(runs_dir() / row.run)}"


def last_result():
    rows = ledger().rows()
    return result_of(rows[-1]) if rows else "none: the ledger is empty"
