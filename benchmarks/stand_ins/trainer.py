"""
Stands in for a trainer: it takes no time, and its score is a constant.

It speaks backends/protocol.py and imports nothing of ours, so that it starts in a tenth of a second. The
variables of SLOW, seconds, make it hang before it says anything, as a slow import does.
"""

import json
import os
import socket
import time

SCORE = 3.00  # lower is better: see scorer.py
SECONDS = 0.1  # of training
SLOW = {"0": "HOSTILE_TRAINING", "1": "HOSTILE_DRY_RUN"}


def main() -> None:
    time.sleep(float(os.environ.get(SLOW[os.environ["AUTORESEARCH_PROFILED"]], "0")))
    launcher = socket.socket(fileno=int(os.environ["AUTORESEARCH_LAUNCHER_FD"]))

    def say(event: str, **values: object) -> None:
        launcher.sendall(json.dumps({"event": event, **values}).encode() + b"\n")

    say(
        "start",
        device="a made-up device",
        platform=os.environ["AUTORESEARCH_PLATFORM"],
        track=os.environ["AUTORESEARCH_TRACK"],
        seed=int(os.environ["AUTORESEARCH_SEED"]),
        budget=float(os.environ["AUTORESEARCH_BUDGET"]),
        num_params_M=0.1,
        depth=1,
        flops_per_token=1000,
        peak_tflops=1.0,
        dtype="float32",
        startup=0.1,
        weights={"w": [1]},
    )
    socket.recv_fds(launcher, 1, 1)  # the training rows: the clock runs
    time.sleep(SECONDS)
    say("log", step=1, loss=3.0, smooth=3.0, tokens=1000, elapsed=SECONDS, tokens_per_s=5000.0, mfu=1.0)
    with open(os.environ["AUTORESEARCH_WEIGHTS"], "w") as file:
        file.write(str(SCORE))
    say("stop", num_steps=10, tokens=10000, peak_memory_mb=100.0)
    time.sleep(60)  # the launcher ends it


if __name__ == "__main__":
    main()
