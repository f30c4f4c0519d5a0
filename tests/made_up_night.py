"""A night as the morning finds it: a ledger of real size, run folders, the loop's log, another machine's."""

import json
import math
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist

from backends.protocol import Log, Start, Stop, format_event
from launcher.harness import source_hash
from launcher.ledger import CONFIRMED, Flag, Ledger, Row

TRAINER = Path(__file__).resolve().parent.parent / "train_cuda.py"
BEGIN = datetime(2026, 6, 10, 20, 31, 7, tzinfo=UTC)
FINGERPRINT = "5c1b8a53d948444b"
H100 = {"platform": "h100", "device": "NVIDIA H100 80GB HBM3"}
MAC = {"platform": "apple-max", "device": "Apple M4 Max, 16 cores"}

# Edits: a description, the text that is replaced, the text in its place.
EDITS = [
    ("halve the batch: twice as many steps in five minutes", "START.total_batch_size", "2**18"),
    ("{depth} layers at the same width", "START.n_layer", "{depth}"),
    ("width {width}", "START.n_embd", "{width}"),
    ("MATRIX_LR 0.04 -> {small}", "MATRIX_LR = 0.04", "MATRIX_LR = {small}"),
    ("EMBEDDING_LR 0.9 -> {unit}", "EMBEDDING_LR = 0.9", "EMBEDDING_LR = {unit}"),
    ("SCALAR_LR 0.5 -> {unit}", "SCALAR_LR = 0.5", "SCALAR_LR = {unit}"),
    ("warmdown over {unit} of the budget", "WARMDOWN_RATIO = 0.8", "WARMDOWN_RATIO = {unit}"),
    ("no warm-up at all, as the first steps are wasted", "WARMUP_RATIO = 0.05", "WARMUP_RATIO = 0.0"),
    ("weight decay {small} on the matrices", "WEIGHT_DECAY = 0.2", "WEIGHT_DECAY = {small}"),
    ("a little decay on the embeddings ({small})", "EMBEDDING_DECAY = 0.001", "EMBEDDING_DECAY = {small}"),
    ("rope base {wide},000, for short contexts", "ROPE_BASE = 200_000", "ROPE_BASE = {wide}_000"),
    ("softcap {wide} in place of 15", "SOFTCAP = 15.0", "SOFTCAP = {wide}.0"),
    ("final learning rate at {small} of the full one", "FINAL_LR_FRAC = 0.05", "FINAL_LR_FRAC = {small}"),
    ("momentum rises over {unit}", "MOMENTUM_RATIO = 0.1", "MOMENTUM_RATIO = {unit}"),
    ("short window of {wide} tokens in three of four layers", "START.short_window", "{wide}"),
    ("betas (0.9, 0.9{depth}) for AdamW", "ADAM_BETAS = (0.8, 0.95)", "ADAM_BETAS = (0.9, 0.9{depth})"),
    ("scale the residual stream by {unit} before each block",
     "    def forward(self", "    # x * {unit}\n    def forward(self"),
    ("value residual: mix the first layer's values into each later one, with a learned scalar of {unit}",
     "import math\n", "import math\n\nVALUE_RESIDUAL = {unit}\n"),
]  # fmt: skip
FAILURES = [
    ("crash", "CUDA out of memory: tried to allocate {gb}.25 GiB; lower DEVICE_BATCH_SIZE"),
    ("crash", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2048x{gb}12 and 768x768)"),
    ("crash", "the loss is not finite at step {gb}41"),
    ("timeout", "no step within 60 s: is it compiling inside the clock?"),
    ("invalid", "the model saw the token that it predicts: position {gb}"),
]


@dataclass
class Maker:
    """Makes one device's rows, one after the other, and what they leave on disk."""

    home: Path
    ledger: Path
    where: dict[str, str]
    baseline: float
    sigma: float  # seed noise
    agent: str
    begin: datetime
    has_folders: bool
    points: int  # of a loss curve
    random: random.Random
    source: str = field(default_factory=TRAINER.read_text)  # of the trainer that is built on
    true: float = 0.0  # val_bpb of it
    belief: float = 0.0  # and what is believed of it
    number: int = 0
    clock: datetime = BEGIN
    rows: list[Row] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.true = self.baseline
        self.clock = self.begin
        self.note("begin", agent=self.agent, experiments=None, until="2026-06-11 07:30:00", done=0)

    def note(self, event: str, **values) -> None:
        self.log.append({"time": f"{self.clock:%Y-%m-%dT%H:%M:%SZ}", "event": event, **values})

    def spend(self, low: float, high: float) -> float:
        seconds = self.random.uniform(low, high)
        self.clock += timedelta(seconds=seconds)
        return seconds

    def experiment(self) -> None:
        """Make a turn of the agent, and the run of its edit."""
        if self.number == 0:
            self.run("baseline: the trainer as committed", self.source, 0.0)
            return
        self.note("phase", phase="agent", text="the agent thinks")
        seconds = self.spend(35, 240)
        self.note("turn", stamp=str(self.number), agent=self.agent, seconds=seconds, tokens=41_000, cost=0.11)
        if self.random.random() < 0.03:
            self.note("failed", kind="agent", reason="it changed nothing", failures=1, pause=60)
            self.note("phase", phase="pause", text="pausing 60 s")
            self.clock += timedelta(seconds=60)
            return
        values = {
            "depth": self.random.randint(6, 14),
            "width": 64 * self.random.randint(6, 16),
            "small": self.random.choice([0.01, 0.02, 0.03, 0.05, 0.06, 0.1]),
            "unit": self.random.choice([0.2, 0.4, 0.5, 0.7, 0.9, 1.0]),
            "wide": self.random.choice([10, 20, 64, 128, 256, 500]),
        }
        idea, old, new = self.random.choice(EDITS)
        description = idea.format(**values)
        edited = self.source.replace(old, new.format(**values), 1) + f"# {self.number}\n"
        self.note("phase", phase="dry run", text=f"dry run: {description}")
        self.spend(18, 40)
        kind = self.random.random()
        if kind < 0.18:
            effect = -self.random.expovariate(1 / 0.0022)
        elif kind < 0.48:
            effect = 0.0
        elif kind < 0.98:
            effect = self.random.expovariate(1 / 0.0035)
        else:
            effect = 0.25
        self.note("phase", phase="training", text=f"training: {description}")
        self.run(description, edited, effect)

    def run(self, description: str, edited: str, effect: float, marks: str = "", seed: int = 1) -> Row:
        """Make a run, judge it as the belief would about, and write what it leaves."""
        parent = self.source
        row = Row(
            commit=f"{self.number:07x}",
            run=f"{self.clock:%Y%m%d-%H%M%S}-{self.number:04x}",
            time=f"{self.clock:%Y-%m-%dT%H:%M:%SZ}",
            description=description,
            track="climbmix",
            seed=seed,
            rules=1,
            fingerprint=FINGERPRINT,
            harness="3f2a9c1b77d0",
            budget=300.0,
            val_tokens=10_485_760,
            source=source_hash(edited.encode()),
            parent=source_hash(parent.encode()),
            agent=self.agent if self.number else "",
            marks=marks,
            num_params_M=round(self.random.uniform(48, 52), 1),
            depth=9,
            energy_kj=round(self.random.uniform(150, 190), 1),
            **self.where,
        )
        self.number += 1
        failed = not marks and self.number > 1 and self.random.random() < 0.09
        startup = self.spend(20, 55)
        if failed:
            row.status, reason = self.random.choice(FAILURES)
            row.reason = reason.format(gb=self.random.randint(2, 9))
            row.training_seconds = round(self.random.uniform(0, 120), 1)
            row.total_seconds = round(startup + row.training_seconds, 1)
            self.clock += timedelta(seconds=row.training_seconds)
        else:
            self.judge(row, edited, effect)
            row.training_seconds = 300.1
            row.tokens_per_second = round(self.random.gauss(1_840_000, 25_000))
            row.tokens_M = round(row.tokens_per_second * 300 / 1e6, 1)
            row.num_steps = int(row.tokens_M * 1e6 / 2**19)
            row.mfu_percent = round(self.random.gauss(45, 1), 2)
            row.memory_gb = round(self.random.uniform(16, 22), 2)
            self.clock += timedelta(seconds=300)
            scoring = self.spend(7, 15)
            row.total_seconds = round(startup + 300 + scoring, 1)
        self.rows.append(row)
        Ledger(self.ledger).append(row)
        if not marks:
            facts = {
                name: getattr(row, name) for name in ("run", "status", "val_bpb", "description", "reason")
            }
            self.note("experiment", **facts)
        if self.has_folders:
            self.write_folder(row, edited, startup)
        return row

    def judge(self, row: Row, edited: str, effect: float) -> None:
        """Score a run with noise, and shrink its difference to what may be believed."""
        true = self.true + effect
        row.val_bpb = round(true + self.random.gauss(0, self.sigma), 6)
        row.val_stderr = 0.0041
        before = self.belief or row.val_bpb
        error = self.sigma * 0.5
        spread = 0.0025
        share = spread**2 / (spread**2 + self.sigma**2 + error**2)
        row.effect = round((row.val_bpb - before) * share, 6)
        row.effect_error = round(spread * math.sqrt(1 - share), 6)
        row.p_better = round(NormalDist().cdf(-row.effect / row.effect_error), 3)
        row.belief_before, row.belief_before_error = before, error
        row.sigma = self.sigma
        kept = len(self.rows) == 0 or row.effect < -0.3 * row.effect_error
        row.status = "keep" if kept and not row.marks else "discard"
        row.belief_after = round(before + row.effect, 6) if row.status == "keep" else before
        row.belief_after_error = row.effect_error if row.status == "keep" else error
        if not row.marks:
            self.belief = row.belief_after
        numbers = f"effect {row.effect:+.6f} +- {row.effect_error:.6f}, P(better) {row.p_better:.2f}"
        row.reason = f"{'probably' if kept else 'not'} better: {numbers}"
        if row.status == "keep":
            self.source, self.true = edited, true
        row.build_on = source_hash(self.source.encode())

    def write_folder(self, row: Row, edited: str, startup: float) -> None:
        folder = self.home / "runs" / row.run
        folder.mkdir(parents=True)
        (folder / "train_cuda.py").write_text(edited)
        (folder / "run.json").write_text(json.dumps({"trainer": "train_cuda.py"}))
        answer = {
            "description": row.description,
            "learned": "the last change was within the noise; larger steps tell more",
            "next": "try it together with a longer warmdown",
            "idea": "",
        }
        (folder / "answer.json").write_text(json.dumps(answer))
        final = (row.val_bpb or 1.1) * 3.03
        wiggle = 0.0
        lines = [(startup, START)]
        for i in range(1, self.points + 1):
            at = row.training_seconds * i / self.points
            wiggle = 0.9 * wiggle + self.random.gauss(0, 0.004)
            loss = final + 6 / (1 + at / 4) - 6 / 76 + wiggle
            lines.append((startup + at, Log(i, loss, loss, i * 2**19, at, 1.84e6, 45.0)))
        if row.scored:
            lines.append((startup + 300.4, Stop(num_steps=1000, tokens=5 * 10**8, peak_memory_mb=17_000.0)))
        with open(folder / "events.jsonl", "w") as f:
            for at, event in lines:
                f.write(json.dumps({"at": round(at, 3), **json.loads(format_event(event))}) + "\n")

    def confirm(self) -> None:
        """Make the pairs of a claim, and the row that says that it was shown."""
        best, first = self.rows[-1], self.rows[0]
        kept = [row for row in self.rows if row.status == "keep"]
        best = min(kept, key=lambda row: row.val_bpb)
        self.note("phase", phase="confirm", text=f"confirming: {best.description}")
        source = self.source
        for seed in (2, 3, 4):
            for known in (first, best):
                self.source = TRAINER.read_text() if known is first else source
                self.true = self.baseline if known is first else known.belief_after
                self.run(f"confirm, seed {seed}: {known.description}", self.source, 0.0, Flag.CONFIRM, seed)
        gain = round(self.baseline - best.belief_after, 6)
        sentence = (
            f"{gain:.6f} [{gain - 0.0031:.6f}, {gain + 0.0031:.6f}] bits per byte better than the baseline, "
            "on text that no run was selected on (p 0.0004, 3 runs of each)"
        )
        row = Row(
            **{
                **{name: getattr(best, name) for name in ("run", "source", "description", "track", "budget")},
                **{name: getattr(best, name) for name in ("rules", "fingerprint", "val_tokens")},
                **self.where,
            },
            val_bpb=best.val_bpb,
            status=CONFIRMED,
            sealed_bpb=best.belief_after,
            effect=-gain,
            effect_error=0.0031,
            reason=sentence,
            time=f"{self.clock:%Y-%m-%dT%H:%M:%SZ}",
        )
        Ledger(self.ledger).append(row)
        self.note("claim", claim=sentence)
        self.note("end", why="another experiment would not end by 07:30", done=self.number, kept=len(kept))


START = Start(
    device=H100["device"],
    platform="h100",
    track="climbmix",
    seed=1,
    budget=300.0,
    num_params_M=50.0,
    depth=9,
    flops_per_token=10**8,
    peak_tflops=989.0,
    dtype="bfloat16",
    startup=20.0,
    weights={},
)


def make_night(
    home: Path, runs: int = 100, mac_runs: int = 60, points: int = 150, seed: int = 5, claims: bool = True
) -> list[Path]:
    """Make results.tsv, runs/ and the loop's log in `home`, and mac.tsv of a Mac. Returns the ledgers.

    runs, mac_runs: experiments of each. points: of a loss curve. claims: the night ends with a claim.
    """
    here = Maker(
        home, home / "results.tsv", H100, 0.9979, 0.0006, "claude", BEGIN, True, points, random.Random(seed)
    )
    while here.number < runs:
        here.experiment()
    if claims:
        here.confirm()
    loop = home / "runs" / "loop"
    loop.mkdir(parents=True, exist_ok=True)
    (loop / "loop.jsonl").write_text("".join(json.dumps(line) + "\n" for line in here.log))
    if not mac_runs:
        return [here.ledger]
    there = Maker(
        home,
        home / "mac.tsv",
        MAC,
        1.1840,
        0.0015,
        "builtin",
        BEGIN + timedelta(minutes=40),
        False,
        points,
        random.Random(seed + 1),
    )
    while there.number < mac_runs:
        there.experiment()
    return [here.ledger, there.ledger]


if __name__ == "__main__":
    import sys

    print(*make_night(Path(sys.argv[1])), sep="\n")
