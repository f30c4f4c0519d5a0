"""
Stands in for backends/scorer.py: python -m backends.scorer TRAINER FOLDER CHANNEL [--compile]

The model gives every token the logit 0, and the first one the score that the trainer wrote as its weights.
That token is rare, so a lower score gives fewer bits per byte.
"""

import json
import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np


def answer(channel: Connection, folder: Path) -> None:
    """Answer the launcher until it closes the channel."""

    def say(message: object) -> None:
        channel.send_bytes(json.dumps({"ok": message}).encode())

    logits = np.zeros(json.loads(os.environ["AUTORESEARCH_ENTRIES"])["track"]["vocab_size"], np.float32)
    say({"weights": {"w": [1]}, "drawn": os.environ["AUTORESEARCH_SEED"], "batch": 8})
    while True:
        request = json.loads(channel.recv_bytes())
        if request["do"] == "load":
            logits[0] = float((folder / "model.safetensors").read_text())
            say(True)
            continue
        rows = np.frombuffer(channel.recv_bytes(), np.uint16).reshape(request["shape"])
        if request["do"] == "nats":
            numbers = np.log(np.exp(logits).sum()) - logits[rows[:, 1:]]
        else:
            channel.recv_bytes()  # the positions: the logits are the same everywhere
            numbers = np.broadcast_to(logits, (len(rows), request["positions"], len(logits)))
        say(True)
        channel.send_bytes(np.ascontiguousarray(numbers, np.float32).tobytes())


if __name__ == "__main__":
    with suppress(EOFError):
        answer(Connection(int(sys.argv[3])), Path(sys.argv[2]))
