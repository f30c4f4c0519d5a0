"""
Stands in for backends/scorer.py: python -m backends.scorer TRAINER FOLDER CHANNEL [--compile]

The model gives every token the logit 0, and the first one the score that the trainer wrote as its weights.
That token is rare, so a lower score gives fewer bits per byte. It imports nothing that loads slowly.
"""

import json
import math
import os
import sys
from array import array
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path


def answer(channel: Connection, folder: Path) -> None:
    """Answer the launcher until it closes the channel."""

    def say(message: object) -> None:
        channel.send_bytes(json.dumps({"ok": message}).encode())

    vocab_size = json.loads(os.environ["AUTORESEARCH_ENTRIES"])["track"]["vocab_size"]
    logits = array("f", vocab_size * [0.0])
    say({"weights": {"w": [1]}, "drawn": os.environ["AUTORESEARCH_SEED"], "batch": 8})
    while True:
        request = json.loads(channel.recv_bytes())
        if request["do"] == "load":
            logits[0] = float((folder / "model.safetensors").read_text())
            say(True)
            continue
        rows, length = request["shape"]
        tokens = array("H", channel.recv_bytes())
        say(True)
        if request["do"] == "nats":
            total = math.log(sum(map(math.exp, logits)))
            targets = (token for place, token in enumerate(tokens) if place % length)
            channel.send_bytes(array("f", [total - logits[token] for token in targets]).tobytes())
        else:
            channel.recv_bytes()  # the positions: the logits are the same everywhere
            channel.send_bytes(rows * request["positions"] * logits.tobytes())


if __name__ == "__main__":
    with suppress(EOFError):
        answer(Connection(int(sys.argv[3])), Path(sys.argv[2]))
