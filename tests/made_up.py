"""A ledger with runs that never were: rows, trainers, answers and curves, as a night leaves them."""

import json

from backends.protocol import Log, format_event
from launcher.harness import source_hash
from launcher.ledger import Ledger, Row
from launcher.runs import ledger, run_dir
from launcher.setting import Setting, resolve
from night.agent import Answer, save_answer

TRAINER = """\
START = current_platform().start

N_LAYER = START.n_layer
N_EMBD = START.n_embd  # the width
MATRIX_LR = 0.04
WARMUP_RATIO = 0.05


def forward(x):
    x = x + attention(x)
    return x + mlp(x)
"""


class Night:
    """Experiments one after the other, each an edit of the trainer that was kept last."""

    def __init__(self, setting: Setting | None = None, trainer: str = TRAINER) -> None:
        self.setting = setting or resolve("cpu")
        self.trainer = trainer  # to build on
        self.number = 0
        self.ledger: Ledger = ledger()

    def run(self, val_bpb, status, old="", new="", answer=None, curve=(), **values) -> Row:
        """Add the run of an edit that replaces `old` by `new` in the trainer, and return its row.

        Without `old`, the edit adds a line. curve: losses, at equal distances in the budget.
        """
        parent = self.trainer
        board = self.setting.board._asdict()
        del board["boxed"]  # a flag of the row
        edited = parent.replace(old, new) if old else parent + f"# {self.number}\n" * (self.number > 0)
        row = Row(
            run=f"r{self.number:03}",
            val_bpb=val_bpb,
            status=status,
            description=f"idea {self.number}",
            time=f"2026-01-01T{self.number // 60:02}:{self.number % 60:02}:00Z",
            source=source_hash(edited.encode()),
            parent=source_hash(parent.encode()),
            **board,
        )
        if status == "keep":
            self.trainer = edited
        row.build_on = source_hash(self.trainer.encode())
        for name, value in values.items():
            setattr(row, name, value)
        self.number += 1
        self.ledger.append(row)
        self.write_files(row, edited, answer, curve)
        return row

    def write_files(self, row: Row, trainer: str, answer: Answer | None, curve) -> None:
        folder = run_dir(row.run)
        folder.path.mkdir(parents=True)
        name = self.setting.platform.trainer
        (folder.path / name).write_text(trainer)
        folder.record.write_text(json.dumps({"trainer": name}))
        if answer:
            save_answer(row.run, answer)
        with open(folder.events, "w") as f:
            for i, loss in enumerate(curve, 1):
                event = Log(i, loss, loss, i, row.budget * i / len(curve), 1.0, 1.0)
                f.write(json.dumps({"at": 1.0, **json.loads(format_event(event))}) + "\n")
